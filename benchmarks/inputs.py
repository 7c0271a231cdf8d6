"""Random inputs of the ops that are timed."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def normal(seed: int, *shape: int, dtype="bfloat16") -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def rule_inputs(batch: int, time: int, keys: int, heads: int, widths: tuple[int, int] = (128, 128), dtype="bfloat16"):
    """q, k, v, g, beta of the gated delta rule; widths of a key's head and of a value's."""
    q, k, v = (
        normal(i, batch, time, n, w, dtype=dtype) for i, (n, w) in enumerate(((keys, widths[0]),) * 2 + ((heads, widths[1]),))
    )
    g = -jnp.exp(normal(3, batch, time, heads, dtype="float32") - 3)
    return q, k, v, g, jax.random.uniform(jax.random.key(4), (batch, time, heads))
