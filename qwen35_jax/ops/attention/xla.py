"""Blockwise causal attention in plain XLA; the backward pass recomputes the scores (FlashAttention, arXiv 2205.14135).

A scan over blocks of queries; inside, a loop over the blocks of keys that any of them can see. Letters of the einsums:
b row, k key head, r query head of that key head, t query, s key, h width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from qwen35_jax.ops.segments import segment_index

BLOCK_Q = 256
BLOCK_K = 512


@jax.custom_vjp
def attention(q, k, v, q_positions, segment_ids):
    """See `ops.attention.attention`; q_positions is given."""
    return _attention_fwd(q, k, v, q_positions, segment_ids)[0]


def _attention_fwd(q, k, v, q_positions, segment_ids):
    fetch, block = key_blocks(k, v, segment_ids)
    segments = None if segment_ids is None else _own_segments(segment_ids, q_positions)
    first = _first_seen(segment_ids, q_positions)
    out, log_sum = attend(q, q_positions, segments, k.shape[2], fetch, block, first)
    out = joined(out, q.shape[1]).astype(q.dtype)
    return out, (q, k, v, q_positions, segment_ids, out, log_sum)


def _own_segments(segment_ids, q_positions):
    return jnp.take_along_axis(segment_ids, q_positions, axis=1)


def _block_size(time: int, most: int, packed: bool) -> int:
    """Tokens of a block. Of packed documents an eighth of the sequence, so that there are blocks to leave out, or 128."""
    return min(time, most, max(128, time // 1024 * 128)) if packed else min(time, most)


def _first_seen(segment_ids, q_positions):
    """Index of the first key of each query's document, [B, T]: earlier blocks of keys are left out. None: all one document."""
    if segment_ids is None:
        return None
    document = segment_index(segment_ids)
    opens = jnp.pad(document[:, 1:] != document[:, :-1], ((0, 0), (1, 0)))
    starts = jax.lax.cummax(jnp.where(opens, jnp.arange(document.shape[1]), 0), axis=1)
    return jnp.take_along_axis(starts, q_positions, axis=1)


def attend(q, positions, segments, groups: int, fetch: Callable, block: int, first=None):
    """q [B, T, N, H] over the keys that `fetch` gives (see _attend_block): output and log of the sum, in blocks.

    segments, first [B, T]: no query sees a key of another segment, nor one before `first`; both None: they may see all.
    """

    def body(_, inputs):
        return None, _attend_block(*inputs, fetch, block)

    inputs = (split_heads(_cut(q, first is not None), groups), *_cut_tokens(positions, segments, first))
    return jax.lax.scan(body, None, inputs)[1]


def _cut_tokens(positions, segments, first):
    """Positions, segments and first keys in blocks; the queries that fill up the last block see nothing."""
    if first is None:
        return _cut(positions, False, -1), None, None
    return _cut(positions, True, -1), _cut(segments, True), _cut(first, True, jnp.iinfo(jnp.int32).max)


def _attend_block(q, positions, segments, first, fetch: Callable, block: int):
    """Online softmax of one block of queries over the keys they see.

    q [B, K, R, t, H]; positions, segments, first [B, t] (None: all one document); fetch(j) gives block j of the keys
    as (k, v [B, K, s, H], their indices [s], which of them are new in this block [s], segments [B, s]).
    Returns the output [B, K, R, t, H] and the log of the softmax's sum [B, K, R, t], in fp32.
    """

    def body(j, carry):
        highest, total, out = carry
        k, v, index, fresh, key_segments = fetch(j)
        scores = _scores(q, k, _seen(positions, segments, index, fresh, key_segments))
        peak = jnp.maximum(highest, jnp.max(scores, axis=-1))
        level = jnp.where(peak == -jnp.inf, 0, peak)
        weights = jnp.exp(scores - level[..., None])
        shrink = jnp.exp(highest - level)
        out = out * shrink[..., None] + _einsum("bkrts,bksh->bkrth", weights.astype(v.dtype), v)
        return peak, total * shrink + jnp.sum(weights, axis=-1), out

    zero = jnp.zeros_like(q, dtype=jnp.float32)
    start = (zero[..., 0] - jnp.inf, zero[..., 0], zero)
    highest, total, out = jax.lax.fori_loop(*_blocks_seen(positions, first, block), body, start)
    # A query that sees nothing (padding of the block) gets zeros, and no weights in the backward pass.
    empty = total == 0
    total = jnp.where(empty, 1, total)
    return out / total[..., None], jnp.where(empty, jnp.inf, highest + jnp.log(total))


def _blocks_seen(positions, first, block: int):
    """The blocks of keys from the first to beyond the last that any of the queries sees."""
    return 0 if first is None else jnp.min(first) // block, jnp.max(positions) // block + 1


def _einsum(spec: str, x, y):
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(spec, x, y, precision=precision, preferred_element_type=jnp.float32)


def _scores(q, k, seen):
    scores = _einsum("bkrth,bksh->bkrts", q, k) * q.shape[-1] ** -0.5
    return jnp.where(seen[:, None, None], scores, -jnp.inf)


def _seen(positions, segments, index, fresh, key_segments):
    seen = (index <= positions[..., None]) & fresh
    if segments is not None:
        seen &= segments[..., None] == key_segments[:, None]
    return seen


