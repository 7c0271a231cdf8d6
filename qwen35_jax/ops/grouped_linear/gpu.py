"""`grouped_linear` on Hopper: kernels for bfloat16 and for weights in FP8, forward and backward."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from qwen35_jax.ops.fp8 import Fp8Activation, Fp8Operand, Fp8Weight, dequantize
from qwen35_jax.ops.fp8.blocks import quantize_blocks
from qwen35_jax.ops.fp8.training import dequantize_blocks
from qwen35_jax.ops.grouped_linear.fp8 import grouped_linear_fp8
from qwen35_jax.ops.grouped_linear.quantized import check_quantized
from qwen35_jax.ops.grouped_linear.xla import check_operands
from qwen35_jax.ops.hopper.gradients import gradients
from qwen35_jax.ops.hopper.gradients_fp8 import padded_blocks
from qwen35_jax.ops.hopper.operands import (
    block_product,
    check_available,
    flat_weight,
    pad_blocks,
    training_gradients,
    training_rows,
)
from qwen35_jax.ops.hopper.rows import rows_times
from qwen35_jax.ops.linear.xla import weight_array


def grouped_linear_gpu(x: jax.Array | Fp8Activation, w: jax.Array | Fp8Weight | Fp8Operand, group_sizes: jax.Array) -> jax.Array:
    """See `qwen35_jax.ops.grouped_linear.grouped_linear`. x is bfloat16."""
    shared, x = x, x.x if isinstance(x, Fp8Activation) else x
    check_available("grouped_linear", x)
    check_operands(x, w, group_sizes)
    shape, rows = weight_array(w).shape, x.shape[0]
    outs = shape[x.ndim :]
    if 0 in x.shape or 0 in shape:
        return jnp.zeros((rows, *outs), x.dtype)
    if isinstance(w, Fp8Operand):
        return grouped_linear_fp8(shared, w, group_sizes, _product, (training_rows, _training_gradients))
    if isinstance(w, Fp8Weight):
        quantised = None
        if isinstance(shared, Fp8Activation):
            check_quantized(shared, w, group_sizes)
            quantised = shared.values, shared.scales
        return _fp8_product(x, quantised, jax.lax.stop_gradient(w), group_sizes).reshape(rows, *outs)
    w = w.astype(x.dtype).reshape(shape[0], math.prod(x.shape[1:]), -1)
    return _product(x.reshape(rows, -1), w, group_sizes).reshape(rows, *outs)


@jax.custom_vjp
def _product(x, w, group_sizes):
    """x [R, in], w [E, in, out] bfloat16 -> [R, out]."""
    y = rows_times(pad_blocks(x, 1), pad_blocks(w, 1, 2), group_sizes, transposed=False, out_dtype=x.dtype)
    return y[:, : w.shape[2]]


def _product_forward(x, w, group_sizes):
    return _product(x, w, group_sizes), (x, w, group_sizes)


def _product_backward(residuals, dy):
    x, w, group_sizes = residuals
    _, ins, outs = w.shape
    x, dy = (pad_blocks(a, 1) for a in (x, dy))
    dx = rows_times(dy, pad_blocks(w, 1, 2), group_sizes, transposed=True, out_dtype=x.dtype)
    return dx[:, :ins], gradients(x, dy, group_sizes, w.dtype)[:, :ins, :outs], None


_product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def _fp8_product(x, quantised: tuple | None, w: Fp8Weight, group_sizes):
    """x [R, *in] times w [E, *in, *out], or quantised x (values, scales) times w; then x stands there to receive the gradient."""
    values, scales = flat_weight(w, 1, x.ndim - 1, "grouped_linear")
    if quantised is not None:
        return block_product(quantised, (values, scales), group_sizes, x.dtype)
    x = x.reshape(x.shape[0], -1)
    return rows_times(x, values, group_sizes, transposed=False, w_scales=scales, out_dtype=x.dtype)


def _fp8_product_forward(x, quantised, w, group_sizes):
    return _fp8_product(x, quantised, w, group_sizes), (x, w, group_sizes)


def _fp8_product_backward(residuals, dy):
    """That of the product with the dequantised weights, which are written out for it."""
    x, w, group_sizes = residuals
    dense = dequantize(w, x.dtype).reshape(w.values.shape[0], x[0].size, -1)
    return rows_times(dy, dense, group_sizes, transposed=True, out_dtype=x.dtype).reshape(x.shape), None, None, None


_fp8_product.defvjp(_fp8_product_forward, _fp8_product_backward)


def _training_gradients(x: tuple, dy: jax.Array, group_sizes: jax.Array, out_dtype) -> jax.Array:
    """Of every group: quantised x [R, in] and dy [R, out], both quantised along rows, 128 of one group at a time."""
    row, firsts, counts = padded_blocks(group_sizes, dy.shape[0])
    operands = (dequantize_blocks(*(_rows(a, row) for a in x)), _rows(dy, row))
    return training_gradients(*(quantize_blocks(a, (0,)) for a in operands), firsts, counts, out_dtype)


def _rows(a: jax.Array, row: jax.Array) -> jax.Array:
    """a[row], zeros where there is no such row."""
    return jnp.take(a, row, axis=0, mode="fill", fill_value=0)
