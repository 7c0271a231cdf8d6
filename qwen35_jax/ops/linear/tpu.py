"""`linear` with weights in FP8 for TPU, kept so or trained so: the weight is read in 8 bits and becomes wider in VMEM only.

Grid (column tile, row tile, step of the sum). `docs/kernels/fp8_tpu.md` explains the tiling.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen35_jax.errors import UserError
from qwen35_jax.ops.fp8 import Fp8Activation, Fp8Operand, Fp8Weight
from qwen35_jax.ops.fp8 import tpu as fp8
from qwen35_jax.ops.fp8.tpu import BLOCK, Tile
from qwen35_jax.ops.linear.fp8 import linear_fp8
from qwen35_jax.ops.linear.quantized import check_summed, straight_through
from qwen35_jax.ops.linear.xla import axes_of, check_operands, linear_xla


def linear_tpu(x: jax.Array | Fp8Activation, w: Fp8Weight | Fp8Operand, spec: str, out_dtype) -> jax.Array:
    """See `qwen35_jax.ops.linear.linear`. Where w is in FP8, or trained so, x is bfloat16 or float32, or an `Fp8Activation` of
    such; other weights are left to XLA's own products."""
    plain = x.x if isinstance(x, Fp8Activation) else x
    if not isinstance(w, Fp8Weight | Fp8Operand):
        return linear_xla(x, w, spec, out_dtype)
    if plain.dtype not in (jnp.bfloat16, jnp.float32):
        raise UserError(f"linear: pallas_tpu multiplies bfloat16 or float32 by weights in FP8, not {plain.dtype}")
    if isinstance(w, Fp8Operand):
        check_operands(plain, w.value, spec)
        return linear_fp8(x, w, spec, out_dtype or plain.dtype, _training_dot)
    check_operands(plain, w.values, spec)
    check_summed(x.scales.shape[-1] if isinstance(x, Fp8Activation) else None, w, spec)
    out_dtype, w = jnp.dtype(out_dtype or plain.dtype), jax.lax.stop_gradient(w)
    if isinstance(x, Fp8Activation):
        return _product(spec, out_dtype, plain, (x.values, x.scales), w)
    return _product(spec, out_dtype, plain, None, w)


@straight_through
def _product(spec: str, out_dtype, x: jax.Array, quantized: tuple | None, w: Fp8Weight) -> jax.Array:
    x_axes, w_axes, _ = axes_of(spec)
    count = sum(a in x_axes for a in w_axes)
    lead, outs = x.shape[: x.ndim - count], w.values.shape[count:]
    if 0 in lead or 0 in outs:
        return jnp.zeros((*lead, *outs), out_dtype)
    values, scales, padded = fp8.whole_blocks(w, count)
    rows = fp8.rows_of(quantized[0] if quantized else x, count)
    many = quantized is None and rows.shape[0] >= fp8.MANY_ROWS
    tile = fp8.make_tile(*rows.shape, values.shape[1], x.dtype.itemsize if many else 0)
    row_scales = fp8.row_scales(Fp8Activation(x, *quantized), count, tile) if quantized else None
    y = _call(tile, many, rows, row_scales, values, scales, out_dtype)
    return y.reshape(*lead, *padded)[..., : outs[-1]]


def _training_dot(out_dtype, a: tuple, a_side: int, b: tuple, b_side: int) -> jax.Array:
    """`block_dot` of ops/fp8/training.py for operands that no mesh cuts: [1, rows, 1, columns] -> [1, rows, 1, columns].

    Summed over rows (the gradient of w) both have a scale per column; else b has one per 128x128. What does not lie as the
    kernel reads it is turned first, in 8 bits.
    """
    if any(n != 1 for operand in (a, b) for n in operand[0].shape[::2]):
        raise UserError("linear: pallas_tpu trains one device's shard of a weight in FP8; call it inside shard_map, or use xla")
    (x, x_scales), (w, scales) = (tuple(v[0, :, 0] for v in operand) for operand in (a, b))
    shape = x.shape[1 - a_side], w.shape[1 - b_side]
    if a_side == 0:
        x, x_scales = x.T, x_scales.T
    if b_side == 1:
        w, scales = w.T, scales.T
    x, w = (jnp.pad(v, [(0, -n % BLOCK) for n in v.shape]) for v in (x, w))
    x_scales = jnp.pad(x_scales.astype(jnp.float32), ((0, x.shape[0] - shape[0]), (0, 0)))
    tile, scales = fp8.make_tile(*x.shape, w.shape[1]), scales.astype(jnp.float32)
    if a_side == 0:
        scales = fp8.scale_rows(jnp.pad(scales, ((0, 0), (0, w.shape[1] - shape[1]))), tile)
    y = _call(tile, False, x, fp8.scale_rows(x_scales.T, tile), w, scales, out_dtype)
    return y[None, : shape[0], None, : shape[1]]


