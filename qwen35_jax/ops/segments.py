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
