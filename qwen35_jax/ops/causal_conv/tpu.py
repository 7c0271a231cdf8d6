"""The causal convolution for TPU: one pass over memory each way, where XLA makes several (docs/kernels/causal_conv_tpu.md).

Channels lie on lanes and tokens on sublanes, [B, T, C]; a grid step is a block of tokens of some channels, with the few tokens
before it (and, for the gradient, after it) as blocks of their own, so that nothing is carried from step to step. Which
inputs belong to a token's document is `reach` [B, T, 128]: to how many tokens before it the token may look, on all lanes.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen35_jax.errors import UserError
from qwen35_jax.ops.causal_conv.xla import last_window, padded_index

LANES, SUBLANES = 128, 8
EDGE = 16  # tokens of the blocks beside a block: the rows of a register in bfloat16
TOKENS, CHANNELS, ROWS = 512, 512, 128  # of a block, at most; tokens worked on at a time, whose intermediates fit into registers


def causal_conv1d(x, w, state, segment_ids, activation):
    """See `ops.causal_conv.causal_conv1d`; state is given, in the dtype of x."""
    shape, taps = x.shape, w.shape[-1]
    x, state = (a.reshape(*a.shape[:2], -1) for a in (x, state))
    if x.shape[2] % LANES or taps > SUBLANES:
        needs = f"channels in multiples of {LANES}, at most {SUBLANES} taps"
        raise UserError(f"causal_conv1d: pallas_tpu needs {needs}, not {x.shape[2]} channels, {taps} taps; use xla")
    weight = jnp.pad(w.reshape(-1, taps).astype(jnp.float32).T[::-1], ((0, SUBLANES - taps), (0, 0)))
    y = _convolution(taps, activation == "silu", x, weight, state, _reach(segment_ids, shape, taps))
    window = last_window(x, state, segment_ids)
    return y.reshape(shape), window.reshape(window.shape[0], -1, *shape[2:])


def _reach(segment_ids, shape, taps):
    """To how many tokens before it each token may look, [B, T, 128] bf16; the state belongs to the first document."""
    if segment_ids is None:
        return jnp.full((*shape[:2], LANES), taps - 1, jnp.bfloat16)
    index, time = padded_index(segment_ids, taps), shape[1]
    same = sum(index[:, i : i + time] == index[:, taps - 1 :] for i in range(taps - 1))
    return jnp.broadcast_to(same.astype(jnp.bfloat16)[..., None], (*shape[:2], LANES))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _convolution(taps, silu, x, w, state, reach):
    """x [B, T, C], w [8, C] float32, the tap of distance d in row d, state [B, W - 1, C] -> y [B, T, C]."""
    time = x.shape[1]
    x, state, reach = _blocks(x, state, reach)
    specs = _Specs(x.shape, backward=False)
    inputs = [specs.tokens, specs.before, specs.first, specs.reach, specs.weight]
    kernel = functools.partial(_forward_kernel, taps, silu)
    return _call(kernel, specs, "causal_conv", (x, x, state, reach, w), inputs, [specs.tokens], [x])[0][:, :time]


def _convolution_forward(taps, silu, x, w, state, reach):
    return _convolution(taps, silu, x, w, state, reach), (x, w, state, reach)


def _convolution_backward(taps, silu, residuals, dy):
    x, w, state, reach = residuals
    early = functools.partial(_early, taps, silu, x[:, : taps - 1], w, reach)
    d_state = jax.vjp(early, state)[1](dy[:, : taps - 1])[0]
    time = x.shape[1]
    (x, state, reach), dy = _blocks(x, state, reach), _padded(dy)
    specs = _Specs(x.shape, backward=True)
    inputs = [specs.tokens, specs.before, specs.after, specs.first, specs.reach, specs.reach_after, specs.weight]
    inputs += [specs.tokens, specs.after]
    kernel = functools.partial(_backward_kernel, taps, silu)
    like = [x, jax.ShapeDtypeStruct((x.shape[0], *w.shape), jnp.float32)]
    operands = (x, x, x, state, reach, reach, w, dy, dy)
    dx, dw = _call(kernel, specs, "causal_conv_gradient", operands, inputs, [specs.tokens, specs.d_weight], like)
    return dx[:, :time], dw.sum(0), d_state, None


_convolution.defvjp(_convolution_forward, _convolution_backward)


def _early(taps, silu, x, w, reach, state):
    """y of the first tokens, those that see the state: x [B, up to W - 1, C]."""
    seen, count = jnp.concatenate([state, x], axis=1).astype(jnp.float32), x.shape[1]
    terms = [jnp.where(reach[:, :count, :1] >= d, seen[:, taps - 1 - d : taps - 1 - d + count] * w[d], 0) for d in range(taps)]
    return _activation(silu, sum(terms)).astype(x.dtype)


def _activation(silu: bool, x: jax.Array) -> jax.Array:
    return 0.5 * x * (1 + jnp.tanh(0.5 * x)) if silu else x  # one transcendental instead of an exponential and a division


def _slope(silu: bool, x: jax.Array) -> jax.Array | float:
    """The derivative of `_activation`."""
    if not silu:
        return 1.0
    sigmoid = 0.5 * (1 + jnp.tanh(0.5 * x))
    return sigmoid * (1 + x * (1 - sigmoid))


def _padded(x: jax.Array) -> jax.Array:
    """[B, T, C] filled up to whole blocks of tokens with zeros."""
    time = x.shape[1]
    tokens = -(-time // EDGE) * EDGE if time <= ROWS else min(TOKENS, -(-time // ROWS) * ROWS)
    return jnp.pad(x, ((0, 0), (0, -time % tokens), (0, 0)))


def _blocks(x, state, reach):
    """The operands as the kernels take them: whole blocks of tokens, the state as the last of EDGE tokens."""
    return _padded(x), jnp.pad(state, ((0, 0), (EDGE - state.shape[1], 0), (0, 0))), _padded(reach)


class _Specs:
    """Blocks of the arrays on the grid (row, block of channels, block of tokens)."""

    def __init__(self, shape: tuple[int, ...], backward: bool):
        batch, time, width = shape
        tokens = time if time <= ROWS else max(n for n in range(ROWS, TOKENS + 1, ROWS) if time % n == 0)
        channels = max(n for n in range(LANES, CHANNELS + 1, LANES) if width % n == 0)
        self.grid, self.backward = (batch, width // channels, time // tokens), backward
        edges, last = tokens // EDGE, time // EDGE - 1

        def before(t):
            return jnp.maximum(t * edges - 1, 0)

        def after(t):
            return jnp.minimum((t + 1) * edges, last)

        self.tokens = pl.BlockSpec((None, tokens, channels), lambda b, c, t: (b, t, c))
        self.before = pl.BlockSpec((None, EDGE, channels), lambda b, c, t: (b, before(t), c))
        self.after = pl.BlockSpec((None, EDGE, channels), lambda b, c, t: (b, after(t), c))
        self.first = pl.BlockSpec((None, EDGE, channels), lambda b, c, t: (b, 0, c))
        self.reach = pl.BlockSpec((None, tokens, LANES), lambda b, c, t: (b, t, 0))
        self.reach_after = pl.BlockSpec((None, EDGE, LANES), lambda b, c, t: (b, after(t), 0))
        self.weight = pl.BlockSpec((SUBLANES, channels), lambda b, c, t: (0, c))
        self.d_weight = pl.BlockSpec((None, SUBLANES, channels), lambda b, c, t: (b, 0, c))


def _call(kernel, specs: _Specs, name: str, operands, inputs, outputs, like):
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in like]
    passes = 3 if specs.backward else 2
    return pl.pallas_call(
        kernel,
        grid=specs.grid,
        in_specs=inputs,
        out_specs=outputs,
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary" if specs.backward else "parallel")
        ),
        cost_estimate=pl.CostEstimate(
            flops=passes * 10 * like[0].size,
            bytes_accessed=passes * like[0].size * like[0].dtype.itemsize,
            transcendentals=like[0].size,
        ),
        name=name,
    )(*operands)


def _pieces(ref):
    """(tokens, lanes) of each piece that is worked on by itself."""
    tokens, channels = ref.shape
    rows = min(ROWS, tokens)
    for lane in range(0, channels, LANES):
        for row in range(0, tokens, rows):
            yield slice(row, row + rows), slice(lane, lane + LANES)


def _read(ref, rows: slice, lanes: slice) -> jax.Array:
    return ref[rows, lanes].astype(jnp.float32)


def _above(first, before, x, rows: slice, lanes: slice) -> jax.Array:
    """The EDGE tokens before a piece; before the first block's first piece stands the state."""
    if rows.start:
        return _read(x, slice(rows.start - EDGE, rows.start), lanes)
    return jnp.where(pl.program_id(2) == 0, _read(first, slice(None), lanes), _read(before, slice(None), lanes))


