"""`linear` in plain XLA: an einsum, written for the CPU in the forms that XLA:CPU multiplies bfloat16 fast."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from qwen35_jax.errors import UserError
from qwen35_jax.ops.fp8 import Fp8Activation, Fp8Operand, Fp8Weight, dequantize
from qwen35_jax.ops.linear.fp8 import linear_fp8

# On the CPU, one row is multiplied in this many parts of the contracted axis, each of at least MIN_PART. A constant, so
# that any sharding of the axis over 2, 4 or 8 devices is a sharding of the parts.
PARTS = 8
MIN_PART = 128
# Up to this many rows, a weight stored [out, in] is converted slab by slab, each of at most SLAB elements (of the sizes
# that were tried, those of 2 to 8 MB in float32 were the fastest).
FEW_ROWS = 16
SLAB = 2**20


def linear_xla(x: jax.Array | Fp8Activation, w: jax.Array | Fp8Weight | Fp8Operand, spec: str, out_dtype) -> jax.Array:
    """See `qwen35_jax.ops.linear.linear`."""
    shared, x = x, x.x if isinstance(x, Fp8Activation) else x
    check_operands(x, weight_array(w), spec)
    out_dtype = out_dtype or x.dtype
    if isinstance(w, Fp8Operand):
        return linear_fp8(shared, w, spec, out_dtype)
    if isinstance(w, Fp8Weight):
        # Constant for differentiation: nothing updates an FP8 weight through its gradient.
        w = dequantize(jax.lax.stop_gradient(w), x.dtype)
    return _product(spec, jnp.dtype(out_dtype), x, w.astype(x.dtype))


def weight_array(w: jax.Array | Fp8Weight | Fp8Operand) -> jax.Array:
    """The array that has the weight's shape."""
    if isinstance(w, Fp8Weight):
        return w.values
    return w.value if isinstance(w, Fp8Operand) else w


