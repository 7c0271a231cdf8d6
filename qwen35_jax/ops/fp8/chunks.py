"""Products of activations in FP8 with a weight in FP8, in plain XLA: e4m3 products of 128 terms, scaled and added in float32.

The same arithmetic in the same order as the kernels': total + sum x (scale of the row x scale of the block), block after block,
since an activation beside the middle of two e4m3 numbers is rounded to the other one for a difference in its last bit. In a loop:
of unrolled steps, or of a reduction, XLA:CPU contracts other multiplications and additions to one operation.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from qwen35_jax.ops.fp8.blocks import BLOCK, Fp8Weight, expand_scales

ROWS = 512  # multiplied by a chunk of the weight at a time on the CPU; for each such tile it is converted anew


def chunks(values: jax.Array, scales: jax.Array, w: Fp8Weight, count: int) -> tuple[jax.Array, ...]:
    """The summed axes (`count` of them) as J chunks of C terms that have one scale: x [M, J, C], its scales [M, J], w [J, C, O],
    its scales [J, O] float32. C is 128, or all of a narrower axis; the end of a wider one is filled up with zeros."""
    last, outer = values.shape[-1], math.prod(w.values.shape[: count - 1])
    width = min(last, BLOCK)
    pad = -last % width
    pairs = -(-last // width) * outer
    x = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, pad)]).reshape(-1, pairs, width)
    weights = jnp.pad(w.values, [(0, pad if axis == count - 1 else 0) for axis in range(w.values.ndim)])
    expanded = expand_scales(w.scales, (*w.values.shape[: count - 1], w.scales.shape[count - 1], *w.values.shape[count:]))
    return x, scales.reshape(-1, pairs), weights.reshape(pairs, width, -1), expanded.reshape(pairs, -1)


def sum_of_chunks(x, x_scales, w, w_scales, out_dtype) -> jax.Array:
    """What `chunks` gives -> [M, O], float32 sums cast once."""

    def part(j):
        return jnp.dot(_at(x, j, 1), _at(w, j), preferred_element_type=jnp.float32)

    return _scaled_sum(part, x_scales, w_scales).astype(out_dtype)


def sum_of_chunks_cpu(x, x_scales, w, w_scales, out_dtype) -> jax.Array:
    """`sum_of_chunks` of operands of which XLA:CPU writes one chunk at a time in float32, in which it multiplies e4m3."""
    tiles = _tiles(x.shape[0])
    if tiles == 1:
        return _tile(x, x_scales, w, w_scales).astype(out_dtype)

    def tile(rows):
        total = _tile(jax.lax.bitcast_convert_type(rows[0], w.dtype), rows[1], w, w_scales)
        return as_bits(total.astype(out_dtype))

    rows = (a.reshape(tiles, -1, *a.shape[1:]) for a in (as_bits(x), x_scales))
    return jax.lax.bitcast_convert_type(jax.lax.map(tile, tuple(rows)), out_dtype).reshape(x.shape[0], -1)


def _tiles(rows: int) -> int:
    """How many equal parts of at most ROWS the rows are cut into; 1 where they have no useful divisor."""
    least = -(-rows // ROWS)
    return next((n for n in range(least, 4 * least) if rows % n == 0), 1)


def _tile(x, x_scales, w, w_scales):
    def part(j):
        # Ties the operands to this step: without it XLA:CPU converts all of them before the loop.
        (a, b), j = jax.lax.optimization_barrier(((x, w), j))
        return jnp.dot(take(a, j, 1).astype(jnp.float32), take(b, j).astype(jnp.float32))

    return _scaled_sum(part, x_scales, w_scales)


def sum_of_chunks_few(x, x_scales, w, w_scales) -> jax.Array:
    """`sum_of_chunks` of up to 64 rows or so on the CPU: all of w is multiplied at once, on all cores, into an array that is no
    larger. Faster where this is done for one expert after the other."""
    dims = ((2,), (1,)), ((1,), (0,))
    parts = jax.lax.dot_general(x.astype(jnp.float32), w.astype(jnp.float32), dims)
    return _scaled_sum(lambda j: _at(parts, j), x_scales, w_scales)


def _scaled_sum(part, x_scales, w_scales) -> jax.Array:
    """The sum over j of part(j) [M, O] times the scales of its rows and of its columns."""

    def step(j, total):
        return total + part(j) * (_at(x_scales, j, 1)[:, None] * _at(w_scales, j))

    count, width = w_scales.shape
    total = jnp.zeros((x_scales.shape[0], width), jnp.float32)
    return step(0, total) if count == 1 else jax.lax.fori_loop(0, count, step, total)


def _at(a: jax.Array, index: jax.Array, axis: int = 0) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(a, index, axis, keepdims=False)


def as_bits(a: jax.Array) -> jax.Array:
    """The array as integers of its width: XLA:CPU slices those in place, but a narrow float it first converts whole."""
    return a if a.dtype.itemsize > 2 else jax.lax.bitcast_convert_type(a, f"uint{8 * a.dtype.itemsize}")


def take(a: jax.Array, index: jax.Array, axis: int = 0) -> jax.Array:
    """a[index] along an axis, of any dtype."""
    return jax.lax.bitcast_convert_type(_at(as_bits(a), index, axis), a.dtype)
