"""Operands of the Hopper kernels: flat matrices of whole blocks of 128, made of what `linear` and `grouped_linear` are given."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from qwen35_jax.compat import HAS_MOSAIC_GPU
from qwen35_jax.errors import UserError
from qwen35_jax.ops.fp8 import BLOCK, Fp8Weight
from qwen35_jax.ops.hopper.gradients_fp8 import fp8_gradients
from qwen35_jax.ops.hopper.rows import rows_times

# From so many rows a weight on, turning it once costs less than multiplying it in bfloat16: two bytes of memory traffic
# for each of its numbers against two operations a row, at 4 TB/s, 800 TFLOP/s (bfloat16) and 1,300 (FP8).
MANY_ROWS = 512


def supports(dtype: str, *widths: int) -> bool:
    """Whether there are kernels for activations of this dtype, and FP8 weights of these widths."""
    return dtype == "bfloat16" and all(width % BLOCK == 0 for width in widths)


def check_available(op: str, x: jax.Array) -> None:
    """UserError where the kernels do not run at all."""
    if not HAS_MOSAIC_GPU:
        raise UserError(f"{op}: the pallas_gpu implementation needs JAX 0.11 or newer, this is {jax.__version__}; use xla")
    if x.dtype != jnp.bfloat16:
        raise UserError(f"{op}: the pallas_gpu implementation multiplies bfloat16 activations, not {x.dtype}; use xla")


def pad_blocks(a: jax.Array, *axes: int) -> jax.Array:
    """Zeros behind those axes that are no multiple of 128."""
    widths = [(0, -size % BLOCK if axis in axes else 0) for axis, size in enumerate(a.shape)]
    return jnp.pad(a, widths)


def flat_weight(w: Fp8Weight, groups: int, ins: int, op: str) -> tuple[jax.Array, jax.Array]:
    """Values [*groups, in, out] e4m3 and scales [*groups, in/128, out/128] float32 of a weight with `groups` leading axes of
    groups and then `ins` summed ones. Every axis that ends a flat one must be cut into whole blocks of 128."""
    ends, shape = (groups + ins - 1, w.values.ndim - 1), w.values.shape
    whole = all(shape[axis] % BLOCK == 0 and w.scales.shape[axis] * BLOCK == shape[axis] for axis in ends)
    if not whole or any(v != s for axis, (v, s) in enumerate(zip(shape, w.scales.shape, strict=True)) if axis not in ends):
        have = f"values {shape} with scales {w.scales.shape}"
        raise UserError(f"{op}: the pallas_gpu implementation wants whole blocks of {BLOCK}x{BLOCK}, not {have}; use xla")
    values, scales = (a.reshape(*shape[:groups], math.prod(a.shape[groups : groups + ins]), -1) for a in (w.values, w.scales))
    return values, scales.astype(jnp.float32)


def block_product(x: tuple, w: tuple, group_sizes: jax.Array, out_dtype, parts: int = 1) -> jax.Array:
    """Both in FP8: x values [R, K] and scales [R, K/128], w values [E, K, N] and scales [E, K/128, N/128] -> [R, N].

    The tensor cores multiply e4m3 only where both operands have the summed axis last. Where there are many rows w is turned;
    where there are few, that would cost more than the product, and both go into it as float16, in `parts` as in `rows_times`.
    """
    (values, scales), (weights, weight_scales) = x, w
    turned = values.shape[0] >= MANY_ROWS * weights.shape[0]
    return rows_times(values, weights.swapaxes(1, 2) if turned else weights, group_sizes, transposed=turned, x_scales=scales,
                      w_scales=weight_scales, out_dtype=out_dtype, parts=1 if turned else parts)  # fmt: skip


def training_rows(x: tuple, w: tuple, side: int, group_sizes: jax.Array, out_dtype) -> jax.Array:
    """`rows_times` of ops/grouped_linear/fp8.py: quantised x [R, .] times w [E, in, out], summed over side 0 or 1 of w -> [R, .].

    For the sum over `in` w is turned, a pass that belongs to its quantisation; for the sum over `out` it is right as it is.
    """
    (values, scales), (weights, weight_scales) = x, w
    width = weights.shape[2 - side]
    if side == 0:
        weights = weights.swapaxes(1, 2)
    else:
        weight_scales = weight_scales.swapaxes(1, 2)
    values, weights = pad_blocks(values, 1), pad_blocks(weights, 1, 2)
    scales, weight_scales = (a.astype(jnp.float32) for a in (scales, weight_scales))
    y = rows_times(values, weights, group_sizes, transposed=True, x_scales=scales, w_scales=weight_scales, out_dtype=out_dtype)
    return y[:, :width]


def training_gradients(x: tuple, dy: tuple, firsts: jax.Array, counts: jax.Array, out_dtype) -> jax.Array:
    """x [R, in]^T times dy [R, out], both quantised along rows, over the blocks of every group -> [E, in, out]."""
    sizes = x[0].shape[1], dy[0].shape[1]
    (x, x_scales), (dy, dy_scales) = ((pad_blocks(v, 0, 1).T, pad_blocks(s, 1).astype(jnp.float32)) for v, s in (x, dy))
    return fp8_gradients(x, x_scales, dy, dy_scales, firsts, counts, out_dtype)[:, : sizes[0], : sizes[1]]


def training_dot(out_dtype, a: tuple, a_side: int, b: tuple, b_side: int) -> jax.Array:
    """`block_dot` of ops/fp8/training.py for operands that no mesh cuts: [1, rows, 1, columns] -> [1, rows, 1, columns]."""
    parts = {n for operand in (a, b) for n in operand[0].shape[::2]}
    if parts != {1}:
        raise UserError("linear: pallas_gpu trains one device's shard of a weight in FP8; call it inside shard_map, or use xla")
    a, b = (tuple(v[0, :, 0] for v in operand) for operand in (a, b))
    if a_side == 0:
        blocks = jnp.full(1, a[1].shape[0], jnp.int32)
        y = training_gradients(a, b, jnp.zeros_like(blocks), blocks, out_dtype)[0]
    else:
        w = tuple(v[None] for v in b)
        y = training_rows(a, w, b_side, jnp.full(1, a[0].shape[0], jnp.int32), out_dtype)
    return y[None, :, None]
