"""Depthwise causal convolution over time, with the window of raw inputs that the next call continues from."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen35_jax.errors import UserError
from qwen35_jax.ops.causal_conv import context, tpu, xla
from qwen35_jax.ops.segments import check_implementation, check_segment_ids

ACTIVATIONS = (None, "silu")
FORMS = {"xla": xla.causal_conv1d, "pallas_tpu": tpu.causal_conv1d}


def causal_conv1d(
    x: jax.Array,
    w: jax.Array,
    *,
    state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    activation: str | None = "silu",
    implementation: str | None = None,
    context_axis: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """y_t = act(sum_j w[..., j] x_{t - W + 1 + j}), each channel by itself; W = 4 as published.

    The last tap, w[..., W - 1], is the current token's.

    Args:
      x: [B, T, *ch]; w: [*ch, W]. ch is any number of axes, e.g. heads and width.
      state: [B, W - 1, *ch], the raw inputs before x, oldest first; None means zeros. It belongs to the first segment.
      segment_ids: int32 [B, T], non-decreasing, 0 = padding at the end of a row. No token sees another segment.
      activation: "silu" or None.
      implementation: None (xla), "xla" or "pallas_tpu" (channels in multiples of 128).
      context_axis: under `shard_map`, the mesh axis over which T is cut; each shard has the next T tokens. The state is that
        before the first shard, and the new one that after the last with real tokens, on all shards.

    Returns:
      y [B, T, *ch] in x.dtype (computed in fp32), and the new state [B, W - 1, *ch] in x.dtype: the last raw inputs
      before the padding, zero where they belong to another segment than the last one. A row of padding alone keeps its
      state. Differentiable in x, w and state.

    Raises:
      UserError: shapes that do not fit together, or an activation or implementation that does not exist.
    """
    check_implementation("causal_conv1d", implementation, tuple(FORMS))
    if activation not in ACTIVATIONS:
        raise UserError(f"causal_conv1d: no activation {activation!r}; choose 'silu' or None")
    if x.ndim < 3 or w.shape[:-1] != x.shape[2:]:
        raise UserError(f"causal_conv1d: x is {x.shape} and w is {w.shape}; pass x [B, T, *ch] and w [*ch, W]")
    expected = (x.shape[0], w.shape[-1] - 1, *x.shape[2:])
    if state is not None and state.shape != expected:
        raise UserError(f"causal_conv1d: state has shape {state.shape}; pass the last inputs, {expected}")
    check_segment_ids("causal_conv1d", segment_ids, *x.shape[:2])
    if state is None:
        state = jnp.zeros_like(x, shape=expected)
    convolve = FORMS[implementation or "xla"]
    if context_axis is not None:
        return context.causal_conv1d(convolve, x, w, state.astype(x.dtype), segment_ids, activation, context_axis)
    return convolve(x, w, state.astype(x.dtype), segment_ids, activation)
