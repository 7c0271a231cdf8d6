"""The causal convolution as a sum of shifted products, which XLA fuses into one pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen35_jax.ops.segments import segment_index


def causal_conv1d(x, w, state, segment_ids, activation):
    """See `ops.causal_conv.causal_conv1d`; state is given, in the dtype of x."""
    time, width = x.shape[1], w.shape[-1]
    seen = jnp.concatenate([state, x], axis=1)
    index = None if segment_ids is None or time == 1 else padded_index(segment_ids, width)
    y = 0.0
    for tap in range(width):
        term = seen[:, tap : tap + time].astype(jnp.float32) * w[..., tap].astype(jnp.float32)
        if index is not None and tap < width - 1:
            term = jnp.where(_per_token(index[:, tap : tap + time] == index[:, width - 1 :], x.ndim), term, 0)
        y = y + term
    y = jax.nn.silu(y) if activation == "silu" else y
    return y.astype(x.dtype), last_window(x, state, segment_ids)


def padded_index(segment_ids, width):
    """Document index of every input of `seen`, [B, W - 1 + T]: the state belongs to the first document."""
    return jnp.pad(segment_index(segment_ids), ((0, 0), (width - 1, 0)))


def _per_token(mask, ndim):
    return mask.reshape(*mask.shape, *(1,) * (ndim - 2))


def last_window(x, state, segment_ids):
    """The last W - 1 inputs of each row before its padding, zero where they are of an earlier document."""
    time, early = x.shape[1], state.shape[1]
    if segment_ids is None or time == 1:
        seen = jnp.concatenate([state, x[:, -early:]], axis=1)
        if segment_ids is None:
            return seen[:, -early:]
        return jnp.where(
            _per_token(segment_ids != 0, x.ndim), seen[:, 1:], seen[:, :-1]
        )  # the token was real, or nothing changed
    index, length = padded_index(segment_ids, early + 1), jnp.sum(segment_ids != 0, axis=1)
    window = length[:, None] + jnp.arange(early)  # of the state and x, one after the other; which are not joined for so few rows
    old, new = jnp.minimum(window, early - 1), jnp.clip(window - early, 0, time - 1)
    rows = [jnp.take_along_axis(a, _per_token(at, x.ndim), axis=1) for a, at in ((state, old), (x, new))]
    rows = jnp.where(_per_token(window < early, x.ndim), *rows)
    same = jnp.take_along_axis(index, window, axis=1) == index[:, -1:]
    return jnp.where(_per_token(same, x.ndim), rows, 0)
