"""`linear` of activations in FP8 with a weight in FP8, in plain XLA: e4m3 products of 128 terms, scaled and added in float32."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from qwen35_jax.errors import UserError
from qwen35_jax.ops.fp8 import BLOCK, Fp8Activation, Fp8Weight, dequantize
from qwen35_jax.ops.fp8.chunks import chunks, sum_of_chunks, sum_of_chunks_cpu
from qwen35_jax.ops.linear.xla import axes_of, check_operands, einsum


def linear_quantized(x: Fp8Activation, w: Fp8Weight, spec: str, out_dtype) -> jax.Array:
    """See `qwen35_jax.ops.linear.linear`."""
    check_operands(x.values, w.values, spec)
    check_summed(x.scales.shape[-1], w, spec)
    return _product(spec, jnp.dtype(out_dtype or x.x.dtype), x.x, (x.values, x.scales), jax.lax.stop_gradient(w))


def check_summed(x_blocks: int | None, w: Fp8Weight, spec: str) -> None:
    """UserError where the summed axes are not the last of x and the first of w, or x (if in FP8) has other blocks of them."""
    x_axes, w_axes, out = axes_of(spec)
    count = sum(a in x_axes for a in w_axes)
    ins, outs = w_axes[:count], w_axes[count:]
    if not ins or not x_axes.endswith(ins) or out != x_axes[: len(x_axes) - count] + outs:
        raise UserError(f"linear {spec!r}: in FP8 the summed axes must be the last of x and first of w, such as BTNH,NHD->BTD")
    if x_blocks not in (None, w.scales.shape[count - 1]):
        scales = f"x has {x_blocks} along {ins[-1]}, w {w.scales.shape[count - 1]}"
        raise UserError(f"linear {spec!r}: in FP8 x and w must have scales for the same blocks of {BLOCK}; {scales}")


def straight_through(product: Callable) -> Callable:
    """product(spec, out_dtype, x, quantised, w) -> y with a gradient of x alone, as if x had not been rounded. quantised: x's
    (values, scales), or None where x itself is multiplied."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
    def differentiable(spec: str, out_dtype, x: jax.Array, quantised: tuple | None, w: Fp8Weight) -> jax.Array:
        return product(spec, out_dtype, x, quantised, w)

    def forward(spec, out_dtype, x, quantised, w):
        return product(spec, out_dtype, x, quantised, w), (x, w)

    def backward(spec, out_dtype, residuals, dy):
        x, w = residuals
        x_axes, w_axes, out = axes_of(spec)
        dx = einsum(f"{out},{w_axes}->{x_axes}", dy.astype(x.dtype), dequantize(w, x.dtype), x.dtype)
        return dx, None, None

    differentiable.defvjp(forward, backward)
    return differentiable


@straight_through
def _product(spec: str, out_dtype, x, quantised: tuple, w: Fp8Weight):
    """Quantised x times w."""
    x_axes, w_axes, _ = axes_of(spec)
    count = sum(a in x_axes for a in w_axes)
    cpu, default = (functools.partial(form, out_dtype=out_dtype) for form in (sum_of_chunks_cpu, sum_of_chunks))
    y = jax.lax.platform_dependent(*chunks(*quantised, w, count), cpu=cpu, default=default)
    return y.reshape(*x.shape[: x.ndim - count], *w.values.shape[count:])
