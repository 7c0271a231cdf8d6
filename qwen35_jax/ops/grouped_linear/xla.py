"""`grouped_linear` in plain XLA: a loop over blocks of rows of one group, as many blocks as the routed rows fill.

`lax.ragged_dot` is a kernel on TPU and is used there; on CPU and GPU XLA turns it into E times the work.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from qwen35_jax.errors import UserError
from qwen35_jax.ops.fp8 import Fp8Activation, Fp8Operand, Fp8Weight, dequantize
from qwen35_jax.ops.fp8.chunks import take
from qwen35_jax.ops.grouped_linear.blocks import SIZES, fewer_sizes, for_blocks, take_rows
from qwen35_jax.ops.grouped_linear.fp8 import grouped_linear_fp8
from qwen35_jax.ops.linear.xla import one_row, weight_array


@jax.jit  # products of the same shapes, as gate's and up's in every layer, are traced and lowered once
def grouped_linear_xla(x: jax.Array | Fp8Activation, w: jax.Array | Fp8Weight | Fp8Operand, group_sizes: jax.Array) -> jax.Array:
    """See `qwen35_jax.ops.grouped_linear.grouped_linear`."""
    shared, x = x, x.x if isinstance(x, Fp8Activation) else x
    check_operands(x, w, group_sizes)
    shape = weight_array(w).shape
    rows, ins, outs = x.shape[0], x.shape[1:], shape[x.ndim :]
    if 0 in x.shape or 0 in shape:
        return jnp.zeros((rows, *outs), x.dtype)
    if isinstance(w, Fp8Operand):
        return grouped_linear_fp8(shared, w, group_sizes, _product)
    if isinstance(w, Fp8Weight):
        return _fp8_product(x, w, group_sizes).reshape(rows, *outs)
    w = w.astype(x.dtype).reshape(shape[0], math.prod(ins), math.prod(outs))
    return _product(x.reshape(rows, -1), w, group_sizes).reshape(rows, *outs)


def check_operands(x: jax.Array, w: jax.Array | Fp8Weight | Fp8Operand, group_sizes: jax.Array) -> None:
    shape = weight_array(w).shape
    if shape[1 : x.ndim] != x.shape[1:] or group_sizes.shape != shape[:1]:
        raise UserError(f"grouped_linear: x {x.shape}, w {shape} and group_sizes {group_sizes.shape} do not fit")


@jax.custom_vjp
def _product(x, w, group_sizes):
    """x [R, in], w [E, in, out] of the same dtype -> [R, out]."""
    cpu = functools.partial(_forward_loop, sizes=fewer_sizes(x.shape[0], w.shape[0]))
    return jax.lax.platform_dependent(x, w, group_sizes, cpu=cpu, tpu=_ragged_dot, default=_forward_loop)


def _product_forward(x, w, group_sizes):
    return _product(x, w, group_sizes), (x, w, group_sizes)


def _product_backward(residuals, dy):
    x, w, _ = residuals
    cpu = functools.partial(_backward_loop, sizes=fewer_sizes(x.shape[0], w.shape[0]))
    dx, dw = jax.lax.platform_dependent(*residuals, dy, cpu=cpu, tpu=_ragged_dot_backward, default=_backward_loop)
    return dx, dw, None


_product.defvjp(_product_forward, _product_backward)


def _ragged_dot(x, w, group_sizes):
    out = jax.lax.ragged_dot(x, w, group_sizes, preferred_element_type=x.dtype)
    return _zero_beyond(out, group_sizes)


def _ragged_dot_backward(x, w, group_sizes, dy):
    """Of `ragged_dot` itself: rows beyond the groups have no group to send a gradient to."""
    dot = functools.partial(jax.lax.ragged_dot, group_sizes=group_sizes, preferred_element_type=x.dtype)
    dx, dw = jax.vjp(dot, x, w)[1](_zero_beyond(dy, group_sizes))
    return _zero_beyond(dx, group_sizes), dw


def _zero_beyond(a, group_sizes):
    return jnp.where((jnp.arange(a.shape[0]) < group_sizes.sum())[:, None], a, 0)


def _forward_loop(x, w, group_sizes, sizes=SIZES):
    return rows_times(x, w, take, group_sizes, w.shape[2], sizes)


def _backward_loop(x, w, group_sizes, dy, sizes=SIZES):
    dx = rows_times(dy, w, lambda w, group: take(w, group).astype(jnp.float32).T, group_sizes, w.shape[1], sizes)
    return dx, _outer_products(x, dy, group_sizes, sizes).astype(w.dtype)


def rows_times(x, w, weight_of, group_sizes, width: int, sizes=SIZES):
    """x [R, in] times weight_of(w, group) [in, width], block by block -> [R, width] in x's dtype."""

    def block(out, operands, group, start, size, mine):
        x, w = operands
        y = _dot(take_rows(x, start, size), weight_of(w, group))
        old = jax.lax.dynamic_slice_in_dim(out, start, size)
        return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(mine, y, old), start, 0)

    # Carried in float32: XLA:CPU would convert all of a bfloat16 array at every update of a slice of it.
    out = jnp.zeros((x.shape[0], width), jnp.float32)
    return for_blocks(block, out, (x, w), group_sizes, x.shape[0], sizes).astype(x.dtype)


