"""Which form of each op a program uses: decided once, by whoever builds the program, and carried from there by name."""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from qwen35_jax.config import ModelConfig
from qwen35_jax.errors import UserError
from qwen35_jax.ops.gated_delta import tpu

KERNEL_CHOICES = ("auto", "xla", "pallas")


@dataclasses.dataclass(frozen=True)
class Forms:
    """The implementation of each op, as `sample --stats` prints it."""

    gated_delta_rule: str = "xla"
    gated_delta_step: str = "xla"
    causal_conv1d: str = "xla"
    attention: str = "xla"
    cached_attention: str = "xla"
    linear: str = "xla"
    grouped_linear: str = "xla"
    moe: str = "gather"


def resolve_forms(mesh: Mesh, config: ModelConfig, kernels: str = "auto") -> Forms:
    """The form of each op for the mesh's device kind (abstract devices too) and the model's head widths.

    auto: the best form. xla: the one that runs everywhere. pallas: our kernels, an error where there are none; an op that
    has no kernel, or none for these widths, keeps its XLA form, as `sample --stats` shows.
    """
    device = mesh.devices.flat[0]
    if kernels not in KERNEL_CHOICES:
        choices = ", ".join(KERNEL_CHOICES)
        raise UserError(f"kernels {kernels!r}: no such form for {device.device_kind}; choose from {choices}")
    if kernels == "pallas" and device.platform != "tpu":
        raise UserError(f"kernels 'pallas': there are kernels for TPU only, not for {device.device_kind}; use auto or xla")
    supported = tpu.supports(config.linear_key_head_dim, config.linear_value_head_dim)
    if kernels == "xla" or device.platform != "tpu" or not supported:
        return Forms()
    return Forms(gated_delta_rule="pallas_tpu")
