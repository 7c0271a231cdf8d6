"""`grouped_linear` in FP8, forward and backward, in plain XLA. The residual is x in 8 bits; weights are quantised again.

TPU: `lax.ragged_dot` of each block of 128 of the summed axis. GPU: blocks of rows of one group. On the CPU the operands
are rounded to FP8 but multiplied in float32. The weights' gradients are made 128 rows of one group at a time everywhere.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from qwen35_jax.ops.fp8.activations import Fp8Activation
from qwen35_jax.ops.fp8.blocks import BLOCK, expand_scales, quantize_blocks, round_blocks
from qwen35_jax.ops.fp8.chunks import take
from qwen35_jax.ops.fp8.statistics import difference, operand_statistics, pack
from qwen35_jax.ops.fp8.training import Fp8Operand, block_dot, dequantize_blocks, float_dot
from qwen35_jax.ops.grouped_linear.blocks import for_blocks, take_rows

# Rows of a block of the weights' gradients: one scale for up to 128 rows. On the CPU few rows cost less.
ROWS = (BLOCK,)
CPU_ROWS = (8, 32, BLOCK)


def grouped_linear_fp8(x: jax.Array | Fp8Activation, w: Fp8Operand, group_sizes: jax.Array, plain, kernels=None) -> jax.Array:
    """See `qwen35_jax.ops.grouped_linear.grouped_linear`; shapes are checked, nothing is empty. `plain(x, w, group_sizes)`
    is the product of floats: x [R, in], w [E, in, out] -> [R, out]. kernels: what is
    taken for `rows_times` and `_weight_gradients`: (x, w, side, group_sizes, dtype) and (x, dy, group_sizes, dtype)."""
    shared, x = (x, x.x) if isinstance(x, Fp8Activation) else (None, x)
    rows, groups, outs = x.shape[0], w.value.shape[0], w.value.shape[x.ndim :]
    flat = x.reshape(rows, -1)
    if shared is not None and x.ndim == 2:
        values, scales = shared.values, shared.scales
    else:
        values, scales = quantize_blocks(jax.lax.stop_gradient(flat), (1,))
    axis = w.statistics_axis
    weight = w.value.reshape(groups, flat.shape[1], math.prod(outs))
    if axis is not None:  # that of the flattened weight which holds the axis
        axis = 1 if axis % w.value.ndim < x.ndim else 2
    return _product(plain, kernels, x.dtype, axis, flat, values, scales, weight, group_sizes).reshape(rows, *outs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _product(plain, kernels, dtype, statistics_axis, x, values, scales, w, group_sizes):
    """values x scales [R, in] times w [E, in, out] -> [R, out]; x stands there to receive the gradient."""
    if kernels:
        return kernels[0]((values, scales), quantize_blocks(w, (1, 2)), 0, group_sizes, dtype)

    def cpu(x, w, group_sizes):
        return plain(dequantize_blocks(*x), round_blocks(w, (1, 2)), group_sizes)

    def loop(x, w, group_sizes):
        return rows_times(x, quantize_blocks(w, (1, 2)), 0, group_sizes)

    def tpu(x, w, group_sizes):
        return ragged_blocks(x, quantize_blocks(w, (1, 2)), group_sizes)

    y = jax.lax.platform_dependent((values, scales), w, group_sizes, cpu=cpu, tpu=tpu, default=loop)
    return y.astype(dtype)


def _product_forward(plain, kernels, dtype, statistics_axis, x, values, scales, w, group_sizes):
    y = _product(plain, kernels, dtype, statistics_axis, x, values, scales, w, group_sizes)
    statistics = None
    if statistics_axis is not None:
        inside = _inside(x, group_sizes)
        rounded = dequantize_blocks(values, scales)
        parts = [
            difference(plain(x, w.astype(dtype), group_sizes), y),
            operand_statistics(jnp.where(inside, x, 0), jnp.where(inside, rounded, 0)),
        ]
        statistics = jnp.concatenate([*parts, operand_statistics(w, round_blocks(w, (1, 2)))])
    return y, (values, scales, w, group_sizes, statistics)


def _product_backward(plain, kernels, dtype, statistics_axis, residuals, dy):
    values, scales, w, group_sizes, statistics = residuals
    x, dy = (values, scales), dy.astype(dtype)

    def cpu(x, w, dy, group_sizes):
        dx = plain(round_blocks(dy, (1,)), round_blocks(w, (1, 2)).swapaxes(1, 2), group_sizes)
        return dx, _weight_gradients(round_blocks, float_dot, CPU_ROWS, x, dy, group_sizes)

    def loop(x, w, dy, group_sizes):
        dx = rows_times(quantize_blocks(dy, (1,)), quantize_blocks(w, (1, 2)), 1, group_sizes)
        return dx, _weight_gradients(quantize_blocks, block_dot, ROWS, x, dy, group_sizes)

    def tpu(x, w, dy, group_sizes):
        turned = tuple(a.swapaxes(1, 2) for a in quantize_blocks(w, (1, 2)))
        dx = ragged_blocks(quantize_blocks(dy, (1,)), turned, group_sizes)
        return dx, _weight_gradients(quantize_blocks, block_dot, ROWS, x, dy, group_sizes)

    def kernel(x, w, dy, group_sizes):
        dx = kernels[0](quantize_blocks(dy, (1,)), quantize_blocks(w, (1, 2)), 1, group_sizes, dtype)
        return dx, kernels[1](x, dy, group_sizes, w.dtype)

    if kernels:
        dx, dw = kernel(x, w, dy, group_sizes)
    else:
        dx, dw = jax.lax.platform_dependent(x, w, dy, group_sizes, cpu=cpu, tpu=tpu, default=loop)
    dw = dw.astype(w.dtype)
    if statistics_axis is not None:
        dy = jnp.where(_inside(dy, group_sizes), dy, 0)
        statistics = jnp.concatenate([statistics, operand_statistics(dy, round_blocks(dy, (1,)))])
        dw = pack(statistics, w.shape, statistics_axis, w.dtype)
    return dx.astype(dtype), None, None, dw, None


_product.defvjp(_product_forward, _product_backward)


def _inside(a: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """[R, 1] bool: the rows that belong to a group."""
    return (jnp.arange(a.shape[0]) < group_sizes.sum())[:, None]


def rows_times(x: tuple, w: tuple, side: int, group_sizes: jax.Array) -> jax.Array:
    """Quantised x [R, .] times w [E, in, out], summed over side 0 (in) or 1 (out) of w -> float32."""
    rows = x[0].shape[0]

    def block(out, operands, group, start, size, mine):
        x, w = operands
        x = tuple(take_rows(a, start, size)[None, :, None] for a in x)
        w = tuple(a[None, :, None] for a in (take(a, group) for a in w))
        y = block_dot(x, 1, w, side).reshape(size, -1)
        old = jax.lax.dynamic_slice_in_dim(out, start, size)
        return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(mine, y, old), start, 0)

    out = jnp.zeros((rows, w[0].shape[2 - side]), jnp.float32)
    return for_blocks(block, out, (x, w), group_sizes, rows)


def ragged_blocks(x: tuple, w: tuple, group_sizes: jax.Array) -> jax.Array:
    """Quantised x [R, in] times w [E, in, out] -> float32 [R, out], a block of 128 of `in` at a time."""
    (values, scales), (weights, weight_scales) = x, w
    rows, size = values.shape
    groups, _, width = weights.shape
    block = min(size, BLOCK)
    pad = -size % block
    values, weights = jnp.pad(values, ((0, 0), (0, pad))), jnp.pad(weights, ((0, 0), (0, pad), (0, 0)))
    group = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(rows), side="right")
    group = jnp.minimum(group, groups - 1)

    def step(i, total):
        here = jax.lax.dynamic_slice_in_dim(values, i * block, block, 1)
        part = jax.lax.dynamic_slice_in_dim(weights, i * block, block, 1)
        y = jax.lax.ragged_dot(here, part, group_sizes, preferred_element_type=jnp.float32)
        row_scale = jax.lax.dynamic_slice_in_dim(scales, i, 1, 1).astype(jnp.float32)
        part_scale = jax.lax.dynamic_index_in_dim(weight_scales, i, 1, keepdims=False)[group]
        return total + y * (row_scale * expand_scales(part_scale, (rows, width)))

    total = jax.lax.fori_loop(0, scales.shape[1], step, jnp.zeros((rows, width), jnp.float32))
    return jnp.where(_inside(total, group_sizes), total, 0)


def _weight_gradients(quantised, dot, sizes: tuple[int, ...], x: tuple, dy: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Of every group: quantised x [R, in] and dy [R, out], both quantised along rows -> [E, in, out] float32."""

    def block(dw, operands, group, start, size, mine):
        x, dy = operands
        x = dequantize_blocks(*(take_rows(a, start, size) for a in x))
        a, b = (jnp.where(mine, r, 0)[None, :, None] for r in (x, take_rows(dy, start, size).astype(jnp.float32)))
        update = dot(quantised(a, (1,)), 0, quantised(b, (1,)), 0).reshape(dw.shape[1:])
        old = jax.lax.dynamic_index_in_dim(dw, group, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(dw, old + update, group, 0)

    dw = jnp.zeros((group_sizes.shape[0], x[0].shape[1], dy.shape[1]), jnp.float32)
    return for_blocks(block, dw, (x, dy), group_sizes, dy.shape[0], sizes)
