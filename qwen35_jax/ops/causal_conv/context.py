"""The causal convolution on sequences cut over a mesh axis: each shard's window is the last inputs of the shard before."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from qwen35_jax.errors import UserError
from qwen35_jax.ops.segments import first_segment, from_shard, shift_right


def causal_conv1d(convolve: Callable, x, w, state, segment_ids, activation, axis: str):
    """See `ops.causal_conv.causal_conv1d` with a context_axis; state is given, in the dtype of x. `convolve`: the form of the
    shard's own convolution."""
    halo = w.shape[-1] - 1
    if x.shape[1] < halo:
        raise UserError(f"causal_conv1d: {x.shape[1]} tokens a shard of {axis!r}; pass at least {halo}, or use fewer shards")
    window, rank = shift_right(x[:, -halo:], axis), jax.lax.axis_index(axis)
    if segment_ids is not None:
        same = shift_right(segment_ids[:, -halo:], axis) == first_segment(segment_ids)[:, None]
        window = jnp.where(same.reshape(*same.shape, *(1,) * (x.ndim - 2)), window, 0)
    y, last = convolve(x, w, jnp.where(rank == 0, state, window), segment_ids, activation)
    return y, from_shard(last, axis, _last_with_tokens(segment_ids, axis))


def _last_with_tokens(segment_ids, axis: str):
    """The last shard with real tokens in each row, [B]; the first one where there are none, whose window is the given state."""
    if segment_ids is None:
        return jax.lax.axis_size(axis) - 1
    real = jnp.any(segment_ids > 0, axis=1)
    return jax.lax.pmax(jnp.where(real, jax.lax.axis_index(axis), 0), axis)
