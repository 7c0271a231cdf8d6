"""The parts of a Gated DeltaNet layer between its projections and its output norm, and a step of them, from the other ops."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from qwen35_jax.ops.causal_conv import causal_conv1d
from qwen35_jax.ops.gated_delta import gated_delta_step

WINDOWS = ("conv_q", "conv_k", "conv_v")


def gated_delta_net_step(x, w, state, slots, active, return_states, recurrence="xla"):
    """See `ops.gated_delta_net.gated_delta_net_step`; recurrence: the implementation of `gated_delta_step`."""
    rows = {name: state[name] if slots is None else state[name][slots] for name in WINDOWS}
    (q, k, v), new = convolve(x, w, active.astype(jnp.int32), rows)
    g, beta = gates(x, w)
    options = {"active": active, "return_states": return_states, "implementation": recurrence}
    out, recurrent, *states = gated_delta_step(q, k, v, g, beta, state["recurrent"], slots, **options)
    if slots is not None:
        new = {name: state[name].at[slots].set(rows) for name, rows in new.items()}
    return out, {**new, "recurrent": recurrent}, *states


def gates(x: dict, w: dict) -> tuple[jax.Array, jax.Array]:
    """Log decay and beta [B, T, N] of the projections a and b. In float32: rounding either drifts with the context's length."""
    decay = -jnp.exp(w["A_log"]) * jax.nn.softplus(x["a"].astype(jnp.float32) + w["dt_bias"].astype(jnp.float32))
    return decay, jax.nn.sigmoid(x["b"].astype(jnp.float32))


def convolve(
    x: dict,
    w: dict,
    segment_ids: jax.Array | None,
    rows: dict | None,
    implementation: str | None = None,
    context_axis: str | None = None,
):
    """q, k and v [B, T, heads, width] after their convolutions, and their new windows.

    rows: the windows before, [B, W - 1, heads, width] each; None: zeros. context_axis: as in `causal_conv1d`. One token is
    convolved in one call over all channels; more are not joined, since that would be two more passes over them.
    """
    options = {"implementation": implementation, "context_axis": context_axis}
    convolution = functools.partial(causal_conv1d, segment_ids=segment_ids, **options)
    if x["q"].shape[1] > 1:
        parts = [convolution(x[n[-1]], w[n], state=None if rows is None else rows[n]) for n in WINDOWS]
        return [y for y, _ in parts], {n: window for n, (_, window) in zip(WINDOWS, parts, strict=True)}
    parts = [x["q"], x["k"], x["v"]]
    sizes = [p.shape[2] * p.shape[3] for p in parts]
    flat = jnp.concatenate([p.reshape(*p.shape[:2], -1) for p in parts], axis=-1)
    weight = jnp.concatenate([w[n].reshape(-1, w[n].shape[-1]) for n in WINDOWS])
    state = None
    if rows is not None:
        state = jnp.concatenate([rows[n].reshape(*rows[n].shape[:2], -1) for n in WINDOWS], axis=-1)
    y, window = convolution(flat, weight, state=state)

    def split(a):
        ends = [sum(sizes[: i + 1]) for i in range(2)]
        return [s.reshape(*a.shape[:2], *p.shape[2:]) for s, p in zip(jnp.split(a, ends, axis=-1), parts, strict=True)]

    return split(y), dict(zip(WINDOWS, split(window), strict=True))
