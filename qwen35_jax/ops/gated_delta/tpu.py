"""The gated delta rule for TPU: shapes, blocks and gradient around the kernels of `tpu_kernels.py` and `tpu_backward.py`.

q, k and v are read as [B, T, heads * width], so that a head is a whole number of registers wide and a chunk of it needs
no transposition; g and beta as [B, N, T], one row a head. `docs/kernels/gated_delta_tpu.md` explains the tiling.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen35_jax.errors import UserError
from qwen35_jax.ops.gated_delta.gates import gates_of, padded
from qwen35_jax.ops.gated_delta.kept import INVERSE, STATES, UPDATES
from qwen35_jax.ops.gated_delta.tpu_backward import backward_kernel
from qwen35_jax.ops.gated_delta.tpu_kernels import CHUNK, Tile, forward_kernel

LANES = 128  # widths are multiples of it
# Most value heads of a grid step, forward and backward: enough independent products to hide the latency of each. Products
# in float32 are six each, which hide their own latency and take the compiler minutes for 16 heads.
HEADS = {"bfloat16": (16, 8), "float32": (4, 4)}
VMEM_BYTES = 48 * 2**20  # of 64 MiB (v5p, v7x) or 128 MiB; float32 needs most of it


def supports(key_width: int, value_width: int) -> bool:
    """Whether heads of these widths can be run."""
    return key_width % LANES == 0 and value_width % LANES == 0


def gated_delta_rule(q, k, v, g, beta, initial_state, segment_ids, normalize_qk):
    """See `ops.gated_delta.gated_delta_rule`. Products take operands in bfloat16 where q, k and v all are, else in float32."""
    batch, time, keys, key_width = q.shape
    heads, value_width = v.shape[2:]
    if not supports(key_width, value_width):
        raise UserError(f"gated_delta_rule: pallas_tpu needs Hk, Hv in multiples of {LANES}, not {key_width}, {value_width}")
    dtype = jnp.bfloat16 if q.dtype == k.dtype == v.dtype == jnp.bfloat16 else jnp.float32
    whole = Tile(keys, heads // keys, key_width, value_width, normalize_qk)
    g, beta = (padded(jnp.swapaxes(x, 1, 2), 2, CHUNK) for x in gates_of(g, beta, segment_ids))
    tokens = (padded(x.reshape(batch, time, -1).astype(dtype), 1, CHUNK) for x in (q, k, v))
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, key_width, value_width), jnp.float32)
    out, final = _rule(*tokens, g, beta, initial_state.astype(jnp.float32), whole)
    out = out[:, :time].reshape(v.shape).astype(v.dtype)
    return jax.lax.optimization_barrier(out), final  # else XLA lays heads out anew behind the norm's cast to float32, twice


def _tile(whole: Tile, most: int) -> Tile:
    """The largest whole number of key heads that divides all and has at most so many value heads; at least one."""
    fits = [n for n in range(1, whole.keys + 1) if whole.keys % n == 0 and n * whole.group <= most]
    return dataclasses.replace(whole, keys=max(fits, default=1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _rule(q, k, v, g, beta, initial_state, whole: Tile):
    return _forward(q, k, v, g, beta, initial_state, whole, save=False)


def _rule_fwd(q, k, v, g, beta, initial_state, whole: Tile):
    out, final, *saved = _forward(q, k, v, g, beta, initial_state, whole, save=True)
    saved = [checkpoint_name(x, name) for x, name in zip(saved, (STATES, INVERSE, UPDATES), strict=True)]
    return (out, final), (q, k, v, g, beta, *saved)


def _forward(q, k, v, g, beta, initial_state, whole: Tile, save: bool):
    """out, final state and, to save for the gradient, states, inverses and updates."""
    tile = _tile(whole, HEADS[v.dtype.name][0])
    specs = _Specs(tile, q.shape[1] // CHUNK, backwards=False)
    outputs, shapes = [specs.values, specs.state], [v, initial_state]
    if save:
        outputs += [specs.chunk(tile.key_width, tile.value_width), specs.chunk(CHUNK, CHUNK), specs.values]
        chunks = (q.shape[0], specs.chunks, whole.heads)
        shapes += [jax.ShapeDtypeStruct((*chunks, *size), v.dtype) for size in (initial_state.shape[2:], (CHUNK, CHUNK))]
        shapes.append(v)
    square = pltpu.VMEM((tile.heads, CHUNK, CHUNK), v.dtype)
    scratch = [_scratch(tile.heads, tile.key_width, tile.value_width), _scratch(tile.heads, CHUNK, CHUNK), square]
    if not save:
        scratch.insert(0, square)
    inputs = [specs.keys, specs.keys, specs.values, specs.gates, specs.gates, specs.state]
    operands = (q, k, v, specs.blocked(g), specs.blocked(beta), initial_state)
    return _call(forward_kernel, specs, operands, inputs, outputs, shapes, scratch)


def _rule_bwd(whole: Tile, residuals, cotangents):
    """Gradients of q, k, v, g, beta and initial_state."""
    q, k, v, g, beta, *saved = residuals
    d_out, d_final = cotangents
    tile = _tile(whole, HEADS[v.dtype.name][1])
    specs = _Specs(tile, q.shape[1] // CHUNK, backwards=True)
    tokens = [specs.keys, specs.keys, specs.values, specs.gates, specs.gates]
    states = [specs.chunk(tile.key_width, tile.value_width), specs.chunk(CHUNK, CHUNK), specs.values]
    scratch = [
        _scratch(tile.heads, tile.key_width, tile.value_width),
        _scratch(tile.heads, CHUNK, CHUNK),
        _scratch(tile.heads, CHUNK, CHUNK),
        _scratch(tile.keys, 2 * CHUNK, CHUNK),
        pltpu.VMEM((tile.heads, 2 * CHUNK, tile.value_width), v.dtype),
        _scratch(tile.keys, 2 * CHUNK, tile.key_width),
        _scratch(CHUNK, 2 * tile.heads),
        _scratch(2 * tile.heads, CHUNK),
    ]
    arguments = (q, k, v, specs.blocked(g), specs.blocked(beta))
    operands, inputs = (*arguments, *saved, d_out, d_final), [*tokens, *states, specs.values, specs.state]
    gradients = _call(backward_kernel, specs, operands, inputs, [*tokens, specs.state], [*arguments, d_final], scratch)
    return tuple(x.reshape(y.shape) for x, y in zip(gradients, (q, k, v, g, beta, d_final), strict=True))


_rule.defvjp(_rule_fwd, _rule_bwd)


class _Specs:
    """Blocks of the arrays on the grid (batch, head block, chunk); chunks come last first where `backwards`."""

    def __init__(self, tile: Tile, chunks: int, backwards: bool):
        def at(m):
            return chunks - 1 - m if backwards else m

        heads = tile.heads
        self.chunks, self.tile, self.at = chunks, tile, at
        self.keys = pl.BlockSpec((None, CHUNK, tile.keys * tile.key_width), lambda b, h, m: (b, at(m), h))
        self.values = pl.BlockSpec((None, CHUNK, heads * tile.value_width), lambda b, h, m: (b, at(m), h))
        self.gates = pl.BlockSpec((None, None, heads, CHUNK), lambda b, h, m: (b, h, 0, at(m)))
        self.state = pl.BlockSpec((None, heads, tile.key_width, tile.value_width), lambda b, h, m: (b, h, 0, 0))

    def blocked(self, x: jax.Array) -> jax.Array:
        """[B, N, T] -> [B, blocks, heads, T]: a block's rows must be all of an axis, or a multiple of eight."""
        return x.reshape(x.shape[0], -1, self.tile.heads, x.shape[2])

    def chunk(self, rows: int, columns: int) -> pl.BlockSpec:
        """One matrix a head and chunk, [B, M, N, rows, columns]."""
        return pl.BlockSpec((None, None, self.tile.heads, rows, columns), lambda b, h, m: (b, self.at(m), h, 0, 0))


def _scratch(*shape: int):
    return pltpu.VMEM(shape, jnp.float32)


def _call(kernel, specs: _Specs, operands, inputs, outputs, like, scratch):
    """`like`: arrays, or shapes, of the outputs' shapes and dtypes."""
    batch, blocks = operands[3].shape[:2]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like]
    steps, tile = batch * blocks * specs.chunks * specs.tile.heads, specs.tile
    rows = 25 if kernel is backward_kernel else 17  # products of a chunk's rows with a square matrix, about
    return pl.pallas_call(
        functools.partial(kernel, tile),
        grid=(batch, blocks, specs.chunks),
        in_specs=inputs,
        out_specs=outputs,
        out_shape=shapes,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=steps * rows * 2 * CHUNK**2 * tile.value_width,
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in (*operands, *shapes)),
            transcendentals=steps * CHUNK**2,
        ),
        name=f"gated_delta_{kernel.__name__}",
    )(*operands)
