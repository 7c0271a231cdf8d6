"""Block-scaled FP8 in NumPy float64, one block at a time."""

from __future__ import annotations

import itertools

import numpy as np

from qwen35_jax.ops.fp8.blocks import BLOCK, Fp8Weight


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
