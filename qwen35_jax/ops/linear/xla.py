"""`linear` in plain XLA."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from qwen35_jax.errors import UserError
from qwen35_jax.ops.fp8 import Fp8Weight, dequantize


def linear_xla(x: jax.Array, w: jax.Array | Fp8Weight, spec: str, out_dtype) -> jax.Array:
    """See `qwen35_jax.ops.linear.linear`."""
    _check(x, w.values if isinstance(w, Fp8Weight) else w, spec)
    if isinstance(w, Fp8Weight):
        # Constant for differentiation: nothing updates an FP8 weight through its gradient.
        w = dequantize(jax.lax.stop_gradient(w), x.dtype)
    return _product(spec, jnp.dtype(out_dtype), x, w.astype(x.dtype))


def _check(x: jax.Array, w: jax.Array, spec: str) -> None:
    sizes = {}
    inputs = spec.partition("->")[0].split(",")
    if len(inputs) != 2 or (len(inputs[0]), len(inputs[1])) != (x.ndim, w.ndim):
        raise UserError(f"linear {spec!r} does not fit x {x.shape} and w {w.shape}")
    for letter, size in zip(inputs[0] + inputs[1], x.shape + w.shape, strict=True):
        if sizes.setdefault(letter, size) != size:
            raise UserError(f"linear {spec!r}: axis {letter} is {sizes[letter]} in x {x.shape} and {size} in w {w.shape}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(spec: str, out_dtype, x: jax.Array, w: jax.Array) -> jax.Array:
    return _einsum(spec, x, w, out_dtype)


def _product_forward(spec, out_dtype, x, w):
    return _einsum(spec, x, w, out_dtype), (x, w)


def _product_backward(spec, out_dtype, residuals, dy):
    x, w = residuals
    inputs, out = spec.split("->")
    x_axes, w_axes = inputs.split(",")
    dy = dy.astype(x.dtype)
    return _einsum(f"{out},{w_axes}->{x_axes}", dy, w, x.dtype), _einsum(f"{x_axes},{out}->{w_axes}", x, dy, w.dtype)


_product.defvjp(_product_forward, _product_backward)


def _einsum(spec: str, a: jax.Array, b: jax.Array, out_dtype) -> jax.Array:
    def default(a, b):
        return jnp.einsum(spec, a, b, preferred_element_type=out_dtype)

    def cpu(a, b):
        return jnp.einsum(spec, a.astype(jnp.float32), b.astype(jnp.float32)).astype(out_dtype)

    if a.dtype == jnp.float32:
        return default(a, b).astype(out_dtype)
    # XLA:CPU multiplies bfloat16 matrices thirty times slower than float32 ones.
    return jax.lax.platform_dependent(a, b, cpu=cpu, default=default)
