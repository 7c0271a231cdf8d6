"""Packed documents: `segment_ids` int32 [B, T], non-decreasing over the real tokens, 0 = padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen35_jax.errors import UserError


def segment_index(segment_ids: jax.Array) -> jax.Array:
    """Which document of its row each token is in, from 0: int32 [B, T] -> int32 [B, T].

    A new document starts where the id changes between two non-zero ids; a pad counts with the document before it (or
    with the first one), so that nothing carried along the row is cut by padding.
    """
    latest = jax.lax.cummax(segment_ids, axis=1)
    before = jnp.pad(latest[:, :-1], ((0, 0), (1, 0)))
    starts = (segment_ids != 0) & (before != 0) & (segment_ids != before)
    return jnp.cumsum(starts, axis=1, dtype=jnp.int32)


def segment_positions(segment_ids: jax.Array) -> jax.Array:
    """Positions [B, T] that start again from 0 wherever segment_ids [B, T] change."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    fresh = jnp.concatenate([jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(fresh, index, 0), axis=1)


def segment_ends(segment_ids: jax.Array) -> jax.Array:
    """Index of the last token of each token's own run of equal segment_ids [B, T]: int32 [B, T]."""
    last = segment_ids.shape[1] - 1
    index = jnp.broadcast_to(jnp.arange(last + 1, dtype=jnp.int32), segment_ids.shape)
    closes = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (0, 1)))
    return jax.lax.cummin(jnp.where(closes, index, last), axis=1, reverse=True)


def check_segment_ids(op: str, segment_ids: jax.Array | None, batch: int, time: int) -> None:
    """Raise UserError unless segment_ids is None or an integer array [batch, time]."""
    if segment_ids is None:
        return
    if segment_ids.shape != (batch, time):
        raise UserError(f"{op}: segment_ids has shape {segment_ids.shape}; pass one id per token, {(batch, time)}")
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise UserError(f"{op}: segment_ids has dtype {segment_ids.dtype}; pass integers, 0 for padding")


def check_implementation(op: str, implementation: str | None, available: tuple[str, ...] = ("xla",)) -> None:
    """Raise UserError unless the form exists: an op never falls back to another one silently."""
    if implementation is not None and implementation not in available:
        raise UserError(f"{op}: no {implementation!r} implementation; choose from {', '.join(available)}")


def entering_segment(segment_ids: jax.Array, axis: str) -> jax.Array:
    """Id of the last real token on the shards before this one, 0 where there is none: [B].

    Under `shard_map`, with rows cut over mesh axis `axis` into segment_ids [B, T].
    """
    before = jnp.arange(jax.lax.axis_size(axis)) < jax.lax.axis_index(axis)
    last = jax.lax.all_gather(jnp.max(segment_ids, axis=1), axis)  # ids do not fall: the largest is the last
    return jnp.max(jnp.where(before[:, None], last, 0), axis=0)


def first_segment(segment_ids: jax.Array) -> jax.Array:
    """Id of the first real token of segment_ids [B, T], 0 where there is none: [B]."""
    largest = jnp.iinfo(segment_ids.dtype).max
    first = jnp.min(jnp.where(segment_ids > 0, segment_ids, largest), axis=1)
    return jnp.where(first == largest, 0, first)


def document_starts(segment_ids: jax.Array, axis: str) -> jax.Array:
    """Index in the whole row of the first token of each token's document: int32 [B, T], under `shard_map` as above."""
    time, rank = segment_ids.shape[1], jax.lax.axis_index(axis)
    document = segment_index(jnp.concatenate([entering_segment(segment_ids, axis)[:, None], segment_ids], axis=1))
    opens = document[:, 1:] != document[:, :-1]
    own = jax.lax.cummax(jnp.where(opens, rank * time + jnp.arange(time, dtype=jnp.int32), 0), axis=1)
    last = jax.lax.all_gather(own[:, -1], axis)
    before = jnp.arange(jax.lax.axis_size(axis)) < rank
    return jnp.maximum(own, jnp.max(jnp.where(before[:, None], last, 0), axis=0)[:, None])


def shift_right(x, axis: str, by: int = 1):
    """Each array of x from the shard `by` places before; zeros where there is none."""
    count = jax.lax.axis_size(axis)
    return jax.tree.map(lambda a: jax.lax.ppermute(a, axis, [(i, i + by) for i in range(count - by)]), x)


def from_shard(x, axis: str, rank):
    """Each array of x [B, ...] as shard rank [B] (or one for all rows) has it, on all shards."""
    mine = jnp.broadcast_to(jax.lax.axis_index(axis) == rank, jax.tree.leaves(x)[0].shape[:1])

    def pick(a):
        return jax.lax.psum(jnp.where(mine.reshape(-1, *(1,) * (a.ndim - 1)), a, jnp.zeros((), a.dtype)), axis)

    return jax.tree.map(pick, x)
