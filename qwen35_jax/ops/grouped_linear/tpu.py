"""`grouped_linear` with weights in FP8 for TPU: a row tile is visited once for each group that has rows in it.

Grid (column tile, visit, step of the sum); which tile and which group a visit is for is worked out ahead and prefetched. Groups
without rows are not visited: their weights are not read. `docs/kernels/fp8_tpu.md` explains the tiling.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen35_jax.errors import UserError
from qwen35_jax.ops.fp8 import Fp8Activation, Fp8Weight
from qwen35_jax.ops.fp8 import tpu as fp8
from qwen35_jax.ops.fp8.tpu import BLOCK, Tile
from qwen35_jax.ops.grouped_linear.quantized import check_quantized
from qwen35_jax.ops.grouped_linear.xla import rows_gradient


def grouped_linear_tpu(x: jax.Array | Fp8Activation, w: Fp8Weight, group_sizes: jax.Array) -> jax.Array:
    """See `qwen35_jax.ops.grouped_linear.grouped_linear`; w is an `Fp8Weight` [E, in, out], x [R, in] is bfloat16, float32 or an
    `Fp8Activation` of them."""
    plain = x.x if isinstance(x, Fp8Activation) else x
    if not isinstance(w, Fp8Weight) or plain.dtype not in (jnp.bfloat16, jnp.float32):
        kinds = f"{plain.dtype} by {type(w).__name__}"
        raise UserError(f"grouped_linear: pallas_tpu multiplies bfloat16 or float32 by Fp8Weights, not {kinds}")
    check_quantized(x, w, group_sizes)
    quantized = (x.values, x.scales) if isinstance(x, Fp8Activation) else None
    return _product(plain, quantized, jax.lax.stop_gradient(w), group_sizes)


@jax.custom_vjp
def _product(x: jax.Array, quantized: tuple | None, w: Fp8Weight, group_sizes: jax.Array) -> jax.Array:
    rows, outs = x.shape[0], w.values.shape[2]
    if 0 in x.shape or 0 in w.values.shape:
        return jnp.zeros((rows, outs), x.dtype)
    values, scales, _ = fp8.whole_blocks(w, 1, lead=1)
    operand = fp8.rows_of(quantized[0] if quantized else x, 1)
    many = quantized is None and rows >= fp8.MANY_ROWS
    tile = fp8.make_tile(*operand.shape, values.shape[2], x.dtype.itemsize if many else 0)
    row_scales = fp8.row_scales(Fp8Activation(x, *quantized), 1, tile) if quantized else None
    return _call(tile, many, operand, row_scales, values, scales, group_sizes, x.dtype)[:, :outs]


def _product_forward(x, quantized, w, group_sizes):
    return _product(x, quantized, w, group_sizes), (x, w, group_sizes)


def _product_backward(residuals, dy):
    return rows_gradient(*residuals, dy), None, None, None


_product.defvjp(_product_forward, _product_backward)


def visits(group_sizes: jax.Array, rows: int, tile_rows: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(count [], tiles [V], groups [V], starts [E + 2]): visit v < count is for the rows of group groups[v] in row tile tiles[v].

    Rows beyond all groups are group E, so that every tile is visited. Rows of group e are starts[e] .. starts[e + 1]. Visits
    of a tile follow each other, as do those for a group.
    """
    groups = group_sizes.shape[0]
    total = jnp.sum(group_sizes)
    sizes = jnp.concatenate([group_sizes, (rows - total)[None]]).astype(jnp.int32)
    ends = jnp.cumsum(sizes)
    begins = ends - sizes
    first = begins // tile_rows
    each = jnp.where(sizes > 0, (ends - 1) // tile_rows - first + 1, 0)
    before = jnp.cumsum(each) - each
    most = pl.cdiv(rows, tile_rows) + min(groups + 1, rows) - 1
    group = jnp.repeat(jnp.arange(groups + 1, dtype=jnp.int32), each, total_repeat_length=most)
    tile = first[group] + jnp.arange(most, dtype=jnp.int32) - before[group]
    return jnp.sum(each), tile.astype(jnp.int32), group, jnp.append(begins, rows).astype(jnp.int32)


def _call(tile: Tile, many: bool, x, row_scales, w, scales, group_sizes, out_dtype) -> jax.Array:
    """x [R, in], w [E, in, out] -> [R, out]."""
    (rows, terms), (groups, _, columns) = x.shape, w.shape
    count, tiles, group, starts = visits(group_sizes, rows, tile.rows)
    weights = jax.lax.cummax(jnp.where(group < groups, group, 0))  # rows beyond the groups need none: nothing new is read
    scales = scales.reshape(groups, 1, -1)  # flat: a row of few scales would take 128 in memory

    def w_index(n, v, k, tiles, group, weights, starts):  # where the dequantised weight is kept, nothing is read again
        seen = (v > 0) & (weights[v] == weights[jnp.maximum(v - 1, 0)])
        beyond = group[v] == groups
        return weights[v], jnp.where(beyond | (seen & many), tile.steps - 1, k), n

    in_specs = [
        pl.BlockSpec((tile.rows, tile.terms), lambda n, v, k, tiles, *_: (tiles[v], k)),
        pl.BlockSpec((None, tile.terms, tile.columns), w_index),
        pl.BlockSpec(
            (None, *scales.shape[1:]), lambda n, v, k, tiles, group, weights, _: (weights[v], 0, 0), memory_space=pltpu.SMEM
        ),
    ]
    operands, scratch = [x, w, scales], [fp8.float32_scratch((tile.rows, tile.columns))]
    if row_scales is not None:
        in_specs.append(pl.BlockSpec((None, fp8.SUBLANES, tile.rows), lambda n, v, k, tiles, *_: (k, 0, tiles[v])))
        operands.append(row_scales)
    if many:
        scratch.append(pltpu.VMEM((tile.steps, tile.terms, tile.columns), x.dtype))
    kernel = functools.partial(_kernel, tile, groups, columns // BLOCK, row_scales is not None, many)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(columns // tile.columns, count, tile.steps),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((tile.rows, tile.columns), lambda n, v, k, tiles, *_: (tiles[v], n)),
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct((rows, columns), out_dtype),
        compiler_params=fp8.compiler_params("parallel", "arbitrary", "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * terms * columns,
            bytes_accessed=x.size * x.dtype.itemsize + w.size // groups * min(rows, groups) + math.prod((rows, columns)) * 4,
            transcendentals=0,
        ),
        name=f"fp8_grouped_{fp8.variant(many, row_scales is not None)}",
    )(tiles, group, weights, starts, *operands)


def _kernel(tile: Tile, groups: int, scale_columns: int, quantized: bool, many: bool, *refs):
    """One step of the sum of one visit; float32 sums in VMEM until the last, which writes the group's rows of the tile."""
    tiles_ref, group_ref, weights_ref, starts_ref, x_ref, w_ref, scales_ref, *refs = refs
    row_scales_ref = refs.pop(0) if quantized else None
    panel_ref = refs.pop() if many else None
    out_ref, total_ref = refs
    n, v, k = (pl.program_id(i) for i in range(3))
    group, before = group_ref[v], jnp.maximum(v - 1, 0)

    def scale(a: int, b: int):
        return scales_ref[0, (k * tile.blocks + a) * scale_columns + n * (tile.columns // BLOCK) + b]

    @pl.when(k == 0)
    def _():
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when(group < groups)
    def _():
        if not many:
            fp8.promote(tile, x_ref, row_scales_ref, w_ref, scale, total_ref)
            return

        @pl.when((v == 0) | (weights_ref[v] != weights_ref[before]))
        def _():
            fp8.dequantize(tile, w_ref, scale, panel_ref.at[k])

        total_ref[...] += fp8.dot(x_ref[...], panel_ref[k])

    @pl.when(k == tile.steps - 1)
    def _():
        index = tiles_ref[v] * tile.rows + jax.lax.broadcasted_iota(jnp.int32, total_ref.shape, 0)
        mine = (index >= starts_ref[group]) & (index < starts_ref[group + 1])
        first = (v == 0) | (tiles_ref[v] != tiles_ref[before])
        total = total_ref[...].astype(out_ref.dtype)
        others = jnp.where(first, jnp.zeros_like(total), out_ref[...])
        out_ref[...] = jnp.where(mine, total, others)
