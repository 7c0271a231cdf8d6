"""Activations in FP8, one scale per 1x128: quantised once, for all the products that take them."""

from __future__ import annotations

import dataclasses

import jax

from qwen35_jax.ops.fp8.blocks import quantize, quantize_blocks
from qwen35_jax.ops.fp8.training import Fp8Operand


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8Activation:
    """x [..., D] beside its values [..., D] float8_e4m3fn and scales [..., ceil(D / 128)]. Gradients go to x."""

    x: jax.Array
    values: jax.Array
    scales: jax.Array


def share_activation(x: jax.Array, *weights) -> jax.Array | Fp8Activation:
    """What to hand to the products of x with each of `weights`: x, quantised once if one of them is an `Fp8Operand`.

    Products with an Fp8Activation save that for the backward pass, one copy for all, where each would save its own of x.
    """
    if not any(isinstance(w, Fp8Operand) for w in weights):
        return x
    return Fp8Activation(x, *quantize_blocks(jax.lax.stop_gradient(x), (x.ndim - 1,)))


def quantize_activation(x: jax.Array) -> Fp8Activation:
    """x [..., D] for products in FP8 with `Fp8Weight`s, float32 scales: where D is the width of a head, one scale a head (and
    128), so that heads can be cut over devices. Products with other weights take x itself."""
    return Fp8Activation(x, *quantize(jax.lax.stop_gradient(x)))
