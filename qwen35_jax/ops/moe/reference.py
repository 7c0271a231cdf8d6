"""The obvious mixture of experts: every expert sees every token, the routing weights pick. float32, for tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen35_jax.ops.moe.routing import Routing


def moe_reference(x: jax.Array, routing: Routing, experts: dict[str, jax.Array]) -> jax.Array:
    """x [B, T, D], experts {"gate", "up": [E, D, F], "down": [E, F, D]} -> [B, T, D] float32."""
    x, gate, up, down = (a.astype(jnp.float32) for a in (x, experts["gate"], experts["up"], experts["down"]))
    gate, up = (jnp.einsum("BTD,EDF->BTEF", x, w, precision="highest") for w in (gate, up))
    outputs = jnp.einsum("BTEF,EFD->BTED", jax.nn.silu(gate) * up, down, precision="highest")
    chosen = jax.nn.one_hot(routing.experts, outputs.shape[2], dtype=jnp.float32) * routing.weights[..., None]
    return jnp.einsum("BTED,BTE->BTD", outputs, chosen.sum(2), precision="highest")
