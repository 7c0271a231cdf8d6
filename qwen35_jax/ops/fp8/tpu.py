"""What the TPU kernels of FP8 products share: weights as matrices of whole blocks, tiles, and the two ways to multiply a tile.

`promote` multiplies 128 terms at a time and scales the float32 result: exact, and all that FP8 activations allow. `dequantize`
writes a tile of the weight out in the dtype of x, for many rows to use. docs/kernels/fp8_tpu.md says when each is faster.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from qwen35_jax.errors import UserError
from qwen35_jax.ops.fp8.activations import Fp8Activation
from qwen35_jax.ops.fp8.blocks import BLOCK, Fp8Weight

ROWS, COLUMNS, TERMS = 512, 512, 1024  # of a tile, at most
MANY_ROWS = ROWS + 1  # from so many on, a dequantised weight is used more than once
PANEL_BYTES = 24 * 2**20  # of a dequantised weight's columns in VMEM
VMEM_BYTES = 56 * 2**20  # of 64 MiB (v5p, v7x) or 128 MiB
SUBLANES, PACKED = 8, 32  # rows of a register of float32, and of 8 bits


@dataclasses.dataclass(frozen=True)
class Tile:
    """Rows of x, columns of w and terms of the sum of one grid step; the number of steps of a sum."""

    rows: int
    columns: int
    terms: int
    steps: int

    @property
    def blocks(self) -> int:
        """Blocks of 128 terms of a step."""
        return self.terms // BLOCK


def make_tile(rows: int, terms: int, columns: int, panel_itemsize: int = 0) -> Tile:
    """The largest tile that divides terms and columns. `panel_itemsize`: bytes of a number of the dequantised weight, if any."""
    room = PANEL_BYTES // (terms * panel_itemsize) if panel_itemsize else COLUMNS
    inner = _largest(terms, TERMS)
    return Tile(min(ROWS, -(-rows // PACKED) * PACKED), _largest(columns, min(COLUMNS, max(BLOCK, room))), inner, terms // inner)


def _largest(size: int, most: int) -> int:
    """The largest divisor of `size`, itself a multiple of 128, in whole blocks and at most `most`."""
    return max(n for n in range(BLOCK, max(most, BLOCK) + 1, BLOCK) if size % n == 0)


def whole_blocks(w: Fp8Weight, count: int, lead: int = 0) -> tuple[jax.Array, jax.Array, tuple[int, ...]]:
    """w [*lead, *in, *out], `count` axes of `in`, as matrices: values [*lead, in, out], float32 scales [*lead, in / 128, out /
    128], and the shape of `out` as it is there. The last axis of `in` and of `out` is filled up to whole blocks with zeros."""
    shape, scales = w.values.shape, w.scales.shape
    blocked = (lead + count - 1, len(shape) - 1)
    wanted = tuple(-(-n // BLOCK) if axis in blocked else n for axis, n in enumerate(shape))
    if scales != wanted or blocked[0] == blocked[1]:
        place = "the last summed axis and the last axis of the result"
        raise UserError(f"pallas_tpu needs scales for blocks of {BLOCK} along {place}, {wanted} for {shape}, not {scales}")
    pad = [(0, -n % BLOCK if axis in blocked else 0) for axis, n in enumerate(shape)]
    values = jnp.pad(w.values, pad) if any(after for _, after in pad) else w.values
    ins, outs = values.shape[lead : lead + count], values.shape[lead + count :]
    values = values.reshape(*shape[:lead], math.prod(ins), math.prod(outs))
    return values, w.scales.astype(jnp.float32).reshape(*shape[:lead], *(n // BLOCK for n in values.shape[lead:])), outs


def rows_of(x: jax.Array, count: int) -> jax.Array:
    """x [..., *in] as [rows, in], the last axis filled up to whole blocks."""
    pad = -x.shape[-1] % BLOCK
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)]) if pad else x
    return x.reshape(math.prod(x.shape[: x.ndim - count]), -1)


def row_scales(x: Fp8Activation, count: int, tile: Tile) -> jax.Array:
    """`scale_rows` of the scales of x."""
    return scale_rows(x.scales.reshape(math.prod(x.scales.shape[: x.scales.ndim - count]), -1).T, tile)


def scale_rows(scales: jax.Array, tile: Tile) -> jax.Array:
    """[terms / 128, n] -> [steps, 8, n]: n along lanes, since columns so narrow would fill whole registers."""
    return jnp.pad(scales.reshape(tile.steps, tile.blocks, -1), ((0, 0), (0, SUBLANES - tile.blocks), (0, 0)))


def block(i: int) -> slice:
    return slice(i * BLOCK, (i + 1) * BLOCK)


def multiply(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [rows, n] times w [n, columns] in e4m3 -> float32. FP8 as it is; else w, exact in every dtype, in that of x."""
    if x.dtype == jnp.float8_e4m3fn:
        return jnp.dot(x, w, preferred_element_type=jnp.float32)
    return dot(x, w.astype(jnp.float32).astype(x.dtype))


def dot(x: jax.Array, w: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.dot(x, w, preferred_element_type=jnp.float32, precision=precision)


def promote(tile: Tile, x_ref, row_scales_ref, w_ref, scale, total_ref) -> None:
    """total += x times w: float32 sums of 128 products, times the scales of their rows and of their block, scale(a, b): a
    number, or one a column, [1, 128]."""
    columns = None if row_scales_ref is None else row_scales_ref[...].T  # [rows, 8]
    for a in range(tile.blocks):
        part = multiply(x_ref[:, block(a)], w_ref[block(a), :])
        # Spread over the lanes once, not once for each block of columns.
        row = 1.0 if columns is None else jnp.broadcast_to(columns[:, a : a + 1], (tile.rows, BLOCK))
        for b in range(tile.columns // BLOCK):
            total_ref[:, block(b)] += part[:, block(b)] * (row * scale(a, b))


def dequantize(tile: Tile, w_ref, scale, panel_ref) -> None:
    """panel = w x scales, rounded once to the panel's dtype."""
    for a in range(tile.blocks):
        for b in range(tile.columns // BLOCK):
            panel_ref[block(a), block(b)] = (w_ref[block(a), block(b)].astype(jnp.float32) * scale(a, b)).astype(panel_ref.dtype)


def variant(many: bool, quantized: bool) -> str:
    """The end of a kernel's name."""
    return "many_rows" if many else "activations" if quantized else "few_rows"


def compiler_params(*semantics: str):
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_BYTES)


float32_scratch = functools.partial(pltpu.VMEM, dtype=jnp.float32)
