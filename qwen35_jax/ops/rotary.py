"""Partial rotary embedding with interleaved M-RoPE axes and YaRN (spec of the angles: transformers' rope utilities)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from qwen35_jax.config import RopeConfig


def rotary_frequencies(rope: RopeConfig, rotary_dim: int) -> tuple[np.ndarray, float]:
    """Inverse frequencies [rotary_dim/2] float32 and the factor on cos and sin (1 without YaRN; YaRN: arXiv 2309.00071)."""
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    # The power rounded once, then the reciprocal in float32: to the bit what torch computes. At position 262,144 one ulp
    # of a frequency is already 0.008 rad.
    inverse = np.float32(1.0) / np.power(np.float64(rope.theta), exponents.astype(np.float64)).astype(np.float32)
    if rope.rope_type == "default":
        return inverse, 1.0

    def pair_with(rotations: float) -> float:
        """The (fractional) pair that turns this often within the original context."""
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return rotary_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    ramp = (np.arange(rotary_dim // 2, dtype=np.float32) - low) / max(high - low, 1e-3)
    interpolated = np.clip(ramp, 0, 1).astype(np.float32)
    scaled = (inverse / rope.factor) * interpolated + inverse * (1 - interpolated)
    factor = rope.attention_factor
    return scaled.astype(np.float32), 0.1 * math.log(rope.factor) + 1.0 if factor is None else factor


def axis_of_pair(section: tuple[int, int, int]) -> np.ndarray:
    """Which position axis (0 time, 1 height, 2 width) turns each rotary pair: T H W T H W … and T where H or W run out."""
    axes = np.zeros(sum(section), np.int32)
    for axis in (1, 2):
        axes[axis : 3 * section[axis] : 3] = axis
    return axes


def rotary_angles(positions: jax.Array, rope: RopeConfig, rotary_dim: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, rotary_dim/2] float32 of positions [B, T] (text) or [3, B, T] (time, height, width), int32."""
    inverse, factor = rotary_frequencies(rope, rotary_dim)
    if positions.ndim == 3:
        positions = jnp.moveaxis(positions[axis_of_pair(rope.mrope_section)], 0, -1)
    else:
        positions = positions[..., None]
    # float32 throughout: bfloat16 would round position 257 to 256.
    angles = positions.astype(jnp.float32) * inverse
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rotary(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns pairs (i, i + R) of the first 2R of the H features of x [B, T, N, H]; cos, sin [B, T, R] float32."""
    half = cos.shape[-1]
    cos, sin = cos[:, :, None], sin[:, :, None]
    a, b = (x[..., i * half : (i + 1) * half].astype(jnp.float32) for i in (0, 1))
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)
