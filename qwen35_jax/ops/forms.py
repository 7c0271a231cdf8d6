"""Which form of each op a program uses: decided once, by whoever builds the program, and carried from there by name."""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from qwen35_jax.errors import UserError

KERNEL_CHOICES = ("auto", "xla")


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


def resolve_forms(mesh: Mesh, kernels: str = "auto") -> Forms:
    """The best form of each op for the mesh's device kind (abstract devices too). `xla` is the form that runs everywhere."""
    if kernels not in KERNEL_CHOICES:
        kind = mesh.devices.flat[0].device_kind
        raise UserError(f"kernels {kernels!r}: no such form for {kind}; choose from {', '.join(KERNEL_CHOICES)}")
    return Forms()
