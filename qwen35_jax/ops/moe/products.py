"""The experts' matrices on rows that are sorted by expert, and the memory that they may take: what every form shares."""

from __future__ import annotations

import functools

import jax

from qwen35_jax.ops.fp8 import Fp8Activation, Fp8Operand, quantize_activation
from qwen35_jax.ops.grouped_linear import grouped_linear

# Rows of one pass over the experts are limited so that its buffers (input, gate and up, hidden, output) stay below this.
BUFFER_BYTES = 256 * 2**20
# Training in FP8 adds up float32 beside each block's product and the rows' scales: bytes for each number of a row's width, as
# XLA's form takes them forward and backward of 35b-a3b's experts (compiled for v5p).
FP8_ROW = 26


def local_count(experts: dict) -> int:
    """How many experts a device holds."""
    return jax.tree.leaves(experts["gate"])[0].shape[0]


def row_bytes(experts: dict, d: int, itemsize: int) -> int:
    """Bytes of one row's input, gate, up, hidden and output, and of the output in float32."""
    width = jax.tree.leaves(experts["gate"])[0].shape[2]
    fp8 = FP8_ROW * d if isinstance(experts["gate"], Fp8Operand) else 0
    return (2 * d + 3 * width) * itemsize + 4 * d + fp8


def expert_rows(
    rows: jax.Array | Fp8Activation, group_sizes: jax.Array, experts: dict, *, implementation: str | None, fp8_activations: bool
) -> jax.Array:
    """rows [R, D], the first group_sizes[0] of the device's first expert, ... -> their outputs [R, D]; zero beyond the groups."""
    multiply = functools.partial(grouped_linear, group_sizes=group_sizes, implementation=implementation)
    hidden = jax.nn.silu(multiply(rows, experts["gate"])) * multiply(rows, experts["up"])
    return multiply(quantize_activation(hidden) if fp8_activations else hidden, experts["down"])