def _call(tile: Tile, many: bool, x, row_scales, w, scales, out_dtype) -> jax.Array:
    """x [M, in] times w [in, out] -> [M, out]. scales: [in / 128, out / 128], or `fp8.scale_rows` of [in / 128, out]."""
    (rows, terms), columns = x.shape, w.shape[1]
    grid = (columns // tile.columns, pl.cdiv(rows, tile.rows), tile.steps)

    def w_index(n, m, k):  # where the dequantised weight is kept, nothing is read again
        return jnp.where(m == 0, k, tile.steps - 1) if many else k, n

    in_specs = [
        pl.BlockSpec((tile.rows, tile.terms), lambda n, m, k: (m, k)),
        pl.BlockSpec((tile.terms, tile.columns), w_index),
        pl.BlockSpec(memory_space=pltpu.SMEM),
    ]
    of_columns = scales.ndim == 3
    if of_columns:
        in_specs[2] = pl.BlockSpec((None, fp8.SUBLANES, tile.columns), lambda n, m, k: (k, 0, n))
    operands, scratch = [x, w, scales], [fp8.float32_scratch((tile.rows, tile.columns))]
    if row_scales is not None:
        in_specs.append(pl.BlockSpec((None, fp8.SUBLANES, tile.rows), lambda n, m, k: (k, 0, m)))
        operands.append(row_scales)
    if many:
        scratch.append(pltpu.VMEM((tile.steps, tile.terms, tile.columns), x.dtype))
    out = jax.ShapeDtypeStruct((rows, columns), out_dtype)
    kernel = _many_rows_kernel if many else functools.partial(_kernel, row_scales is not None, of_columns)
    return pl.pallas_call(
        functools.partial(kernel, tile),
        grid=grid,
        in_specs=in_specs,
        out_specs=pl.BlockSpec((tile.rows, tile.columns), lambda n, m, k: (m, n)),
        out_shape=out,
        scratch_shapes=scratch,
        compiler_params=fp8.compiler_params("parallel", "arbitrary" if many else "parallel", "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * terms * columns,
            bytes_accessed=x.size * x.dtype.itemsize * grid[0] + w.size * (1 if many else grid[1]) + math.prod(out.shape) * 4,
            transcendentals=0,
        ),
        name=f"fp8_linear_{'gradients' if of_columns else fp8.variant(many, row_scales is not None)}",
    )(*operands)


def _scale(tile: Tile, scales_ref, n, k):
    def scale(a: int, b: int):
        return scales_ref[k * tile.blocks + a, n * (tile.columns // BLOCK) + b]

    return scale


def _column_scale(scales_ref):
    """A scale a column: [1, 128] of a block of columns."""
    return lambda a, b: scales_ref[a : a + 1, fp8.block(b)]


def _kernel(quantized: bool, of_columns: bool, tile: Tile, x_ref, w_ref, scales_ref, *refs):
    """One step of the sum of a tile; float32 sums in VMEM until the last."""
    row_scales_ref = refs[0] if quantized else None
    out_ref, total_ref = refs[-2:]
    n, k = pl.program_id(0), pl.program_id(2)

    @pl.when(k == 0)
    def _():
        total_ref[...] = jnp.zeros_like(total_ref)

    scale = _column_scale(scales_ref) if of_columns else _scale(tile, scales_ref, n, k)
    fp8.promote(tile, x_ref, row_scales_ref, w_ref, scale, total_ref)

    @pl.when(k == tile.steps - 1)
    def _():
        out_ref[...] = total_ref[...].astype(out_ref.dtype)


def _many_rows_kernel(tile: Tile, x_ref, w_ref, scales_ref, out_ref, total_ref, panel_ref):
    """The same with the weight's columns dequantised for the first tile of rows and kept for the others."""
    n, m, k = (pl.program_id(i) for i in range(3))

    @pl.when(m == 0)
    def _():
        fp8.dequantize(tile, w_ref, _scale(tile, scales_ref, n, k), panel_ref.at[k])

    part = fp8.dot(x_ref[...], panel_ref[k])

    @pl.when(k == 0)
    def _():
        total_ref[...] = part

    @pl.when(k > 0)
    def _():
        total_ref[...] += part

    @pl.when(k == tile.steps - 1)
    def _():
        out_ref[...] = total_ref[...].astype(out_ref.dtype)
