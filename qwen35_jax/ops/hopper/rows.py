"""Rows, sorted by group, times the weight of their group, for Hopper: one kernel for bfloat16 and for both uses of FP8.

A persistent kernel of three warpgroups: one copies tiles of both operands into a ring of buffers (TMA), two multiply
(`wgmma`). See docs/kernels/hopper_products.md.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen35_jax.ops.fp8 import BLOCK
from qwen35_jax.ops.hopper.ring import PRODUCER, buffers, each, persistent, release_last, release_previous, stages
from qwen35_jax.ops.hopper.store import staging, store_tile
from qwen35_jax.ops.hopper.tiles import ALIGNED, Shape, row_tiles, tile_count

# Scales of w that one copy brings, and multiples of which it can begin at: 128 bytes and 16.
LINE, START = 32, 4


@dataclasses.dataclass(frozen=True)
class Product:
    """What a kernel multiplies. transposed: w is [E, N, K], not [E, K, N]. scaled: x has scales, and w; opened: w is e4m3
    and becomes x's dtype in shared memory; pairs: two thread blocks share what they copy of x."""

    shape: Shape
    transposed: bool
    scaled: bool
    opened: bool
    pairs: bool = False

    @property
    def name(self) -> str:
        return {(0, 0): "rows", (0, 1): "dequantized_rows", (1, 0): "fp8_rows", (1, 1): "upcast_rows"}[self.scaled, self.opened]

    @property
    def abreast(self) -> int:
        """Columns of tiles that are made side by side."""
        return 2 if self.pairs else 1

    @property
    def block(self) -> tuple[int, int]:
        """The part of w that one buffer holds, in its order."""
        return (self.shape.columns, self.shape.depth) if self.transposed else (self.shape.depth, self.shape.columns)

    @property
    def weights(self) -> tuple[int, int, int]:
        """Of w, opened: of each warpgroup's columns, two steps'."""
        return 4, self.shape.depth, self.shape.part[1]

    def stages(self, x_dtype, w_dtype, out_dtype) -> int:
        """The number of buffers that there is room for."""
        shape = self.shape
        x, w, out = (jnp.dtype(dtype).itemsize for dtype in (x_dtype, w_dtype, out_dtype))
        stage = shape.depth * (shape.rows * x + shape.columns * w) + 4 * ((shape.rows if self.scaled else 0) + LINE)
        return stages(stage, shape.rows * shape.columns * out + (2 * math.prod(self.weights) if self.opened else 0))


