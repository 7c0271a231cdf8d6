"""The weights' gradients in FP8 for Hopper: for every group, the products of its rows of two matrices, summed.

A persistent kernel as in `rows.py`, whose sums run over rows, in blocks of 128 that have a scale per column.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen35_jax.ops.fp8 import BLOCK
from qwen35_jax.ops.hopper.ring import PRODUCER, buffers, each_tile, persistent, stages
from qwen35_jax.ops.hopper.store import staging, store_tile
from qwen35_jax.ops.hopper.tiles import Shape

FP8 = Shape(BLOCK, BLOCK, BLOCK, split_rows=True)


def padded_blocks(group_sizes: jax.Array, rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows in blocks of 128 of one group: which row stands in each place [places], `rows` where none does, and of every
    group its first block and how many there are."""
    groups = group_sizes.shape[0]
    places = (rows + groups * (BLOCK - 1)) // BLOCK * BLOCK
    counts = -(-group_sizes // BLOCK)
    firsts = jnp.cumsum(counts) - counts
    row = jnp.arange(rows)
    group = jnp.searchsorted(jnp.cumsum(group_sizes), row, side="right")
    moved = (firsts * BLOCK - jnp.cumsum(group_sizes) + group_sizes)[jnp.minimum(group, groups - 1)]
    place = jnp.where(group < groups, row + moved, places)
    return jnp.full(places, rows).at[place].set(row, mode="drop"), firsts, counts


def fp8_gradients(x, x_scales, dy, dy_scales, firsts, counts, out_dtype) -> jax.Array:
    """x [R, I]^T times dy [R, O] over the blocks of 128 rows of every group -> [E, I, O], float32 accumulation.

    x [I, R], dy [O, R] e4m3, rows last, R a multiple of 128; x_scales [R/128, I], dy_scales [R/128, O] float32. Group e has
    counts[e] blocks from firsts[e] on, int32 [E]; I and O are multiples of 128.
    """
    shape = counts.shape[0], x.shape[0], dy.shape[0]
    tiles = shape[0] * (shape[1] // FP8.rows) * (shape[2] // FP8.columns)
    kernel = persistent(_kernel, "fp8_gradients", jax.ShapeDtypeStruct(shape, out_dtype), tiles)
    return kernel(x, dy, x_scales, dy_scales, firsts.astype(jnp.int32), counts.astype(jnp.int32))


def _kernel(x, dy, x_scales, dy_scales, firsts, counts, out):
    def run(x_ring, dy_ring, x_scale_ring, dy_scale_ring, full, empty, staged):
        rings = (x, x_ring), (dy, dy_ring), (x_scales, x_scale_ring), (dy_scales, dy_scale_ring)
        pl.when(lax.axis_index("warpgroup") == PRODUCER)(functools.partial(_copy, rings, firsts, counts, out, full, empty))
        rings = x_ring, dy_ring, x_scale_ring, dy_scale_ring
        pl.when(lax.axis_index("warpgroup") != PRODUCER)(functools.partial(_multiply, rings, counts, out, full, empty, staged))

    count = stages(2 * BLOCK * (BLOCK + 4), BLOCK * BLOCK * out.dtype.itemsize)
    scales = plgpu.SMEM((count, BLOCK), jnp.float32)
    pl.run_scoped(
        run,
        buffers(count, (FP8.rows, FP8.depth), x.dtype),
        buffers(count, (FP8.columns, FP8.depth), dy.dtype),
        scales,
        scales,
        plgpu.Barrier(num_arrivals=4, num_barriers=count),
        plgpu.Barrier(num_arrivals=2, num_barriers=count),
        staging(FP8.part, out.dtype),
        collective_axes="warpgroup",
    )


def _copy(rings, firsts, counts, out, full, empty):
    """The producer's program."""
    (x, x_ring), (dy, dy_ring), (x_scales, x_scale_ring), (dy_scales, dy_scale_ring) = rings

    def tile(group, row, column, count):
        first = firsts[group]
        rows, columns = pl.ds(row * FP8.rows, FP8.rows), pl.ds(column * FP8.columns, FP8.columns)

        def step(j, count):
            slot = lax.rem(count, full.shape[0])
            depth = pl.ds((first + j) * FP8.depth, FP8.depth)

            @pl.when(count >= full.shape[0])
            def _():
                plgpu.barrier_wait(empty.at[slot])

            plgpu.copy_gmem_to_smem(x.at[rows, depth], x_ring.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(dy.at[columns, depth], dy_ring.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(x_scales.at[first + j, rows], x_scale_ring.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(dy_scales.at[first + j, columns], dy_scale_ring.at[slot], full.at[slot])
            return count + 1

        return lax.fori_loop(0, counts[group], step, count)

    each_tile(out, FP8, tile)


def _multiply(rings, counts, out, full, empty, staged):
    """The program of the two others: each block of 128 rows is multiplied, scaled and added in float32."""
    x_ring, dy_ring, x_scale_ring, dy_scale_ring = rings
    warpgroup = lax.axis_index("warpgroup")
    rows = pl.ds(FP8.corner(warpgroup)[0], FP8.part[0])

    def tile(group, row, column, count):
        def step(j, carry):
            count, total = carry
            slot = lax.rem(count, full.shape[0])
            plgpu.barrier_wait(full.at[slot])

            def dot(sums):
                plgpu.wgmma(sums, x_ring.at[slot, rows], dy_ring.at[slot].transpose((1, 0)))
                return sums[...]

            block = pl.run_scoped(dot, plgpu.ACC(FP8.part))
            left = plgpu.load(x_scale_ring.at[slot, rows], layout=plgpu.Layout.WGMMA.reduce(1))
            right = plgpu.load(dy_scale_ring.at[slot], layout=plgpu.Layout.WGMMA.reduce(0))
            scales = lax.broadcast_in_dim(left, FP8.part, (0,)) * lax.broadcast_in_dim(right, FP8.part, (1,))
            plgpu.barrier_arrive(empty.at[slot])
            return count + 1, total + block * scales

        zeros = plgpu.layout_cast(jnp.zeros(FP8.part, jnp.float32), plgpu.Layout.WGMMA)
        count, total = lax.fori_loop(0, counts[group], step, (count, zeros))
        corner = row * FP8.rows + FP8.corner(warpgroup)[0]
        store_tile(total, staged, out.at[group], warpgroup, corner, 0, FP8.part[0], column * FP8.columns)
        return count

    each_tile(out, FP8, tile)
    plgpu.wait_smem_to_gmem(0)