def _dot(x, w):
    """x [rows, in] times w [in, out] -> float32, in the forms that XLA:CPU does fast."""
    if w.dtype == jnp.float32:
        return jnp.dot(x.astype(jnp.float32), w)
    return one_row(x, w, 1) if x.shape[0] == 1 else jnp.dot(x, w, preferred_element_type=jnp.float32)


def _outer_products(x, dy, group_sizes, sizes):
    """The weight's gradient: x [R, in], dy [R, out] -> [E, in, out] float32."""

    def block(dw, operands, group, start, size, mine):
        x, dy = operands
        rows = jnp.where(mine, take_rows(x, start, size).astype(jnp.float32), 0)
        update = jnp.dot(rows.T, take_rows(dy, start, size).astype(jnp.float32))
        old = jax.lax.dynamic_index_in_dim(dw, group, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(dw, old + update, group, 0)

    dw = jnp.zeros((group_sizes.shape[0], x.shape[1], dy.shape[1]), jnp.float32)
    return for_blocks(block, dw, (x, dy), group_sizes, x.shape[0], sizes)


@jax.custom_vjp
def _fp8_product(x, w, group_sizes):
    """x [R, *in], w [E, *in, *out] -> [R, out]; each group's weight is dequantised when it is used."""

    def loop(x, w, group_sizes):
        width = math.prod(w.values.shape[x.ndim :])
        weight_of = functools.partial(dequantized_group, dtype=x.dtype, shape=(-1, width))
        return rows_times(x.reshape(x.shape[0], -1), w, weight_of, group_sizes, width)

    def tpu(x, w, group_sizes):
        rows, groups = x.shape[0], w.values.shape[0]
        return _ragged_dot(x.reshape(rows, -1), dequantize(w, x.dtype).reshape(groups, x[0].size, -1), group_sizes)

    return jax.lax.platform_dependent(x, w, group_sizes, tpu=tpu, default=loop)


def dequantized_group(w: Fp8Weight, group, *, dtype, shape):
    return dequantize(Fp8Weight(take(w.values, group), take(w.scales, group)), dtype).reshape(shape)


def _fp8_product_forward(x, w, group_sizes):
    return _fp8_product(x, w, group_sizes), (x, w, group_sizes)


def _fp8_product_backward(residuals, dy):
    return rows_gradient(*residuals, dy), None, None


def rows_gradient(x: jax.Array, w: Fp8Weight, group_sizes: jax.Array, dy: jax.Array) -> jax.Array:
    """The gradient of x, of the product with the dequantised weights."""
    width = x[0].size

    def weight_of(w, group):
        return dequantized_group(w, group, dtype=x.dtype, shape=(width, -1)).astype(jnp.float32).T

    return rows_times(dy, w, weight_of, group_sizes, width).astype(x.dtype).reshape(x.shape)


_fp8_product.defvjp(_fp8_product_forward, _fp8_product_backward)
