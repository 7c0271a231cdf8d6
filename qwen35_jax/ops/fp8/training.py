"""FP8 training: weights that are multiplied in FP8, and the products of quantised operands.

As DeepSeek-V3 does: e4m3 everywhere, gradients too, since one scale per 128 values gives the range that e5m2 is for;
activations and gradients with one scale per 1x128 along the axis that is summed, weights with one per 128x128.

Operands of a product are matrices in four dimensions, [parts, rows, parts, columns]: an axis that a mesh cuts shows its
parts, so that no block and no loop over blocks crosses from one device to another. Side 0 is the first pair, side 1 the
second. A quantised operand is a pair (values, scales) as `quantize_blocks` makes it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from qwen35_jax.ops.fp8.blocks import BLOCK, expand_scales


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8Operand:
    """A bfloat16 or float32 weight that `linear` and `grouped_linear` multiply in FP8, forward and backward.

    Unlike `Fp8Weight` it is trained: its gradient is an Fp8Operand of the weight's gradient, in the weight's dtype.
    cuts: ((letter, n), ...): the automatically partitioned mesh cuts the axis of this letter into n parts; blocks of 128
    begin anew in every part. () inside `shard_map` and on one device. statistics_axis: where it is not None, the backward
    pass returns the statistics of `statistics.py` along this axis (negative: counted from the end) instead of the gradient.
    """

    value: jax.Array
    cuts: tuple[tuple[str, int], ...] = dataclasses.field(default=(), metadata={"static": True})
    statistics_axis: int | None = dataclasses.field(default=None, metadata={"static": True})


def dequantize_blocks(values: jax.Array, scales: jax.Array) -> jax.Array:
    """The inverse of `quantize_blocks`, float32."""
    return values.astype(jnp.float32) * expand_scales(scales, values.shape)


def block_dot(a: tuple, a_side: int, b: tuple, b_side: int) -> jax.Array:
    """The product of two quantised operands, summed over `a_side` of a and `b_side` of b -> float32 [*kept a, *kept b].

    A loop over the blocks of the summed axis: an FP8 product of each, times its scales, added up in float32. Parts of
    the summed axis are added at the end.
    """
    a, b = (_whole_blocks(*operand, 2 * side + 1) for operand, side in ((a, a_side), (b, b_side)))
    width = min(a[0].shape[2 * a_side + 1], BLOCK)

    def step(i, total):
        x, y = (jax.lax.dynamic_slice_in_dim(v, i * width, width, 2 * s + 1) for (v, _), s in ((a, a_side), (b, b_side)))
        dims = ((2 * a_side + 1,), (2 * b_side + 1,)), ((2 * a_side,), (2 * b_side,))
        part = jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)
        x_scale, y_scale = _scales_of(*a, a_side, i), _scales_of(*b, b_side, i)
        return total + part * (x_scale[..., None, None] * y_scale[:, None, None])

    parts, kept_a, kept_b = a[0].shape[2 * a_side], _kept(a[0], a_side), _kept(b[0], b_side)
    total = jnp.zeros((parts, *kept_a, *kept_b), jnp.float32)
    count = a[0].shape[2 * a_side + 1] // width
    return (step(0, total) if count == 1 else jax.lax.fori_loop(0, count, step, total)).sum(0)


def float_dot(a: jax.Array, a_side: int, b: jax.Array, b_side: int) -> jax.Array:
    """`block_dot` of operands in float32 or bfloat16: one product of two matrices, float32 accumulation."""
    kept = _kept(a, a_side) + _kept(b, b_side)
    a, b = (x.reshape(x.shape[0] * x.shape[1], -1) for x in (a, b))
    dims = ((a_side,), (b_side,)), ((), ())
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32).reshape(kept)


def _kept(a: jax.Array, side: int) -> tuple[int, ...]:
    return a.shape[2:] if side == 0 else a.shape[:2]


def _whole_blocks(values: jax.Array, scales: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Zeros behind an axis that ends within a block, other than the first."""
    size = values.shape[axis]
    pad = [(0, 0)] * values.ndim
    pad[axis] = (0, -size % BLOCK if size > BLOCK else 0)
    return jnp.pad(values, pad), scales


def _scales_of(values: jax.Array, scales: jax.Array, side: int, i: jax.Array) -> jax.Array:
    """The scales of block i of the summed side, float32 [parts, *kept]."""
    scales = jax.lax.dynamic_index_in_dim(scales, i, 2 * side + 1, keepdims=False)
    scales = jnp.moveaxis(scales, 2 * side, 0)
    return expand_scales(scales, (scales.shape[0], *_kept(values, side)))
