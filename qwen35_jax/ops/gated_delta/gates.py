"""What the kernels of every device do to gates and lengths before they start."""

from __future__ import annotations

import jax.numpy as jnp

from qwen35_jax.ops.gated_delta.xla import FLOOR
from qwen35_jax.ops.segments import segment_index


def gates_of(g, beta, segment_ids):
    """g and beta fp32 [B, T, N], 0 at padding; where a document begins, g cuts what came before."""
    g, beta = jnp.maximum(g.astype(jnp.float32), FLOOR), beta.astype(jnp.float32)
    if segment_ids is None:
        return g, beta
    real = (segment_ids != 0)[..., None]
    begins = jnp.diff(segment_index(segment_ids), axis=1, prepend=0)[..., None] > 0
    return jnp.where(begins, FLOOR, jnp.where(real, g, 0)), jnp.where(real, beta, 0)


def padded(x, axis: int, chunk: int):
    """Zeros up to a whole number of chunks: with g = beta = 0 they leave the state as it is."""
    return jnp.pad(x, [(0, -x.shape[axis] % chunk if i == axis else 0) for i in range(x.ndim)])
