"""A step of a Gated DeltaNet layer for TPU, in one kernel: convolutions, gates and the gated delta rule.

The grid and the recurrence are those of `ops/gated_delta/tpu_decode.py`. q, k, v and their windows come as [heads, width], heads
on sublanes, which the convolution works on as it is; what it makes never goes to memory.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from qwen35_jax.errors import UserError
from qwen35_jax.ops.gated_delta.tpu import LANES, supports
from qwen35_jax.ops.gated_delta.tpu_decode import DecodeSpecs, advance, by_block, call, decode_tile
from qwen35_jax.ops.gated_delta.tpu_kernels import Tile

STATE = ("conv_q", "conv_k", "conv_v", "recurrent")


def gated_delta_net_step(x, w, state, slots, active, return_states):
    """See `ops.gated_delta_net.gated_delta_net_step`."""
    q, k, v = x["q"], x["k"], x["v"]
    batch, time, keys, key_width = q.shape
    heads, value_width = v.shape[2:]
    if not supports(key_width, value_width):
        raise UserError(f"gated_delta_net_step: pallas_tpu needs Hk, Hv in multiples of {LANES}, not {key_width}, {value_width}")
    tile = decode_tile(keys, heads, key_width, value_width, normalize=True)
    specs, taps = DecodeSpecs(tile, time), w["conv_q"].shape[-1]
    slots = jnp.arange(batch, dtype=jnp.int32) if slots is None else slots
    gates = by_block(jnp.concatenate([x["a"], x["b"]], axis=1).astype(jnp.float32), tile)
    decays = jnp.stack([w["A_log"], w["dt_bias"].astype(jnp.float32)])[None]
    weights = [jnp.moveaxis(w[name], -1, 0) for name in STATE[:3]]
    windows = [specs.window(taps - 1, "k"), specs.window(taps - 1, "k"), specs.window(taps - 1, "v")]
    inputs = [
        *(specs.keys, specs.keys, specs.values, specs.rows(2 * time), specs.rows(2, shared=True)),
        *(specs.weight(taps, "k"), specs.weight(taps, "k"), specs.weight(taps, "v"), *windows, specs.state),
    ]
    operands = (q, k, v, gates, by_block(decays, tile), *weights, *(state[name] for name in STATE))
    outputs = [specs.values, *windows, specs.state]
    shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype), *(state[name] for name in STATE)]
    if return_states:
        outputs.append(specs.states)
        shapes.append(jax.ShapeDtypeStruct((batch, time, *state["recurrent"].shape[1:]), jnp.float32))
    kernel = functools.partial(_step_kernel, tile, time, taps)
    scalars = slots, active.astype(jnp.int32).reshape(-1)
    first = len(scalars) + len(operands) - len(STATE)
    aliases = {first + i: 1 + i for i in range(len(STATE))}
    out, *new = call(kernel, "gated_delta_net_step", specs, scalars, operands, inputs, outputs, shapes, aliases)
    return out, dict(zip(STATE, new, strict=False)), *new[len(STATE) :]


def _step_kernel(tile: Tile, time: int, taps: int, _, active, *refs):
    """Blocks q, k [T, keys, Hk]; v, out [T, heads, Hv]; gates [2 T, heads], a and b of each token; decays [2, heads], A_log and
    dt_bias; weights [W, heads, width]; windows [W - 1, heads, width]; state [heads, Hk, Hv]; last the states after each token."""
    tokens, (gates, decays), weights, old, (state, out), new_windows, (new, *states) = _grouped(refs, (3, 2, 3, 3, 2, 3))
    raw = gates[...]
    g = -jnp.exp(decays[:1]) * jax.nn.softplus(raw[:time] + decays[1:])
    columns = jnp.concatenate([g, jax.nn.sigmoid(raw[time:])]).T
    windows = [[ref[i].astype(x.dtype) for i in range(taps - 1)] for ref, x in zip(old, tokens, strict=True)]
    for t in range(time):
        on = active[pl.program_id(0) * time + t] != 0
        seen = [[*window, x[t]] for window, x in zip(windows, tokens, strict=True)]
        mixed = [_convolve(inputs, weight) for inputs, weight in zip(seen, weights, strict=True)]
        windows = [
            [jnp.where(on, x, y) for x, y in zip(inputs[1:], window, strict=True)]
            for inputs, window in zip(seen, windows, strict=True)
        ]
        decay = jnp.exp(jnp.where(on, columns[:, t : t + 1], 0))
        beta = jnp.where(on, columns[:, time + t : time + t + 1], 0)
        out[t] = advance(tile, *mixed, decay, beta, state if t == 0 else new, new).astype(out.dtype)
        if states:
            states[0][t] = new[...]
    for ref, window in zip(new_windows, windows, strict=True):
        for i, x in enumerate(window):
            ref[i] = x.astype(ref.dtype)


def _grouped(refs, sizes):
    """The refs in groups of these sizes, and the rest."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [refs[begin:end] for begin, end in zip((0, *ends), (*ends, len(refs)), strict=True)]


def _convolve(seen: list[jax.Array], weight) -> jax.Array:
    """silu(sum of taps) of one token, [heads, width], rounded to the inputs' dtype as the convolution alone would."""
    y = sum(x.astype(jnp.float32) * weight[i].astype(jnp.float32) for i, x in enumerate(seen))
    return (y * jax.nn.sigmoid(y)).astype(seen[0].dtype).astype(jnp.float32)
