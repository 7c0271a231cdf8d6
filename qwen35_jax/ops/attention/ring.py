"""Causal attention on sequences cut over a mesh axis: keys and values go round the shards, each attends what it sees of them.

Ring attention (arXiv 2310.01889) over the blocks of `xla`: after `i` steps a shard has the keys of the one `i` places before it.
What comes from behind it sees nothing of, and skips: with shards that follow each other in the sequence, the last one does
twice the mean work. Layouts that even this out (each shard an early and a late piece) would cut the recurrence of Gated
DeltaNet in twice as many pieces, so there are none here. In the backward pass the gradients of keys and values go round too.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from qwen35_jax.ops.attention import xla
from qwen35_jax.ops.segments import document_starts


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention(q, k, v, segment_ids, axis: str):
    """See `ops.attention.attention` with a context_axis: q [B, T, N, H], k, v [B, T, K, H], segment_ids [B, T] or None."""
    return _attention_fwd(q, k, v, segment_ids, axis)[0]


def _attention_fwd(q, k, v, segment_ids, axis: str):
    batch, time, groups = k.shape[:3]
    starts = None if segment_ids is None else document_starts(segment_ids, axis)

    def attend(i, keys):
        places = _places(i, batch, time, segment_ids, starts, axis)
        fetch, block = xla.key_blocks(*keys)
        return xla.attend(q, *places[:2], groups, fetch, block, places[2])

    def step(carry, i):
        keys, total = carry
        following = _next(keys, axis)  # on its way while these are attended to
        return (following, merged(total, attend(i, keys))), None

    last = jax.lax.axis_size(axis) - 1
    keys = (k, v, segment_ids)
    out, log_sum = jax.eval_shape(attend, 0, keys)
    nothing = jnp.zeros(out.shape, out.dtype), jnp.full(log_sum.shape, jnp.inf, log_sum.dtype)
    (keys, total), _ = jax.lax.scan(step, (keys, nothing), jnp.arange(last))
    out, log_sum = merged(total, attend(last, keys))
    out = xla.joined(out, time).astype(q.dtype)
    return out, (q, k, v, segment_ids, out, log_sum)


def _attention_bwd(axis: str, residuals, d_out):
    q, k, v, segment_ids, out, log_sum = residuals
    batch, time, groups = k.shape[:3]
    starts = None if segment_ids is None else document_starts(segment_ids, axis)
    heads = xla.gradient_heads(q, out, d_out, groups, segment_ids is not None)

    def step(carry, i):
        keys, d_keys, d_q = carry
        places = _places(i, batch, time, segment_ids, starts, axis)
        part, *d_keys = xla.attend_bwd(heads, places, log_sum, *xla.key_blocks(*keys), d_keys)
        keys, d_keys = _next((keys, tuple(d_keys)), axis)  # after the last step they are at home again
        return (keys, d_keys, d_q + part), None

    zero = jnp.zeros_like(jnp.swapaxes(k, 1, 2), dtype=jnp.float32)
    start = ((k, v, segment_ids), (zero, zero), jnp.zeros_like(heads[0], dtype=jnp.float32))
    (_, d_keys, d_q), _ = jax.lax.scan(step, start, jnp.arange(jax.lax.axis_size(axis)))
    d_k, d_v = (jnp.swapaxes(x, 1, 2).astype(k.dtype) for x in d_keys)
    return xla.joined(d_q, time).astype(q.dtype), d_k, d_v, None


attention.defvjp(_attention_fwd, _attention_bwd)


def _next(x, axis: str):
    shards = jax.lax.axis_size(axis)
    return jax.tree.map(lambda a: jax.lax.ppermute(a, axis, [(i, (i + 1) % shards) for i in range(shards)]), x)


def _places(i, batch: int, time: int, segment_ids, starts, axis: str):
    """Positions, segments and first keys of this shard's queries among the keys that are there after i steps, [B, T] each.

    A query sees all keys of a shard before its own (the position of the last one) and none of one behind (-1)."""
    rank = jax.lax.axis_index(axis)
    source = (rank - i) % jax.lax.axis_size(axis)
    index = jnp.clip(jnp.arange(time, dtype=jnp.int32) + (rank - source) * time, -1, time - 1)
    positions = jnp.broadcast_to(index, (batch, time))
    if segment_ids is None:
        return positions, None, None
    # Padding sees nothing, so that it makes no loop longer.
    real = segment_ids > 0
    first = jnp.where(real, jnp.maximum(starts - source * time, 0), jnp.iinfo(jnp.int32).max)
    return jnp.where(real, positions, -1), segment_ids, first


def merged(a, b):
    """(output, log of the softmax's sum) over two sets of keys, from those over each; the log is inf where nothing is seen."""
    (a, log_a), (b, log_b) = a, b
    log_a, log_b = (jnp.where(x == jnp.inf, -jnp.inf, x) for x in (log_a, log_b))
    peak = jnp.maximum(log_a, log_b)
    empty = peak == -jnp.inf
    level = jnp.where(empty, 0, peak)
    weight_a, weight_b = (jnp.exp(x - level) for x in (log_a, log_b))
    total = jnp.where(empty, 1, weight_a + weight_b)
    out = (a * weight_a[..., None] + b * weight_b[..., None]) / total[..., None]
    return out, jnp.where(empty, jnp.inf, level + jnp.log(total))
