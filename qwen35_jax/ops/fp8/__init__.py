"""FP8 (float8_e4m3fn) weights with one scale per 128x128 block, activations with one scale per 1x128, and training in both."""

from __future__ import annotations

from qwen35_jax.ops.fp8.activations import Fp8Activation, quantize_activation, share_activation
from qwen35_jax.ops.fp8.blocks import BLOCK, FP8_MAX, Fp8Weight, dequantize, quantize, quantize_weight, scale_shape
from qwen35_jax.ops.fp8.training import Fp8Operand

__all__ = [
    "BLOCK",
    "FP8_MAX",
    "Fp8Activation",
    "Fp8Operand",
    "Fp8Weight",
    "dequantize",
    "quantize",
    "quantize_activation",
    "quantize_weight",
    "scale_shape",
    "share_activation",
]
