"""The dense product of activations with a weight, bfloat16, float32 or FP8, or with one that is trained in FP8."""

from __future__ import annotations

import jax

from qwen35_jax.ops.fp8 import Fp8Activation, Fp8Operand, Fp8Weight
from qwen35_jax.ops.linear.gpu import linear_gpu
from qwen35_jax.ops.linear.quantized import linear_quantized
from qwen35_jax.ops.linear.reference import linear_reference
from qwen35_jax.ops.linear.tpu import linear_tpu
from qwen35_jax.ops.linear.xla import linear_xla
from qwen35_jax.ops.segments import check_implementation

__all__ = ["linear", "linear_reference"]


def linear(
    x: jax.Array | Fp8Activation,
    w: jax.Array | Fp8Weight | Fp8Operand,
    spec: str,
    *,
    out_dtype=None,
    implementation: str | None = None,
) -> jax.Array:
    """einsum(spec, x, w) with float32 accumulation and one cast, to `out_dtype` (default: x's dtype).

    `spec` names every axis with a letter, such as "BTD,DNH->BTNH" or "BTD,VD->BTV": letters of x that w has are summed,
    all others appear in the result. w is an array or an `Fp8Weight`, which is dequantised exactly (one cast, to x's
    dtype). Differentiable in x, and in w where it is an array; works on one shard, and under automatic sharding.

    An `Fp8Activation` with an `Fp8Weight` is a product in FP8: e4m3 operands, float32 sums of 128 terms each times both
    scales, added in float32. The summed axes must be the last of x and the first of w, as in "BTNH,NHD->BTD". The gradient of
    x is that of the product with x itself. For one shard: heads and features that a mesh cuts are seen as they are cut.

    With an `Fp8Operand` the product and both gradients multiply e4m3 operands: x and the gradient with one scale per 128
    of the summed axis, w with one per 128x128; x is saved in 8 bits. The summed axes must be the last of x and the first
    of w; blocks run over them flattened. An `Fp8Activation` (`share_activation`) is x quantised once for several weights.

    The kernels are for weights in FP8 on one shard (an `Fp8Operand` without cuts); products with arrays are XLA's in every form.
    In "pallas_tpu" the scales of an `Fp8Weight` are for blocks of 128 along the last summed axis and the last of the result,
    and summed axes are as above. Where few rows are multiplied the weight is not even rounded to the dtype of x.

    With an array an `Fp8Activation` counts as the x that it was made of.
    """
    check_implementation("linear", implementation, ("xla", "pallas_tpu", "pallas_gpu"))
    if implementation == "pallas_tpu":
        return linear_tpu(x, w, spec, out_dtype)
    if implementation == "pallas_gpu":
        return linear_gpu(x, w, spec, out_dtype)
    if isinstance(x, Fp8Activation) and isinstance(w, Fp8Weight):
        return linear_quantized(x, w, spec, out_dtype)
    return linear_xla(x, w, spec, out_dtype)
