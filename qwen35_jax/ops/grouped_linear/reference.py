"""The grouped product with a weight written out for every row, float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen35_jax.ops.fp8 import Fp8Weight, dequantize


def grouped_linear_reference(x: jax.Array, w: jax.Array | Fp8Weight, group_sizes: jax.Array) -> jax.Array:
    """See `grouped_linear`; float32."""
    w = (dequantize(w, jnp.float32) if isinstance(w, Fp8Weight) else w).astype(jnp.float32)
    rows, ins = x.shape[0], x.ndim - 1
    ends = jnp.cumsum(group_sizes)
    group = jnp.searchsorted(ends, jnp.arange(rows), side="right")  # E where the row belongs to none
    chosen = jnp.where(
        (group < w.shape[0]).reshape(-1, *[1] * (w.ndim - 1)), w[jnp.minimum(group, w.shape[0] - 1)], 0.0
    )
    out = jnp.einsum(
        "ri,rio->ro", x.astype(jnp.float32).reshape(rows, -1), chosen.reshape(rows, x[0].size, -1), precision="highest"
    )
    return out.reshape(rows, *w.shape[1 + ins :])
