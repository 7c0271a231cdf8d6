"""`linear` on Hopper: kernels for weights in FP8; other weights are left to XLA's own products."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from qwen35_jax.ops.fp8 import BLOCK, Fp8Activation, Fp8Operand, Fp8Weight, dequantize
from qwen35_jax.ops.hopper.operands import block_product, check_available, flat_weight, training_dot
from qwen35_jax.ops.hopper.ring import SMS
from qwen35_jax.ops.hopper.rows import rows_times
from qwen35_jax.ops.linear.fp8 import linear_fp8
from qwen35_jax.ops.linear.quantized import check_summed, straight_through
from qwen35_jax.ops.linear.xla import axes_of, check_operands, einsum, linear_xla, weight_array

# Up to so many rows an FP8 weight is dequantised inside the product, read once in 8 bits; beyond, once before it, at a cost
# that the product of so many rows hides, which then is XLA's own.
FEW_ROWS = 256


def linear_gpu(x: jax.Array | Fp8Activation, w: jax.Array | Fp8Weight | Fp8Operand, spec: str, out_dtype) -> jax.Array:
    """See `qwen35_jax.ops.linear.linear`. x is bfloat16 where w is FP8. For one shard: a weight trained in FP8 has no cuts."""
    plain = x.x if isinstance(x, Fp8Activation) else x
    if not isinstance(w, Fp8Weight | Fp8Operand):
        return linear_xla(x, w, spec, out_dtype)
    check_available("linear", plain)
    check_operands(plain, weight_array(w), spec)
    out_dtype = jnp.dtype(out_dtype or plain.dtype)
    if isinstance(w, Fp8Operand):
        return linear_fp8(x, w, spec, out_dtype, training_dot)
    w = jax.lax.stop_gradient(w)
    check_summed(x.scales.shape[-1] if isinstance(x, Fp8Activation) else None, w, spec)
    if isinstance(x, Fp8Activation):
        return _product(spec, out_dtype, plain, (x.values, x.scales), w)
    return _product(spec, out_dtype, plain, None, w)


@straight_through
def _product(spec: str, out_dtype, x, quantised: tuple | None, w: Fp8Weight):
    """x times w, or quantised x (values, scales) times w; then x stands there to receive the gradient."""
    x_axes, w_axes, _ = axes_of(spec)
    ins = sum(a in x_axes for a in w_axes)
    values, scales = (a[None] for a in flat_weight(w, 0, ins, "linear"))
    rows = math.prod(x.shape[: x.ndim - ins])
    sizes, parts = jnp.full(1, rows, jnp.int32), _parts(rows, *values.shape[1:])
    if quantised is not None:
        quantised = tuple(a.reshape(rows, -1) for a in quantised)
        y = block_product(quantised, (values, scales), sizes, out_dtype, parts)
    elif rows <= FEW_ROWS:
        y = rows_times(x.reshape(rows, -1), values, sizes, transposed=False, w_scales=scales, out_dtype=out_dtype, parts=parts)
    else:
        return einsum(spec, x, dequantize(w, x.dtype), out_dtype)
    return y.reshape(*x.shape[: x.ndim - ins], *w.values.shape[ins:])


def _parts(rows: int, ins: int, outs: int) -> int:
    """Into how many parts the summed axis is cut so that all multiprocessors have a share: few rows make few tiles."""
    tiles, parts = -(-rows // BLOCK) * -(-outs // (2 * BLOCK)), 1
    while 2 * parts * tiles <= SMS and ins // BLOCK % (2 * parts) == 0:
        parts *= 2
    return parts
