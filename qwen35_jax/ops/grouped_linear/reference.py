"""The grouped product with a weight written out for every row, float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen35_jax.ops.fp8 import Fp8Weight, dequantize


def grouped_linear_reference(x: jax.Array, w: jax.Array | Fp8Weight, group_sizes: jax.Array) -> jax.Array:
    """See `grouped_linear`; float32."""
    w = (dequantize(w, jnp.float32) if isinstance(w, Fp8Weight) else w).astype(jnp.float32)
    rows, groups, outs = x.shape[0], w.shape[0], w.shape[x.ndim :]
    x = x.astype(jnp.float32).reshape(rows, -1)
    group = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(rows), side="right")  # `groups`: the row is in none
    own = w[jnp.minimum(group, groups - 1)].reshape(*x.shape, -1)
    out = jnp.einsum("ri,rio->ro", x, own, precision="highest")
    return jnp.where((group < groups)[:, None], out, 0.0).reshape(rows, *outs)
