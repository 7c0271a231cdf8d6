"""The product of rows, sorted by group, each group with a weight of its own: the experts' matrices."""

from __future__ import annotations

import jax

from qwen35_jax.ops.fp8 import Fp8Activation, Fp8Operand, Fp8Weight
from qwen35_jax.ops.grouped_linear.gpu import grouped_linear_gpu
from qwen35_jax.ops.grouped_linear.quantized import grouped_linear_quantized
from qwen35_jax.ops.grouped_linear.reference import grouped_linear_reference
from qwen35_jax.ops.grouped_linear.tpu import grouped_linear_tpu
from qwen35_jax.ops.grouped_linear.xla import grouped_linear_xla
from qwen35_jax.ops.segments import check_implementation

__all__ = ["grouped_linear", "grouped_linear_reference"]


def grouped_linear(
    x: jax.Array | Fp8Activation,
    w: jax.Array | Fp8Weight | Fp8Operand,
    group_sizes: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Row r of group e, x[r] times w[e]. Rows are sorted by group; the first group_sizes[0] rows belong to group 0, ...

    x [R, *in]; w [E, *in, *out] or an `Fp8Weight` of that shape; group_sizes [E] int32 with sum <= R. Returns [R, *out]
    in x's dtype, float32 accumulation; rows beyond the groups are zero and cost nothing. Differentiable in x, and in w
    where it is an array. Sees one device's shard.

    An `Fp8Activation` [R, in] with an `Fp8Weight` [E, in, out] is a product in FP8, as in `linear`. "pallas_tpu" takes
    `Fp8Weight`s [E, in, out] alone.

    With an `Fp8Operand` the product and both gradients multiply e4m3 operands, as in `linear`; the weight's gradient
    quantises 128 rows of one group at a time.
    """
    check_implementation("grouped_linear", implementation, ("xla", "pallas_tpu", "pallas_gpu"))
    if implementation == "pallas_tpu":
        return grouped_linear_tpu(x, w, group_sizes)
    if implementation == "pallas_gpu":
        return grouped_linear_gpu(x, w, group_sizes)
    if isinstance(x, Fp8Activation) and isinstance(w, Fp8Weight):
        return grouped_linear_quantized(x, w, group_sizes)
    return grouped_linear_xla(x, w, group_sizes)
