"""A tile's part from registers to memory, all of its rows or some, through shared memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen35_jax.compat import store_anyhow

_LINE = 128  # bytes


def staging(part: tuple[int, int], dtype) -> plgpu.RefUnion:
    """Shared memory for the parts of two warpgroups: in two forms, chunks of 128 bytes of each row in the order that is
    written without bank conflicts, or whole rows, of which any number can be copied from any on."""
    width = _LINE // jnp.dtype(dtype).itemsize
    order = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(_LINE))
    return plgpu.RefUnion(
        plgpu.SMEM((2, part[1] // width, part[0], width), dtype, transforms=order),
        plgpu.SMEM((2, *part), dtype),
    )


def store_tile(total, staged, out, warpgroup, row, begin, end, column):
    """Writes rows begin .. end (cut to those that there are) of `total` to the same rows behind `row` of out, at `column`."""
    rows, columns = total.shape
    chunks, plain = staged
    begin, end = (jnp.clip(n, 0, rows) for n in (begin, end))
    total = total.astype(out.dtype)
    width = chunks.shape[-1]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(end - begin == rows)
    def _():
        for i in range(columns // width):
            chunks[warpgroup, i] = total[:, i * width : (i + 1) * width]
        plgpu.commit_smem()
        for i in range(columns // width):
            there = out.at[pl.ds(row, rows), pl.ds(column + i * width, width)]
            plgpu.copy_smem_to_gmem(chunks.at[warpgroup, i], there)

    @pl.when(end - begin < rows)
    def _():
        store_anyhow(plain.at[warpgroup], total)  # banks conflict: only the last rows of groups go this way
        plgpu.commit_smem()
        # A copy has a fixed number of rows: some of 1, 2, 4, ... make up any number.
        first, left, size = begin, end - begin, rows // 2
        while size:
            copy_rows(plain.at[warpgroup], out, first, row, column, size, (left & size) != 0)
            first, size = first + (left & size), size // 2


def copy_rows(plain, out, first, row, column, size: int, wanted: jax.Array):
    """`size` rows from `first` on, where they are wanted."""

    @pl.when(wanted)
    def _():
        there = out.at[pl.ds(row + first, size), pl.ds(column, plain.shape[1])]
        plgpu.copy_smem_to_gmem(plain.at[pl.ds(first, size)], there)
