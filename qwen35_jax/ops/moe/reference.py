"""The obvious mixture of experts: every expert sees every token, the routing weights pick. float32, for tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen35_jax.ops.moe.routing import Routing


def moe_reference(x: jax.Array, routing: Routing, gate_up: jax.Array, down: jax.Array) -> jax.Array:
    """x [..., D], gate_up [E, D, 2, F], down [E, F, D] -> [..., D] float32."""
    x, gate_up, down = (a.astype(jnp.float32) for a in (x, gate_up, down))
    hidden = jnp.einsum("...D,EDGF->...EGF", x, gate_up, precision="highest")
    hidden = jax.nn.silu(hidden[..., 0, :]) * hidden[..., 1, :]
    outputs = jnp.einsum("...EF,EFD->...ED", hidden, down, precision="highest")
    chosen = jax.nn.one_hot(routing.experts, gate_up.shape[0], dtype=jnp.float32) * routing.weights[..., None]
    return jnp.einsum("...ED,...kE->...D", outputs, chosen, precision="highest")