def rows_times(x, w, group_sizes, *, transposed, x_scales=None, w_scales=None, out_dtype, parts=1, pairs=False) -> jax.Array:
    """Row r of group e of x [R, K] times w[e] -> [R, N] in `out_dtype`, float32 accumulation; zeros beyond the groups.

    w [E, K, N], or [E, N, K] where `transposed`. group_sizes [E] int32. x_scales [R, K/128]; w_scales [E, K/128, N/128];
    float32. K and N are multiples of 128. Four kinds:
    rows: x and w bfloat16. dequantized_rows: x bfloat16, w e4m3 with scales, each number of w rounded to bfloat16 once.
    fp8_rows: both e4m3 with scales and w transposed, sums of 128 terms in FP8, added in float32. upcast_rows: the same of
    a w that is not transposed, in float16, which holds every e4m3 number: half the speed, where that matters.
    parts: the summed axis is cut into so many, whose float32 products are added at the end.
    pairs: thread blocks in pairs that copy each half of the rows of x for both; fp8_rows with an even number of tiles abreast.
    """
    scaled, opened = x_scales is not None, w_scales is not None and not transposed
    product = Product(_shape(x, w, group_sizes.shape[0], transposed, scaled), transposed, scaled, opened, pairs)
    shape = product.shape
    if opened:
        x = x.astype(jnp.float16 if scaled else jnp.bfloat16)
    rows, width = x.shape[0], w.shape[1 if transposed else 2]
    padded = max(-(-rows // ALIGNED) * ALIGNED, shape.rows)
    x = jnp.pad(x, ((0, padded - rows), (0, 0)))
    scales = []
    if x_scales is not None:
        scales.append(jnp.pad(x_scales.T, ((0, 0), (0, padded - rows))))
    if w_scales is not None:
        scales.append(jnp.pad(w_scales, ((0, 0), (0, 0), (0, LINE + -w_scales.shape[2] % START))))
    table = row_tiles(group_sizes, padded, shape.rows)
    columns = width // shape.columns
    if pairs and (product.name != "fp8_rows" or columns % 2):
        raise ValueError(f"pairs are for fp8_rows with an even number of tiles, not {product.name} with {columns}")
    tiles = tile_count(padded, group_sizes.shape[0], shape.rows) * columns * parts
    out = jax.ShapeDtypeStruct((parts, padded, width), jnp.float32 if parts > 1 else out_dtype)
    kernel = persistent(functools.partial(_kernel, product, parts), product.name, out, tiles, pairs)
    out = kernel(x, w, *scales, *table)
    out = out[0] if parts == 1 else out.sum(0).astype(out_dtype)
    return out[:rows]


def _shape(x, w, groups: int, transposed: bool, scaled: bool) -> Shape:
    """Tiles of 128 rows where groups have as many in the mean, else of 64, the least that `wgmma` multiplies."""
    rows = BLOCK if x.shape[0] >= BLOCK * groups else BLOCK // 2
    columns = 2 * BLOCK if w.shape[1 if transposed else 2] % (2 * BLOCK) == 0 else BLOCK
    if scaled and transposed:
        return Shape(BLOCK, BLOCK, BLOCK, split_rows=True) if rows == BLOCK else Shape(rows, columns, BLOCK)
    return Shape(BLOCK // 2 if scaled else rows, columns, BLOCK // 2)  # two sums of 128 rows would not fit into registers


def _kernel(product: Product, parts: int, *refs):
    """refs: x, w, x_scales and w_scales where there are, the table of tiles, out."""
    x, w, *refs = refs
    x_scales = refs.pop(0) if product.scaled else None
    w_scales = refs.pop(0) if product.scaled or product.opened else None
    *table, out = refs
    shape = product.shape
    count = product.stages(x.dtype, w.dtype, out.dtype)
    scratch = {
        "x_ring": buffers(count, (shape.rows, shape.depth), x.dtype),
        "w_ring": buffers(count, product.block, w.dtype, 64 if product.opened else 128),
        "full": plgpu.Barrier(num_arrivals=2 + product.scaled + (w_scales is not None), num_barriers=count),
        "empty": _empty(product, count),
        "staged": staging(shape.part, out.dtype),
    }
    if product.scaled:
        scratch["x_scale_ring"] = plgpu.SMEM((count, shape.rows), jnp.float32)
    if w_scales is not None:
        scratch["w_scale_ring"] = plgpu.SMEM((count, LINE), jnp.float32)
    if product.opened:
        scratch["weights"] = buffers(product.weights[0], product.weights[1:], x.dtype)

    def run(**scratch):
        state = _Kernel(product, parts, x, w, x_scales, w_scales, table, out, **scratch)
        pl.when(lax.axis_index("warpgroup") == PRODUCER)(state.copy)
        pl.when(lax.axis_index("warpgroup") != PRODUCER)(state.multiply)

    pl.run_scoped(run, **scratch, collective_axes="warpgroup")


def _empty(product: Product, count: int):
    """The barriers at which the multiplying warpgroups give buffers back: to both blocks of a pair, which fill them together."""
    if product.pairs:
        return plgpu.ClusterBarrier(collective_axes=("pair",), num_arrivals=2, num_barriers=count)
    return plgpu.Barrier(num_arrivals=2, num_barriers=count)


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """The references of one thread block and its two programs."""

    product: Product
    parts: int
    x: jax.Ref
    w: jax.Ref
    x_scales: jax.Ref | None
    w_scales: jax.Ref | None
    table: list
    out: jax.Ref
    x_ring: jax.Ref
    w_ring: jax.Ref
    full: jax.Ref
    empty: jax.Ref
    staged: jax.Ref
    x_scale_ring: jax.Ref | None = None
    w_scale_ring: jax.Ref | None = None
    weights: jax.Ref | None = None

    @property
    def stages(self) -> int:
        return self.full.shape[0]

    def _tiles(self, body):
        """count = body(part, row, column, count) for every tile of this block; `count`: the position in the ring. -> the last"""
        *_, total = self.table
        abreast = self.product.abreast
        columns = self.out.shape[2] // self.product.shape.columns // abreast
        band = _band(columns, 8 // abreast)

        def tile(index, count):
            part, index = lax.rem(index, self.parts), lax.div(index, self.parts)
            row = lax.rem(lax.div(index, band), total[0])
            column = lax.div(index, band * total[0]) * band + lax.rem(index, band)
            if abreast > 1:
                column = column * abreast + lax.axis_index("pair")
            return body(part, row, column, count)

        return each(total[0] * (columns * self.parts), tile)

    def _steps(self, part, group):
        """The first step and the number of steps along the summed axis: none for rows without a group."""
        steps = self.x.shape[1] // self.product.shape.depth // self.parts
        return part * steps, jnp.where(group < self.w.shape[0], steps, 0)

    def copy(self):
        """The producer's program."""
        shape = self.product.shape
        groups, starts, *_ = self.table
        both = "pair" if self.product.pairs else None

        def tile(part, row, column, count):
            group, start = groups[row], starts[row]
            first, steps = self._steps(part, group)
            rows = pl.ds(start, shape.rows)

            def step(j, count):
                slot = lax.rem(count, self.stages)

                @pl.when(count >= self.stages)
                def _():
                    plgpu.barrier_wait(self.empty.at[slot])

                depth = pl.ds((first + j) * shape.depth, shape.depth)
                columns = pl.ds(column * shape.columns, shape.columns)
                block = (columns, depth) if self.product.transposed else (depth, columns)
                k_block = lax.div((first + j) * shape.depth, BLOCK)
                plgpu.copy_gmem_to_smem(self.x.at[rows, depth], self.x_ring.at[slot], self.full.at[slot], collective_axes=both)
                plgpu.copy_gmem_to_smem(self.w.at[group, *block], self.w_ring.at[slot], self.full.at[slot])
                if self.x_scales is not None:
                    source = self.x_scales.at[k_block, rows]
                    plgpu.copy_gmem_to_smem(source, self.x_scale_ring.at[slot], self.full.at[slot])
                if self.w_scales is not None:
                    begin = lax.div(column * (shape.columns // BLOCK), START) * START
                    source = self.w_scales.at[group, k_block, pl.ds(begin, LINE)]
                    plgpu.copy_gmem_to_smem(source, self.w_scale_ring.at[slot], self.full.at[slot])
                return count + 1

            return lax.fori_loop(0, steps, step, count)

        count = self._tiles(tile)
        if self.product.pairs:  # the other block still gives back buffers: not to one that has ended
            last = jnp.maximum(count - self.stages, 0)
            lax.fori_loop(last, count, lambda i, _: plgpu.barrier_wait(self.empty.at[lax.rem(i, self.stages)]), None)

    def multiply(self):
        """The program of the two others."""
        groups, starts, skips, sizes, _ = self.table
        warpgroup = lax.axis_index("warpgroup")
        shape = self.product.shape
        row_corner, column_corner = shape.corner(warpgroup)
        kinds = {
            "rows": self._plain,
            "dequantized_rows": self._dequantized,
            "fp8_rows": self._scaled,
            "upcast_rows": self._upcast,
        }
        accumulate = kinds[self.product.name]

        def tile(part, row, column, count):
            group = groups[row]
            _, steps = self._steps(part, group)
            place = lax.rem(column * (shape.columns // BLOCK), START) + lax.div(column_corner, BLOCK)
            total, count = accumulate(steps, place, count)
            here = skips[row] - row_corner
            store_tile(total, self.staged, self.out.at[part], warpgroup, starts[row] + row_corner, here, here + sizes[row],
                       column * shape.columns + column_corner)  # fmt: skip
            return count

        self._tiles(tile)
        plgpu.wait_smem_to_gmem(0)

    def _operands(self, slot):
        """This warpgroup's part of the buffers of both operands, for `wgmma`."""
        row, column = self.product.shape.corner(lax.axis_index("warpgroup"))
        rows, columns = self.product.shape.part
        rows, columns = pl.ds(row, rows), pl.ds(column, columns)
        w = self.w_ring.at[slot, columns].transpose((1, 0)) if self.product.transposed else self.w_ring.at[slot, :, columns]
        return self.x_ring.at[slot, rows], w

    def _scaled(self, steps, place, count):
        """FP8: each block of 128 is multiplied, scaled and added in float32. place: of w's scale among those of a buffer."""
        shape = self.product.shape

        def step(j, carry):
            count, total = carry
            slot = lax.rem(count, self.stages)
            plgpu.barrier_wait(self.full.at[slot])
            scales = self._scales(slot, place)

            def dot(sums):
                plgpu.wgmma(sums, *self._operands(slot))
                return sums[...]

            block = pl.run_scoped(dot, plgpu.ACC(shape.part))
            if self.product.pairs:
                plgpu.commit_smem()  # one thread gives the buffer back: when all of them have read it
            plgpu.barrier_arrive(self.empty.at[slot])
            return count + 1, total + block * lax.broadcast_in_dim(scales, shape.part, (0,))

        count, total = lax.fori_loop(0, steps, step, (count, self._zeros()))
        return total, count

    def _upcast(self, steps, place, count):
        """The same in float16: each warpgroup writes its columns of w so. A block of 128 is two steps."""
        shape, warpgroup = self.product.shape, lax.axis_index("warpgroup")

        def block(j, carry):
            count, total = carry

            def dot(sums):
                for half in range(2):
                    slot, turn = lax.rem(count + half, self.stages), 2 * warpgroup + half
                    plgpu.barrier_wait(self.full.at[slot])
                    self._open(slot, turn, lambda w: w)
                    plgpu.wgmma(sums, self._operands(slot)[0], self.weights.at[turn])
                return sums[...]

            sums = pl.run_scoped(dot, plgpu.ACC(shape.part))
            scales = self._scales(lax.rem(count, self.stages), place)
            for half in range(2):
                plgpu.barrier_arrive(self.empty.at[lax.rem(count + half, self.stages)])
            return count + 2, total + sums * lax.broadcast_in_dim(scales, shape.part, (0,))

        count, total = lax.fori_loop(0, lax.div(steps, 2), block, (count, self._zeros()))
        return total, count

    def _zeros(self):
        return plgpu.layout_cast(jnp.zeros(self.product.shape.part, jnp.float32), plgpu.Layout.WGMMA)

    def _scales(self, slot, place):
        """Those of this warpgroup's rows of x, times that of its columns of w."""
        row, _ = self.product.shape.corner(lax.axis_index("warpgroup"))
        rows = self.x_scale_ring.at[slot, pl.ds(row, self.product.shape.part[0])]
        return plgpu.load(rows, layout=plgpu.Layout.WGMMA.reduce(1)) * self.w_scale_ring[slot, place]

    def _plain(self, steps, _, count):
        """bfloat16: the products add up in the accumulator."""

        def run(sums):
            def step(j, count):
                slot = lax.rem(count, self.stages)
                plgpu.barrier_wait(self.full.at[slot])
                plgpu.wgmma(sums, *self._operands(slot))
                release_previous(self.empty, j, count)
                return count + 1

            end = lax.fori_loop(0, steps, step, count)
            release_last(self.empty, steps, end)
            return sums[...], end

        return pl.run_scoped(run, plgpu.ACC(self.product.shape.part))

    def _dequantized(self, steps, place, count):
        """bfloat16 times FP8: each warpgroup writes its columns of w in bfloat16, then multiplies as `_plain` does."""
        shape, warpgroup = self.product.shape, lax.axis_index("warpgroup")

        def run(sums):
            def step(j, count):
                slot, turn = lax.rem(count, self.stages), 2 * warpgroup + lax.rem(count, 2)
                plgpu.barrier_wait(self.full.at[slot])
                scale = self.w_scale_ring[slot, place]
                self._open(slot, turn, lambda w: (w.astype(jnp.float32) * scale).astype(jnp.bfloat16))
                plgpu.wgmma(sums, self._operands(slot)[0], self.weights.at[turn])
                release_previous(self.empty, j, count)
                return count + 1

            end = lax.fori_loop(0, steps, step, count)
            release_last(self.empty, steps, end)
            return sums[...], end

        return pl.run_scoped(run, plgpu.ACC(shape.part))

    def _open(self, slot, turn, convert):
        """Writes this warpgroup's part of w in x's dtype; `convert` is given it in float16, which holds every e4m3 number.

        A store first waits for all of the warpgroup, so that no warp still multiplies what it overwrites.
        """
        corner = self.product.shape.corner(lax.axis_index("warpgroup"))[1]
        for column in range(0, self.product.shape.part[1], 64):  # all at once would take too many registers
            w = self.w_ring.at[slot, :, pl.ds(corner + column, 64)]
            w = plgpu.load(w, layout=plgpu.Layout.WGMMA_UPCAST_2X).astype(jnp.float16)
            self.weights[turn, :, column : column + 64] = convert(w)
        plgpu.commit_smem()


def _band(columns: int, most: int = 8) -> int:
    """Columns of tiles that are gone through row by row before the next: what one row of tiles reads of w stays in the
    cache for the next, and what eight columns read of x for each other."""
    return max(n for n in range(1, most + 1) if columns % n == 0)