def key_range(j, block: int, keys: int):
    """Start, indices and which are new of block j of the keys; the last block is moved back to end with the keys."""
    start = jnp.minimum(j * block, keys - block)
    index = start + jnp.arange(block)
    return start, index, index >= j * block


def key_blocks(k, v, segment_ids) -> tuple[Callable, int]:
    """What gives the blocks of k, v [B, T, K, H] (see _attend_block), and the size of one."""
    keys = k.shape[1]
    block = _block_size(keys, BLOCK_K, segment_ids is not None)
    k, v = (jnp.swapaxes(x, 1, 2) for x in (k, v))

    def fetch(j):
        start, index, fresh = key_range(j, block, keys)
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=block)
        segments = None if segment_ids is None else cut(segment_ids, axis=1)
        return cut(k, axis=2), cut(v, axis=2), index, fresh, segments

    return fetch, block


def _cut(x, packed: bool, fill=0):
    """[B, T, ...] -> [blocks, B, t, ...]; the queries that fill up the last block are at -1 and see no key."""
    batch, time = x.shape[:2]
    size = _block_size(time, BLOCK_Q, packed)
    x = jnp.pad(x, ((0, 0), (0, -time % size), *((0, 0),) * (x.ndim - 2)), constant_values=fill)
    return jnp.moveaxis(x.reshape(batch, -1, size, *x.shape[2:]), 1, 0)


def split_heads(q, groups: int):
    """[..., T, N, H] -> [..., K, R, T, H]."""
    q = q.reshape(*q.shape[:-2], groups, q.shape[-2] // groups, q.shape[-1])
    return jnp.moveaxis(q, -4, -2)


def joined(x, time: int):
    """[blocks, B, K, R, t, H] -> [B, T, N, H]."""
    blocks, batch, groups, ratio, size, width = x.shape
    x = jnp.transpose(x, (1, 0, 4, 2, 3, 5)).reshape(batch, blocks * size, groups * ratio, width)
    return x[:, :time]


def _attention_bwd(residuals, d_out):
    q, k, v, q_positions, segment_ids, out, log_sum = residuals
    segments = None if segment_ids is None else _own_segments(segment_ids, q_positions)
    places = q_positions, segments, _first_seen(segment_ids, q_positions)
    zero = jnp.zeros_like(jnp.swapaxes(k, 1, 2), dtype=jnp.float32)
    heads = gradient_heads(q, out, d_out, k.shape[2], segments is not None)
    d_q, d_k, d_v = attend_bwd(heads, places, log_sum, *key_blocks(k, v, segment_ids), (zero, zero))
    d_k, d_v = (jnp.swapaxes(x, 1, 2) for x in (d_k, d_v))
    return joined(d_q, q.shape[1]).astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


def gradient_heads(q, out, d_out, groups: int, packed: bool):
    """q, the gradient of the output, and what the gradient of a softmax needs, sum_s w_s dw_s = out . d_out, in blocks."""
    inner = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1, keepdims=True)
    return [split_heads(_cut(x, packed), groups) for x in (q, d_out.astype(q.dtype), inner)]


def attend_bwd(heads, places, log_sum, fetch: Callable, block: int, d_keys):
    """The gradient of `attend`: that of q, in blocks, and d_keys [B, K, T, H] of k and v with their parts added, in fp32.

    heads: see gradient_heads. places: positions, segments, first. log_sum: of the softmax over all keys, which may be more than
    those of `fetch`.
    """
    tokens = _cut_tokens(*places)

    def body(d_keys, inputs):
        q, d_out, inner, positions, segments, first, log_sum = inputs

        def keys(j, carry):
            d_q, d_k, d_v = carry
            k, v, index, fresh, key_segments = fetch(j)
            scores = _scores(q, k, _seen(positions, segments, index, fresh, key_segments))
            weights = jnp.exp(scores - log_sum[..., None])
            d_weights = _einsum("bkrth,bksh->bkrts", d_out, v)
            d_scores = (weights * (d_weights - inner) * q.shape[-1] ** -0.5).astype(q.dtype)
            d_v = _add_at(d_v, index[0], _einsum("bkrts,bkrth->bksh", weights.astype(v.dtype), d_out))
            d_k = _add_at(d_k, index[0], _einsum("bkrts,bkrth->bksh", d_scores, q))
            return d_q + _einsum("bkrts,bksh->bkrth", d_scores, k), d_k, d_v

        start = (jnp.zeros_like(q, dtype=jnp.float32), *d_keys)
        d_q, *d_keys = jax.lax.fori_loop(*_blocks_seen(positions, first, block), keys, start)
        return tuple(d_keys), d_q

    d_keys, d_q = jax.lax.scan(body, d_keys, (*heads, *tokens, log_sum))
    return d_q, *d_keys


def _add_at(total, start, part):
    """Add part [B, K, s, H] to total [B, K, Tk, H] from key `start` on."""
    old = jax.lax.dynamic_slice_in_dim(total, start, part.shape[2], axis=2)
    return jax.lax.dynamic_update_slice_in_dim(total, old + part, start, axis=2)


attention.defvjp(_attention_fwd, _attention_bwd)
