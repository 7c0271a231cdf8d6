"""`grouped_linear` of activations in FP8 with weights in FP8, in plain XLA.

TPU: `lax.ragged_dot` of each block of 128 of the summed axis. GPU and CPU: blocks of rows of one group.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen35_jax.errors import UserError
from qwen35_jax.ops.fp8 import BLOCK, Fp8Activation, Fp8Weight
from qwen35_jax.ops.fp8.chunks import chunks, sum_of_chunks_few, take
from qwen35_jax.ops.grouped_linear import fp8, xla
from qwen35_jax.ops.grouped_linear.blocks import for_blocks, take_rows


def grouped_linear_quantized(x: Fp8Activation, w: Fp8Weight, group_sizes: jax.Array) -> jax.Array:
    """See `qwen35_jax.ops.grouped_linear.grouped_linear`."""
    check_quantized(x, w, group_sizes)
    if 0 in x.values.shape or 0 in w.values.shape:
        return jnp.zeros((x.values.shape[0], w.values.shape[2]), x.x.dtype)
    return _product(x.x, x.values, x.scales, jax.lax.stop_gradient(w), group_sizes)


def check_quantized(x: jax.Array | Fp8Activation, w: Fp8Weight, group_sizes: jax.Array) -> None:
    """UserError where the operands are not x [R, in], w [E, in, out] with scales for the same blocks of `in`."""
    values, weights, scales = (x.x if isinstance(x, Fp8Activation) else x).shape, w.values.shape, w.scales.shape
    if len(values) != 2 or len(weights) != 3 or weights[1] != values[1] or group_sizes.shape != weights[:1]:
        shapes = f"x {values}, w {weights} and group_sizes {group_sizes.shape}"
        raise UserError(f"grouped_linear: {shapes} do not fit; in FP8 pass x [R, in], w [E, in, out], group_sizes [E]")
    x_scales = x.scales.shape if isinstance(x, Fp8Activation) else None
    if scales != (weights[0], *(-(-n // BLOCK) for n in weights[1:])) or x_scales not in (None, (values[0], scales[1])):
        have = f"x has scales {x_scales}, w {scales}"
        raise UserError(f"grouped_linear: in FP8 x needs a scale per 1x{BLOCK} and w one per {BLOCK}x{BLOCK}; {have}")


@jax.custom_vjp
def _product(x, values, scales, w: Fp8Weight, group_sizes):
    """values x scales times the groups' weights; x stands there to receive the gradient."""

    def loop(values, scales, w, group_sizes):
        return fp8.rows_times((values, scales), (w.values, w.scales), 0, group_sizes)

    def tpu(values, scales, w, group_sizes):
        return fp8.ragged_blocks((values, scales), (w.values, w.scales), group_sizes)

    y = jax.lax.platform_dependent(values, scales, w, group_sizes, cpu=_rows_times_cpu, tpu=tpu, default=loop)
    return y.astype(x.dtype)


def _rows_times_cpu(values, scales, w: Fp8Weight, group_sizes):
    """-> [R, out] float32."""

    def block(out, operands, group, start, size, mine):
        values, scales, w = operands
        w = Fp8Weight(take(w.values, group), take(w.scales, group))
        y = sum_of_chunks_few(*chunks(take_rows(values, start, size), take_rows(scales, start, size), w, 1))
        old = jax.lax.dynamic_slice_in_dim(out, start, size)
        return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(mine, y, old), start, 0)

    rows = values.shape[0]
    return for_blocks(block, jnp.zeros((rows, w.values.shape[2]), jnp.float32), (values, scales, w), group_sizes, rows)


def _product_forward(x, values, scales, w, group_sizes):
    return _product(x, values, scales, w, group_sizes), (x, w, group_sizes)


def _product_backward(residuals, dy):
    x, w, group_sizes = residuals
    return xla.rows_gradient(x, w, group_sizes, dy), None, None, None, None


_product.defvjp(_product_forward, _product_backward)
