"""The weights' gradients in bfloat16 for Hopper: for every group, the products of its rows of two matrices, summed.

A persistent kernel as in `rows.py`, whose sums run over rows, 64 of one group at a time.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen35_jax.ops.fp8 import BLOCK
from qwen35_jax.ops.hopper.ring import PRODUCER, buffers, each_tile, persistent, release_last, release_previous, stages
from qwen35_jax.ops.hopper.store import staging, store_tile
from qwen35_jax.ops.hopper.tiles import ALIGNED, Shape

DEPTH = 64
REST = 2  # blocks of DEPTH rows that hold a group's rows before and behind those that are read in place


def gradients(x, dy, group_sizes, out_dtype) -> jax.Array:
    """x [R, I]^T times dy [R, O], bfloat16, over the rows of every group -> [E, I, O] bfloat16, float32 accumulation.

    Rows are sorted by group; group_sizes [E] int32. I and O are multiples of 128. Where a group's rows are blocks of 64 from a
    multiple of 8 on they are read in place; the up to seven before and up to 63 behind come from a copy, two blocks a group,
    that is filled up with zeros: rows of other groups never enter a product.
    """
    sizes = group_sizes.astype(jnp.int32)
    ends = jnp.cumsum(sizes)
    before = jnp.minimum(-(ends - sizes) % ALIGNED, sizes)
    firsts, blocks = ends - sizes + before, (sizes - before) // DEPTH
    rests = sizes - blocks * DEPTH
    place = jnp.arange(REST * DEPTH)
    row = jnp.where(place < before[:, None], 0, (blocks * DEPTH)[:, None]) + (ends - sizes)[:, None] + place
    row = jnp.where(place < rests[:, None], row, x.shape[0]).reshape(-1)
    whole, ragged = zip(*((_whole(a), jnp.take(a, row, axis=0, mode="fill", fill_value=0)) for a in (x, dy)), strict=True)
    width = 2 * BLOCK if dy.shape[1] % (2 * BLOCK) == 0 else BLOCK
    shape = Shape(BLOCK, width, DEPTH)
    out = jax.ShapeDtypeStruct((sizes.shape[0], x.shape[1], dy.shape[1]), out_dtype)
    tiles = out.size // (shape.rows * shape.columns)
    kernel = persistent(functools.partial(_kernel, shape), "gradients", out, tiles)
    return kernel(*whole, *ragged, firsts, blocks, -(-rests // DEPTH))


def _whole(a: jax.Array) -> jax.Array:
    """As many rows as one copy takes, and whole tiles."""
    rows = max(DEPTH, -(-a.shape[0] // ALIGNED) * ALIGNED)
    return jnp.pad(a, ((0, rows - a.shape[0]), (0, 0)))


def _kernel(shape, x, dy, x_rest, dy_rest, firsts, blocks, rests, out):
    def run(x_ring, dy_ring, full, empty, staged):
        sources = (x, x_rest, x_ring, shape.rows), (dy, dy_rest, dy_ring, shape.columns)
        pl.when(lax.axis_index("warpgroup") == PRODUCER)(
            functools.partial(_copy, shape, sources, firsts, blocks, rests, out, full, empty)
        )
        pl.when(lax.axis_index("warpgroup") != PRODUCER)(
            functools.partial(_multiply, shape, x_ring, dy_ring, blocks, rests, out, full, empty, staged)
        )

    stage = shape.depth * (shape.rows + shape.columns) * x.dtype.itemsize
    count = stages(stage, shape.rows * shape.columns * out.dtype.itemsize)
    pl.run_scoped(
        run,
        buffers(count, (shape.depth, shape.rows), x.dtype),
        buffers(count, (shape.depth, shape.columns), dy.dtype),
        plgpu.Barrier(num_arrivals=2, num_barriers=count),
        plgpu.Barrier(num_arrivals=2, num_barriers=count),
        staging(shape.part, out.dtype),
        collective_axes="warpgroup",
    )


def _copy(shape, sources, firsts, blocks, rests, out, full, empty):
    """The producer's program."""

    def tile(group, row, column, count):
        first, whole = firsts[group], blocks[group]

        def step(j, count):
            slot = lax.rem(count, full.shape[0])

            @pl.when(count >= full.shape[0])
            def _():
                plgpu.barrier_wait(empty.at[slot])

            for (source, rest, ring, width), place in zip(sources, (row, column), strict=True):
                there = pl.ds(place * width, width)

                def copy(source, start, there=there, ring=ring):
                    plgpu.copy_gmem_to_smem(source.at[pl.ds(start, DEPTH), there], ring.at[slot], full.at[slot])

                pl.when(j < whole)(functools.partial(copy, source, first + j * DEPTH))
                pl.when(j >= whole)(functools.partial(copy, rest, (group * REST + j - whole) * DEPTH))
            return count + 1

        return lax.fori_loop(0, whole + rests[group], step, count)

    each_tile(out, shape, tile)


def _multiply(shape, x_ring, dy_ring, blocks, rests, out, full, empty, staged):
    """The program of the two others."""
    warpgroup = lax.axis_index("warpgroup")
    row_corner, column_corner = shape.corner(warpgroup)
    rows, columns = pl.ds(row_corner, shape.part[0]), pl.ds(column_corner, shape.part[1])

    def tile(group, row, column, count):
        steps = blocks[group] + rests[group]

        def run(sums):
            def step(j, count):
                slot = lax.rem(count, full.shape[0])
                plgpu.barrier_wait(full.at[slot])
                plgpu.wgmma(sums, x_ring.at[slot, :, rows].transpose((1, 0)), dy_ring.at[slot, :, columns])
                release_previous(empty, j, count)
                return count + 1

            end = lax.fori_loop(0, steps, step, count)
            release_last(empty, steps, end)
            return sums[...], end

        total, end = pl.run_scoped(run, plgpu.ACC(shape.part))
        corner = row * shape.rows + row_corner, column * shape.columns + column_corner
        store_tile(total, staged, out.at[group], warpgroup, corner[0], 0, shape.part[0], corner[1])
        return end

    each_tile(out, shape, tile)
    plgpu.wait_smem_to_gmem(0)
