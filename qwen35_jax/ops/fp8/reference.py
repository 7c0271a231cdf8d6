"""Block-scaled FP8 in NumPy float64, one block at a time."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np

from qwen35_jax.ops.fp8.blocks import BLOCK, FP8_MAX, Fp8Weight


def dequantize_reference(w: Fp8Weight) -> np.ndarray:
    """values x scales, float64."""
    values = np.asarray(w.values).astype(np.float64)
    scales = np.asarray(w.scales).astype(np.float64)
    sides = [1 if v == s else BLOCK for v, s in zip(values.shape, scales.shape, strict=True)]
    out = np.empty_like(values)
    for index in itertools.product(*map(range, scales.shape)):
        block = tuple(slice(i * side, (i + 1) * side) for i, side in zip(index, sides, strict=True))
        out[block] = values[block] * scales[index]
    return out


def round_reference(x: np.ndarray, blocked_axes: tuple[int, ...]) -> np.ndarray:
    """x [rows, columns] quantised with one bfloat16 scale per block of 128 along `blocked_axes`, and dequantised: float64."""
    x = np.asarray(x).astype(np.float32)
    sides = [min(BLOCK, size) if axis in blocked_axes else 1 for axis, size in enumerate(x.shape)]
    out = np.zeros(x.shape, np.float64)
    for starts in itertools.product(*(range(0, size, side) for size, side in zip(x.shape, sides, strict=True))):
        block = tuple(slice(start, start + side) for start, side in zip(starts, sides, strict=True))
        scale = np.abs(x[block]).max() * np.float32(1 / FP8_MAX)
        scale = np.float32(ml_dtypes.bfloat16(scale if scale >= np.finfo(np.float32).tiny else 1))
        values = np.clip(x[block] * (np.float32(1) / scale), -FP8_MAX, FP8_MAX).astype(ml_dtypes.float8_e4m3fn)
        out[block] = values.astype(np.float64) * np.float64(scale)
    return out


def products_reference(x: np.ndarray, w: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x [rows, in], w [in, out], dy [rows, out] -> x w, dy w^T and x^T dy of FP8 training, float64.

    Activations and gradients are quantised along the axis that is summed; along rows, x is what was kept of it in FP8.
    """
    x, w = round_reference(x, (1,)), round_reference(w, (0, 1))
    return x @ w, round_reference(dy, (1,)) @ w.T, round_reference(x, (0,)).T @ round_reference(dy, (0,))
