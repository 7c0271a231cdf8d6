"""Causal attention with grouped queries: over whole sequences, and over a cache of keys and values.

Query head n reads key/value head n // (N / K); scores are scaled by H^-0.5; softmax in fp32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen35_jax.errors import UserError
from qwen35_jax.ops.attention import cached, ring, sharded_cache, tpu, tpu_cached, xla
from qwen35_jax.ops.attention.sharded_cache import ShardedCache
from qwen35_jax.ops.segments import check_implementation, check_segment_ids

__all__ = ["ShardedCache", "attention", "cached_attention"]

FORMS = ("xla", "pallas_tpu")
CACHED_FORMS = ("xla", *cached.KERNELS)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
    context_axis: str | None = None,
) -> jax.Array:
    """Causal attention in blocks: the scores of a block of queries and keys at a time, none above the diagonal.

    Args:
      q: [B, Tq, N, H]; k, v: [B, Tk, K, H], float.
      q_positions: int32 [B, Tq], the index among the keys of each query, which sees the keys up to it; None: 0, 1, ….
      segment_ids: int32 [B, Tk], of the keys; a query sees the keys of its own position's segment only.
      implementation: None (xla), "xla" or "pallas_tpu", which takes no q_positions.
      context_axis: under `shard_map`, the mesh axis over which Tq and Tk are cut alike; each shard has the next of both. For
        "xla", without q_positions. What comes out at padding is zero.

    Returns:
      [B, Tq, N, H] in q.dtype. Differentiable in q, k and v.

    Raises:
      UserError: shapes that do not fit together, or an implementation that does not exist.
    """
    check_implementation("attention", implementation, FORMS)
    _check_heads("attention", q, k, v)
    (batch, queries), keys = q.shape[:2], k.shape[1]
    check_segment_ids("attention", segment_ids, batch, keys)
    if context_axis is not None:
        if implementation == "pallas_tpu" or q_positions is not None or queries != keys:
            raise UserError(
                "attention: with a context_axis pass implementation 'xla', no q_positions and as many keys as queries"
            )
        return ring.attention(q, k, v, segment_ids, context_axis)
    if implementation == "pallas_tpu":
        if q_positions is not None:
            raise UserError("attention: pallas_tpu takes no q_positions; pass implementation='xla'")
        return tpu.attention(q, k, v, segment_ids)
    if q_positions is None:
        if queries > keys:
            raise UserError(f"attention: {queries} queries on {keys} keys; pass q_positions")
        q_positions = jnp.broadcast_to(jnp.arange(queries, dtype=jnp.int32), (batch, queries))
    elif q_positions.shape != (batch, queries):
        raise UserError(f"attention: q_positions has shape {q_positions.shape}; pass {(batch, queries)}")
    return xla.attention(q, k, v, q_positions, segment_ids)


def cached_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache_k: jax.Array,
    cache_v: jax.Array,
    *,
    slots: jax.Array | None = None,
    start: jax.Array,
    count: jax.Array,
    implementation: str | None = None,
    layout: ShardedCache | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Append new keys and values to the cache and attend from the new tokens to all that each may see.

    Args:
      q: [B, T, N, H]; k, v: [B, T, K, H], the new tokens, already rotated.
      cache_k, cache_v: [S, K, Tc, H].
      slots: int32 [B], distinct, the cache row of each row; None means row i is slot i (B == S).
      start: int32 [B], tokens the slot already holds. start + T <= Tc wherever count > 0.
      count: int32 [B], how many of the T new tokens are real. 0: a dead row, whose slot is left unchanged and whose
        output means nothing. What is written beyond the real tokens is never seen, and overwritten by the next call.
      implementation: None (xla), "xla", "pallas_tpu", which takes H in multiples of 128, or "pallas_gpu": H of 128 or 256, caches
        in bfloat16.
      layout: under `shard_map`, how the cache (and, if so, T) is cut over a mesh axis: Tc is then of this shard's part, start and
        count of the whole step.

    Returns:
      (out [B, T, N, H] in q.dtype, cache_k, cache_v). Not differentiable.

    Raises:
      UserError: shapes that do not fit together, or an implementation that does not exist.
    """
    check_implementation("cached_attention", implementation, CACHED_FORMS)
    _check_heads("cached_attention", q, k, v)
    batch, time, groups, width = k.shape
    if q.shape[1] != time:
        raise UserError(f"cached_attention: {q.shape[1]} queries and {time} new keys; pass as many of each")
    expected = (cache_k.shape[0], groups, cache_k.shape[2], width)
    if cache_k.shape != expected or cache_v.shape != expected:
        raise UserError(
            f"cached_attention: caches are {cache_k.shape} and {cache_v.shape}; pass two of [S, K, Tc, H] = {expected}"
        )
    if time > expected[2]:
        raise UserError(f"cached_attention: {time} new tokens do not fit a cache of {expected[2]}")
    if (slots is None and expected[0] != batch) or (slots is not None and slots.shape != (batch,)):
        raise UserError(f"cached_attention: {batch} rows on {expected[0]} slots; pass slots int32 [{batch}], or one slot per row")
    if implementation == "pallas_tpu" and not tpu_cached.supports(width):
        raise UserError(f"cached_attention: pallas_tpu needs H in multiples of {tpu_cached.LANES}, not {width}")
    for name, x in (("start", start), ("count", count)):
        if x.shape != (batch,):
            raise UserError(f"cached_attention: {name} has shape {x.shape}; pass one number per row, {(batch,)}")
    if layout is not None:
        return sharded_cache.cached_attention(q, k, v, cache_k, cache_v, slots, start, count, layout, implementation)
    return cached.cached_attention(q, k, v, cache_k, cache_v, slots, start, count, implementation)


def _check_heads(op: str, q, k, v) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise UserError(f"{op}: q is {q.shape}, k {k.shape}, v {v.shape}; pass [B, Tq, N, H] and two of [B, Tk, K, H]")
    if q.shape[2] % k.shape[2]:
        raise UserError(f"{op}: {q.shape[2]} query heads on {k.shape[2]} key heads; pass a multiple")
