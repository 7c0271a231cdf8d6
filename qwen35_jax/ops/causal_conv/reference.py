"""The convolution one token at a time: slow, obvious, in the widest dtype of its inputs (at least fp32)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen35_jax.ops.segments import segment_index


def causal_conv1d(x, w, *, state=None, segment_ids=None, activation="silu"):
    """As `ops.causal_conv.causal_conv1d`, on any dtype; y comes in the dtype of the computation."""
    batch, time = x.shape[:2]
    width = w.shape[-1]
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    window = jnp.zeros((batch, width - 1, *x.shape[2:]), dtype) if state is None else state.astype(dtype)
    ids = jnp.ones((batch, time), jnp.int32) if segment_ids is None else segment_ids
    per_row = (slice(None),) + (None,) * (x.ndim - 1)
    w = jnp.moveaxis(w, -1, 0).astype(dtype)

    def token(window, inputs):
        x, real, restart = inputs
        window = jnp.where(restart[per_row], 0, window)
        seen = jnp.concatenate([window, x[:, None]], axis=1)
        return jnp.where(real[per_row], seen[:, 1:], window), jnp.sum(seen * w, axis=1)

    restart = jnp.diff(segment_index(ids), axis=1, prepend=0) > 0
    inputs = tuple(jnp.moveaxis(z, 1, 0) for z in (x.astype(dtype), ids != 0, restart))
    window, y = jax.lax.scan(token, window, inputs)
    y = jnp.moveaxis(y, 0, 1)
    return jax.nn.silu(y) if activation == "silu" else y, window
