"""Inverse of unit lower triangular matrices, the one delicate step of the chunked recurrence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

BASE = 16  # blocks of this size are inverted whole, under masks; larger ones from their halves


def unit_lower_inverse(lower: jax.Array) -> jax.Array:
    """(I + L)^-1 for strictly lower triangular L [..., C, C], C a power of two.

    Block doubling: where X holds the inverses of the diagonal blocks of size b, and S the part of L that joins them in
    pairs, X - X S X holds those of size 2b. Every intermediate is a true inverse, whose entries are bounded for unit
    keys and beta in [0, 1]. Powers of L (Neumann series, Newton's iteration from I) reach 1e14 for repeated keys
    before they cancel, and are useless in fp32.
    """
    size = lower.shape[-1]
    base = min(BASE, size)
    blocks = _diagonal_blocks(lower, base)
    inverse = jnp.eye(base, dtype=lower.dtype) - jnp.where(_joins(base, 1), blocks, 0)
    width = 2
    while width < base:
        inverse = inverse - _matmul(_matmul(inverse, jnp.where(_joins(base, width), blocks, 0)), inverse)
        width *= 2
    while width < size:
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        join = _diagonal_blocks(lower, 2 * width)[..., width:, :width]
        corner = -_matmul(_matmul(second, join), first)
        top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverse = jnp.concatenate([top, jnp.concatenate([corner, second], axis=-1)], axis=-2)
        width *= 2
    return inverse[..., 0, :, :]


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _joins(size: int, width: int) -> np.ndarray:
    """Mask [size, size] of the entries below the diagonal that join blocks 2i and 2i + 1 of this width."""
    block = np.arange(size) // width
    return (block[:, None] == block[None, :] + 1) & (block[:, None] % 2 == 1)


def _diagonal_blocks(x: jax.Array, width: int) -> jax.Array:
    """[..., C, C] -> its diagonal blocks [..., C / width, width, width]."""
    starts = range(0, x.shape[-1], width)
    return jnp.stack([x[..., s : s + width, s : s + width] for s in starts], axis=-3)
