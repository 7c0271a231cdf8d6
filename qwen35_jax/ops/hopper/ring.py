"""What the kernels have in common: buffers between the warpgroup that copies and those that multiply, and the loop over tiles."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen35_jax.ops.hopper.tiles import Shape

SMS = 132  # streaming multiprocessors of an H100 SXM or H200: as many thread blocks run, each through many tiles
PRODUCER = 2  # of a block's three warpgroups, the one that copies
SHARED_MEMORY = 225 * 2**10  # bytes of a block, less two KiB for barriers and alignment


def persistent(body: Callable, name: str, out: jax.ShapeDtypeStruct, tiles: int, pairs: bool = False) -> Callable:
    """The kernel of `body`, which goes through at most `tiles` tiles, on all multiprocessors; with `pairs` in pairs of thread
    blocks, along the axis "pair", that go through pairs of tiles and can share a copy."""
    cluster = {"cluster": (2,), "cluster_names": ("pair",)} if pairs else {}
    return plgpu.kernel(
        body,
        out_type=out,
        grid=(min(SMS, tiles) // (2 if pairs else 1),),
        grid_names=("sm",),
        **cluster,
        num_threads=3,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )


def buffers(count: int, block: tuple[int, int], dtype, line: int = 128):
    """`count` matrices in shared memory, in tiles of 8 rows of `line` bytes, which are read without bank conflicts; `wgmma`
    wants 128."""
    width = line // jnp.dtype(dtype).itemsize
    return plgpu.SMEM((count, *block), dtype, transforms=(plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(line)))


def stages(stage: int, rest: int) -> int:
    """Buffers of a ring: as many of `stage` bytes as there is room for beside `rest` bytes, at most six."""
    return min(6, (SHARED_MEMORY - rest) // stage)


def each(total: jax.Array | int, body: Callable) -> jax.Array:
    """count = body(index, count) for the share of `total` indices of this thread block, or pair of them; `count` is the position
    in the ring. Returns the last."""
    here, blocks = lax.axis_index("sm"), lax.axis_size("sm")
    turns = lax.div(total - here + blocks - 1, blocks)
    return lax.fori_loop(0, turns, lambda i, count: body(here + i * blocks, count), jnp.int32(0))


def each_tile(out: jax.Ref, shape: Shape, body: Callable) -> None:
    """count = body(group, row, column, count) for every tile of out [groups, rows, columns], in units of tiles."""
    groups, rows, columns = out.shape
    rows, columns = rows // shape.rows, columns // shape.columns

    def tile(index, count):
        return body(lax.div(index, rows * columns), lax.rem(lax.div(index, columns), rows), lax.rem(index, columns), count)

    each(groups * rows * columns, tile)


def release_previous(empty: jax.Ref, j: jax.Array, count: jax.Array) -> None:
    """At step j of a sum, after its `wgmma`: the one before is done, and its buffers may be filled again."""
    plgpu.wgmma_wait(1)
    pl.when(j > 0)(lambda: _release(empty, count))


def release_last(empty: jax.Ref, steps: jax.Array, count: jax.Array) -> None:
    """After the last of `steps` steps: none is left."""
    plgpu.wgmma_wait(0)
    pl.when(steps > 0)(lambda: _release(empty, count))


def _release(empty: jax.Ref, count: jax.Array) -> None:
    stages = empty.shape[0]
    plgpu.barrier_arrive(empty.at[lax.rem(count + stages - 1, stages)])
