"""Block-scaled FP8, as the published FP8 checkpoints store it: value = float8_e4m3fn x scale of its 128x128 block."""

from __future__ import annotations

import dataclasses
import math
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
    blocks, entries = _in_blocks(x.astype(jnp.float32), blocked_axes)
    scaled, scales = _scaled(blocks, entries, scale_dtype)
    scales = scales.astype(scale_dtype).reshape(scale_shape(x.shape, blocked_axes))
    return _whole(_written(scaled), x.shape, blocked_axes), scales


def requantize_blocks(values: jax.Array, scales: jax.Array, blocked_axes: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """`quantize_blocks` along `blocked_axes` of what it made along other axes: never whole in float32."""
    shape, dtype, axes = values.shape, scales.dtype, [axis % values.ndim for axis in blocked_axes]
    before = [axis for axis in range(values.ndim) if scales.shape[axis] != shape[axis]]
    blocks, entries = _in_blocks(values.astype(jnp.float32), [*before, *axes])
    old, new = ([e for e, axis in zip(entries, sorted({*before, *axes}), strict=True) if axis in of] for of in (before, axes))
    scaled, scales = _scaled(blocks * jnp.expand_dims(_in_blocks(scales.astype(jnp.float32), axes)[0], old), new, dtype)
    whole = _whole(scales.squeeze(tuple(new)), scale_shape(shape, axes), before)
    return _whole(_written(scaled), shape, [*before, *axes]), whole.astype(dtype)


def round_blocks(x: jax.Array, blocked_axes: Sequence[int]) -> jax.Array:
    """What `quantize_blocks` makes of x, dequantised again: float32. Cheap on the CPU, where no FP8 array is written."""
    blocks, entries = _in_blocks(x.astype(jnp.float32), blocked_axes)
    scaled, scales = _scaled(blocks, entries, jnp.bfloat16)
    return _whole(_nearest(_clip(scaled)) * scales, x.shape, blocked_axes)


def _written(scaled: jax.Array) -> jax.Array:
    """e4m3, of which XLA makes an array: it would keep the float32 numbers for all that reads them, or turn these around."""
    return jax.lax.optimization_barrier(_cast(scaled))


def _scaled(blocks: jax.Array, entries: Sequence[int], scale_dtype) -> tuple[jax.Array, jax.Array]:
    """float32 numbers in blocks divided by the scales, and these: they are never spread over an array as large."""
    kept = jnp.finfo(scale_dtype)
    amax = jnp.abs(blocks).max(tuple(entries), keepdims=True)
    # A cast to bfloat16 and back would not do: XLA may leave both out.
    scales = jax.lax.reduce_precision(_scale_of(amax), kept.nexp, kept.nmant)
    # Not blocks / scales: whether XLA divides or does this depends on what is around, and ties are common among numbers that
    # were FP8 before.
    return blocks * (1 / scales), scales


def _cut(shape: Sequence[int], blocked_axes: Sequence[int]) -> tuple[list[int], list[int], tuple[int, ...]]:
    """Of an array in blocks: its shape where whole, the one with an axis of blocks and one of their entries for each blocked
    axis, and which axes the entries are. A ragged end is filled up; an axis shorter than a block is one."""
    blocked, whole, cut, entries = {axis % len(shape) for axis in blocked_axes}, [], [], []
    for axis, size in enumerate(shape):
        width = min(size, BLOCK) or 1
        sizes = [-(-size // width), width] if axis in blocked else [size]
        whole.append(math.prod(sizes))
        cut += sizes
        if axis in blocked:
            entries.append(len(cut) - 1)
    return whole, cut, tuple(entries)


def _in_blocks(x: jax.Array, blocked_axes: Sequence[int]) -> tuple[jax.Array, tuple[int, ...]]:
    """x in blocks, zeros where it is filled up; and the axes of entries."""
    whole, cut, entries = _cut(x.shape, blocked_axes)
    return jnp.pad(x, [(0, n - size) for n, size in zip(whole, x.shape, strict=True)]).reshape(cut), entries


def _whole(blocks: jax.Array, shape: Sequence[int], blocked_axes: Sequence[int]) -> jax.Array:
    """The inverse of `_in_blocks`."""
    return jax.lax.slice(blocks.reshape(_cut(shape, blocked_axes)[0]), [0] * len(shape), shape)


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Activations to FP8: x [..., D] -> values [..., D] float8_e4m3fn, scales [..., ceil(D / 128)] float32."""
    return quantize_blocks(x, (x.ndim - 1,), jnp.float32)


def quantize_weight(w: jax.Array, blocked_axes: Sequence[int], scale_dtype=jnp.bfloat16) -> Fp8Weight:
    """`quantize_blocks` of a weight."""
    return Fp8Weight(*quantize_blocks(w, blocked_axes, scale_dtype))