def check_operands(x: jax.Array, w: jax.Array, spec: str) -> None:
    inputs = spec.partition("->")[0].split(",")
    if len(inputs) != 2 or (len(inputs[0]), len(inputs[1])) != (x.ndim, w.ndim):
        raise UserError(f"linear {spec!r} does not fit x {x.shape} and w {w.shape}")
    sizes: dict[str, int] = {}
    for letter, size in zip(inputs[0] + inputs[1], x.shape + w.shape, strict=True):
        if sizes.setdefault(letter, size) != size:
            raise UserError(f"linear {spec!r}: axis {letter} differs in x {x.shape} and w {w.shape}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(spec: str, out_dtype, x: jax.Array, w: jax.Array) -> jax.Array:
    return einsum(spec, x, w, out_dtype)


def _product_forward(spec, out_dtype, x, w):
    return einsum(spec, x, w, out_dtype), (x, w)


def _product_backward(spec, out_dtype, residuals, dy):
    x, w = residuals
    x_axes, w_axes, out = axes_of(spec)
    dy = dy.astype(x.dtype)
    return einsum(f"{out},{w_axes}->{x_axes}", dy, w, x.dtype), einsum(f"{x_axes},{out}->{w_axes}", x, dy, w.dtype)


_product.defvjp(_product_forward, _product_backward)


def axes_of(spec: str) -> tuple[str, str, str]:
    inputs, out = spec.split("->")
    return *inputs.split(","), out


def einsum(spec: str, x: jax.Array, w: jax.Array, out_dtype) -> jax.Array:
    """The product. Its form is chosen when it is lowered, since a program can be compiled for another platform."""

    def default(x, w):
        return jnp.einsum(spec, x, w, preferred_element_type=out_dtype)

    def cpu(x, w):
        return _cpu_einsum(spec, x, w).astype(out_dtype)

    return jax.lax.platform_dependent(x, w, cpu=cpu, default=default)


def _cpu_einsum(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """einsum(spec, x, w) in float32 -> float32, in the forms that XLA:CPU does fast.

    It wants one summed axis: with two it is ten times slower. It has bfloat16 kernels (YNNPACK) for [rows, in] x
    [in, out] with float32 result, at least two rows and both operands stored in that order; for any other product of
    bfloat16 it first writes the whole operands out in float32: ten times slower for one row, at twice their memory.
    """
    x_axes, w_axes, out = axes_of(spec)
    summed = "".join(a for a in w_axes if a in x_axes)
    x_kept, w_kept = ("".join(a for a in axes if a not in summed) for axes in (x_axes, w_axes))
    rows = math.prod(x.shape[x_axes.index(a)] for a in x_kept)
    narrow = x.dtype == jnp.bfloat16
    if not (summed and w_kept and out == x_kept + w_kept):
        return jnp.einsum(spec, x.astype(jnp.float32), w.astype(jnp.float32))
    if x_axes == x_kept + summed and w_axes == summed + w_kept:
        if narrow and rows == 1:
            return one_row(x, w, len(summed))
        x = x.reshape(*x.shape[: len(x_kept)], -1)
        w = w.reshape(-1, *w.shape[len(summed) :])
        return jax.lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    if x_axes == x_kept + summed and w_axes == w_kept + summed and narrow and rows <= FEW_ROWS:
        return _in_slabs(x, w, len(summed))
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    if x_axes == summed + x_kept and w_axes == summed + w_kept:
        x, w = (a.reshape(-1, *a.shape[len(summed) :]) for a in (x, w))
        return jnp.tensordot(x, w, (0, 0))
    return jnp.einsum(spec, x, w)


def one_row(x: jax.Array, w: jax.Array, summed: int) -> jax.Array:
    """x [1..., *in] times w [*in, *out]: the row taken twice, in parts of the first summed axis."""
    first, width = w.shape[0], math.prod(w.shape[:summed])
    parts = PARTS if first % PARTS == 0 and width >= PARTS * MIN_PART else 1
    x_parts = jnp.broadcast_to(x.reshape(parts, 1, -1), (parts, 2, width // parts))
    w_parts = w.reshape(parts, width // parts, -1)
    y = jax.lax.dot_general(x_parts, w_parts, (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)
    # The copy is dropped before the sum: XLA would fuse the sum of both rows with the product, which is slower.
    return y[:, 0].sum(0).reshape(x.shape[: x.ndim - summed] + w.shape[summed:])


def _in_slabs(x: jax.Array, w: jax.Array, summed: int) -> jax.Array:
    """A few rows x [..., *in] times w [*out, *in], such as the vocabulary's matrix, a slab of w in float32 at a time.

    Slabs are cut across PARTS equal parts of the first axis of w, so that a sharding of that axis is one of every slab.
    """
    batch, outs = x.shape[: x.ndim - summed], w.shape[: w.ndim - summed]
    width = math.prod(w.shape[w.ndim - summed :])
    rows = x.astype(jnp.float32).reshape(-1, width)
    w = w.reshape(PARTS if w.shape[0] % PARTS == 0 else 1, -1, width)
    length = _slab_length(w)

    def slab(i):
        # Ties w to this step: without it XLA:CPU converts all of w before the loop. As integers, since it would also
        # convert all of a bfloat16 array in order to slice it.
        here, i = jax.lax.optimization_barrier((w, i))
        bits = jax.lax.bitcast_convert_type(here, jnp.uint16)
        bits = jax.lax.dynamic_slice_in_dim(bits, i * length, length, 1).astype(jnp.uint32) << 16
        part = jax.lax.bitcast_convert_type(bits, jnp.float32)
        return jnp.dot(part, rows[0])[..., None] if rows.shape[0] == 1 else jnp.einsum("pld,rd->plr", part, rows)

    y = jax.lax.map(slab, jnp.arange(w.shape[1] // length))  # [slabs, parts, length, rows]
    return y.transpose(3, 1, 0, 2).reshape(batch + outs)


def _slab_length(w: jax.Array) -> int:
    """The longest divisor of the second axis of w [parts, out / parts, in] that keeps a slab within SLAB elements."""
    parts, length, width = w.shape
    most = min(length, max(1, SLAB // (parts * width)))
    longest = max(n for n in range(1, most + 1) if length % n == 0)
    return longest if longest * 16 >= most else length  # a size without useful divisors is converted whole
