"""Attention with the whole matrix of scores: slow, obvious, in the widest dtype of its inputs (at least fp32)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attention(q, k, v, *, q_positions=None, segment_ids=None):
    """As `ops.attention.attention`; the output comes in the dtype of the computation."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    (batch, queries, heads, width), (keys, groups) = q.shape, k.shape[1:3]
    if q_positions is None:
        q_positions = jnp.broadcast_to(jnp.arange(queries), (batch, queries))
    seen = jnp.arange(keys) <= q_positions[..., None]
    if segment_ids is not None:
        seen &= jnp.take_along_axis(segment_ids, q_positions, axis=1)[..., None] == segment_ids[:, None, :]
    k, v = (jnp.repeat(x, heads // groups, axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest") * width**-0.5
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights, v, precision="highest")