def _below(after, x, rows: slice, lanes: slice) -> jax.Array:
    """The EDGE tokens after a piece."""
    if rows.stop < x.shape[0]:
        return _read(x, slice(rows.stop, rows.stop + EDGE), lanes)
    return _read(after, slice(None), lanes)


def _sum_of_taps(taps: int, seen, reach, w, lanes: slice) -> jax.Array:
    """seen [EDGE + R, 128], the tokens and those before them -> the sum before the activation, [R, 128]."""
    total = seen[EDGE:] * w[0:1, lanes]
    for d in range(1, taps):
        total += jnp.where(reach >= d, seen[EDGE - d : -d] * w[d : d + 1, lanes], 0)
    return total


def _forward_kernel(taps: int, silu: bool, x, before, first, reach, w, y):
    """Blocks x, y [tokens, channels]; before, first [EDGE, channels]; reach [tokens, 128]; w [8, channels]."""
    for rows, lanes in _pieces(x):
        seen = jnp.concatenate([_above(first, before, x, rows, lanes), _read(x, rows, lanes)])
        total = _sum_of_taps(taps, seen, _read(reach, rows, slice(None)), w, lanes)
        y[rows, lanes] = _activation(silu, total).astype(y.dtype)


def _backward_kernel(taps: int, silu: bool, x, before, after, first, reach, reach_after, w, dy, dy_after, dx, dw):
    """As the forward kernel, with what follows the block; dw [8, channels] is summed over the blocks of tokens.

    A token's gradient comes from up to W - 1 tokens after it, whose sums before the activation are made again.
    """

    @pl.when(pl.program_id(2) == 0)
    def _():
        dw[...] = jnp.zeros(dw.shape, dw.dtype)

    is_last = pl.program_id(2) == pl.num_programs(2) - 1
    for rows, lanes in _pieces(x):
        count = rows.stop - rows.start
        seen = [_above(first, before, x, rows, lanes), _read(x, rows, lanes), _below(after, x, rows, lanes)]
        seen, every = jnp.concatenate(seen), slice(None)
        reaches = jnp.concatenate([_read(reach, rows, every), _below(reach_after, reach, rows, every)])
        total = _sum_of_taps(taps, seen, reaches, w, lanes)
        d_after = _below(dy_after, dy, rows, lanes)
        if rows.stop == x.shape[0]:
            d_after = jnp.where(is_last, 0, d_after)
        d_total = jnp.concatenate([_read(dy, rows, lanes), d_after]) * _slope(silu, total)
        d_tokens, d_weight = d_total[:count] * w[0:1, lanes], [jnp.sum(d_total[:count] * seen[EDGE:-EDGE], axis=0, keepdims=True)]
        for d in range(1, taps):
            part = jnp.where(reaches >= d, d_total, 0)
            d_tokens += part[d : d + count] * w[d : d + 1, lanes]
            d_weight.append(jnp.sum(part[:count] * seen[EDGE - d : EDGE - d + count], axis=0, keepdims=True))
        dx[rows, lanes] = d_tokens.astype(dx.dtype)
        zeros = jnp.zeros((SUBLANES - taps, LANES), jnp.float32)
        dw[:, lanes] += jnp.concatenate([*d_weight, zeros])
