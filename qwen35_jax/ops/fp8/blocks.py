"""Block-scaled FP8, as the published FP8 checkpoints store it: value = float8_e4m3fn x scale of its 128x128 block."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from qwen35_jax.errors import UserError

BLOCK = 128
FP8_MAX = 448.0  # largest finite float8_e4m3fn; casting anything larger gives NaN, not saturation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8Weight:
    """A weight kept as its checkpoint stores it.

    values: float8_e4m3fn with the weight's logical shape, head axes split. scales: bfloat16 or float32 of that rank;
    each axis is either the weight's own (heads, halves, experts: one scale each) or ceil(size / 128): one scale per
    128, the last block may be ragged. The weight is values x scales, each scale repeated over its block.
    """

    values: jax.Array
    scales: jax.Array


def scale_shape(shape: Sequence[int], blocked_axes: Sequence[int]) -> tuple[int, ...]:
    """The shape of the scales of a weight of `shape` whose `blocked_axes` are cut into blocks of 128."""
    blocked = {axis % len(shape) for axis in blocked_axes}
    return tuple(-(-size // BLOCK) if axis in blocked else size for axis, size in enumerate(shape))


def _check(w: Fp8Weight) -> None:
    values, scales = w.values.shape, w.scales.shape
    fits = len(values) == len(scales) and all(s in (v, -(-v // BLOCK)) for v, s in zip(values, scales, strict=True))
    if not fits:
        raise UserError(
            f"Fp8Weight scales {scales} do not fit values {values}: each axis must be the same or one scale per {BLOCK}"
        )


def expand_scales(scales: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Repeats each scale over its block: scales as in `Fp8Weight` -> float32 of the weight's `shape`."""
    scales = scales.astype(jnp.float32)
    for axis, (size, count) in enumerate(zip(shape, scales.shape, strict=True)):
        if size != count:
            scales = jax.lax.slice_in_dim(jnp.repeat(scales, BLOCK, axis=axis), 0, size, axis=axis)
    return scales


def dequantize(w: Fp8Weight, dtype=jnp.float32) -> jax.Array:
    """The weight itself, in `dtype`: the product is exact in float32 for bfloat16 scales, and cast once."""
    _check(w)
    return (w.values.astype(jnp.float32) * expand_scales(w.scales, w.values.shape)).astype(dtype)


def _scale_of(amax: jax.Array) -> jax.Array:
    """amax / 448, or 1 where that is not a normal float32 (zero blocks among them), so that dividing by it is safe."""
    scale = amax * jnp.float32(1 / FP8_MAX)  # compilers turn a division by a constant into this, but not always
    return jnp.where(scale >= jnp.finfo(jnp.float32).tiny, scale, 1.0)


def _nearest(x: jax.Array) -> jax.Array:
    """float32 within +-448 rounded to the nearest e4m3 number (ties to even), still float32; NaN stays NaN."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    power = jax.lax.bitcast_convert_type(bits & jnp.uint32(0x7F800000), jnp.float32)  # of two, at most |x|
    # Added and taken away again, this pushes out all bits but three behind the first; e4m3 is subnormal below 2^-6.
    push = jnp.maximum(power, 2.0**-6) * (1.5 * 2.0**20)
    return (x + push) - push


def _cast_bits(x: jax.Array) -> jax.Array:
    """The cast to e4m3 with integers: XLA:CPU's own takes five times as long."""
    size = jnp.abs(_nearest(x))
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    normal = (jax.lax.bitcast_convert_type(size, jnp.uint32) >> 20) - (120 << 3)
    code = jnp.where(size < 2.0**-6, (size * 2.0**9).astype(jnp.uint32), normal)
    code = jnp.where(jnp.isnan(x), 0x7F, code) | (bits >> 24 & 0x80)
    return jax.lax.bitcast_convert_type(code.astype(jnp.uint8), jnp.float8_e4m3fn)


def _clip(x: jax.Array) -> jax.Array:
    return jnp.clip(x, -FP8_MAX, FP8_MAX)


def _cast(x: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(_clip(x), cpu=_cast_bits, default=lambda x: x.astype(jnp.float8_e4m3fn))


def quantize_blocks(x: jax.Array, blocked_axes: Sequence[int], scale_dtype=jnp.bfloat16) -> tuple[jax.Array, jax.Array]:
    """x to FP8: one scale per block of 128 along each of `blocked_axes` (the last may be ragged), one per entry of the others.

    x of any float dtype -> values float8_e4m3fn of its shape, scales of `scale_shape`. Scales are rounded to `scale_dtype`
    before the values are divided by them, so that no further error is made. NaN and infinity stay visible: an infinite
    entry becomes NaN.
    """
    x, scales = _scaled(x, blocked_axes, scale_dtype)
    return _cast(x), scales


def round_blocks(x: jax.Array, blocked_axes: Sequence[int]) -> jax.Array:
    """What `quantize_blocks` makes of x, dequantised again: float32. Cheap on the CPU, where no FP8 array is written."""
    scaled, scales = _scaled(x, blocked_axes, jnp.bfloat16)
    return _nearest(_clip(scaled)) * expand_scales(scales, x.shape)


def _scaled(x: jax.Array, blocked_axes: Sequence[int], scale_dtype) -> tuple[jax.Array, jax.Array]:
    x = x.astype(jnp.float32)
    kept = jnp.finfo(scale_dtype)
    # A cast to bfloat16 and back would not do: XLA may leave both out.
    scales = jax.lax.reduce_precision(_scale_of(_block_amax(x, blocked_axes)), kept.nexp, kept.nmant)
    # Not x / scales: whether XLA divides or does this depends on what is around, and ties are common among numbers that
    # were FP8 before.
    return x * expand_scales(1 / scales, x.shape), scales.astype(scale_dtype)


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Activations to FP8: x [..., D] -> values [..., D] float8_e4m3fn, scales [..., ceil(D / 128)] float32."""
    return quantize_blocks(x, (x.ndim - 1,), jnp.float32)


def quantize_weight(w: jax.Array, blocked_axes: Sequence[int], scale_dtype=jnp.bfloat16) -> Fp8Weight:
    """`quantize_blocks` of a weight."""
    return Fp8Weight(*quantize_blocks(w, blocked_axes, scale_dtype))


def _block_amax(x: jax.Array, blocked_axes: Sequence[int]) -> jax.Array:
    """max |x| of every block: shape `scale_shape(x.shape, blocked_axes)`."""
    x = jnp.abs(x)
    for axis in {axis % x.ndim for axis in blocked_axes}:
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, -x.shape[axis] % BLOCK)
        x = jnp.pad(x, pad)  # zeros do not change a maximum of absolute values
        x = x.reshape(*x.shape[:axis], -1, BLOCK, *x.shape[axis + 1 :]).max(axis + 1)
    return x
