"""Which form of each op a program uses: decided once, by whoever builds the program, and carried from there by name."""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import Mesh

from qwen35_jax.compat import HAS_MOSAIC_GPU
from qwen35_jax.config import ModelConfig
from qwen35_jax.errors import UserError
from qwen35_jax.ops.attention import gpu_cached, tpu_cached
from qwen35_jax.ops.attention import tpu as attention_tpu
from qwen35_jax.ops.fp8 import BLOCK
from qwen35_jax.ops.gated_delta import gpu, gpu_decode, tpu
from qwen35_jax.ops.hopper import operands
from qwen35_jax.ops.linear.gpu import FEW_ROWS
from qwen35_jax.ops.moe import MOE_CHOICES

KERNEL_CHOICES = ("auto", "xla", "pallas")


@dataclasses.dataclass(frozen=True)
class Forms:
    """The implementation of each op. `fp8_linear` and `fp8_grouped_linear` are those of `linear` and `grouped_linear` with
    weights kept in FP8, `fp8_training_linear` that of `linear` with weights trained in FP8; all other products of `linear` are
    XLA's. `moe`: one of `MOE_CHOICES`; with "auto" each program has the form that `moe_form` names for the number of its tokens.
    """

    gated_delta_rule: str = "xla"
    gated_delta_step: str = "xla"
    causal_conv1d: str = "xla"
    attention: str = "xla"
    cached_attention: str = "xla"
    vision_attention: str = "xla"
    grouped_linear: str = "xla"
    fp8_linear: str = "xla"
    fp8_grouped_linear: str = "xla"
    fp8_training_linear: str = "xla"
    moe: str = "auto"

    def in_generation(self, config: ModelConfig, rows: int) -> dict[str, str]:
        """What runs in a step of generation whose products have `rows` rows a device, by op: without `moe`, and without ops that
        the model's generation does not have."""
        ops = ["gated_delta_rule", "gated_delta_step", "causal_conv1d", "cached_attention", "vision_attention"]
        if config.num_experts:
            ops.append("fp8_grouped_linear" if config.fp8_weights else "grouped_linear")
        forms = {op: getattr(self, op) for op in ops} | {"linear": "xla"}
        if config.fp8_weights:
            opened = self.fp8_linear == "pallas_gpu" and not config.fp8_activations and rows > FEW_ROWS
            forms["fp8_linear"] = "xla" if opened else self.fp8_linear
        return forms


def resolve_forms(
    mesh: Mesh, config: ModelConfig, kernels: str = "auto", moe: str = "auto", *, context_parallel: bool = False
) -> Forms:
    """The form of each op for the mesh's device kind (abstract devices too) and the model's head widths.

    auto: the best form. xla: the one that runs everywhere. pallas: our kernels, an error where there are none; an op that
    has no kernel, or none for these widths or for `context_parallel`, keeps its XLA form, as `sample --stats` shows. `moe` is
    one of `MOE_CHOICES`.
    """
    if moe not in MOE_CHOICES:
        raise UserError(f"moe form {moe!r} does not exist; choose from {', '.join(MOE_CHOICES)}")
    if moe != "auto" and not config.num_experts:
        raise UserError(f"moe form {moe!r}: this model has no experts; use auto")
    device = mesh.devices.flat[0]
    if kernels not in KERNEL_CHOICES:
        choices = ", ".join(KERNEL_CHOICES)
        raise UserError(f"kernels {kernels!r}: no such form for {device.device_kind}; choose from {choices}")
    forms = _kernels_for(device, config)
    if kernels == "pallas" and forms is None:
        raise UserError(f"kernels 'pallas': there are none for {device.device_kind}, only for {_WHERE}; use auto or xla")
    forms = dataclasses.replace(Forms() if kernels == "xla" or forms is None else forms, moe=moe)
    # The splash kernel knows which blocks are above the diagonal when it is compiled: not those of keys that come by.
    return dataclasses.replace(forms, attention="xla") if context_parallel else forms


_WHERE = "TPU and, with JAX 0.11 or newer, H100 and H200"


def _kernels_for(device: jax.Device, config: ModelConfig) -> Forms | None:
    """Our kernels for a device, as far as they support the model; None where the device has none at all."""
    if device.platform == "tpu":
        return _tpu_forms(config)
    if device.platform == "gpu" and HAS_MOSAIC_GPU and device.compute_capability == "9.0":
        return _hopper_forms(config)
    return None


def _tpu_forms(config: ModelConfig) -> Forms:
    forms = {"fp8_training_linear": "pallas_tpu"}
    if tpu.supports(config.linear_key_head_dim, config.linear_value_head_dim):
        forms |= {"gated_delta_rule": "pallas_tpu", "gated_delta_step": "pallas_tpu", "causal_conv1d": "pallas_tpu"}
    if attention_tpu.supports(config.head_dim, config.dtype):
        forms["attention"] = "pallas_tpu"
    if tpu_cached.supports(config.head_dim):
        forms["cached_attention"] = "pallas_tpu"
    if config.fp8_weights and all(n % BLOCK == 0 for n in _fp8_widths(config)):
        forms |= _fp8_forms(config, "pallas_tpu")
    return Forms(**forms)


def _fp8_forms(config: ModelConfig, form: str) -> dict[str, str]:
    """`form` for the products with weights kept in FP8 that the model has."""
    return dict.fromkeys(("fp8_linear", "fp8_grouped_linear") if config.num_experts else ("fp8_linear",), form)


def _fp8_widths(config: ModelConfig) -> tuple[int, ...]:
    """Every side of the weights that are kept in FP8."""
    if config.num_experts:
        mlp = config.moe_intermediate_size, config.shared_expert_intermediate_size
    else:
        mlp = (config.intermediate_size,)
    return config.hidden_size, config.head_dim, config.linear_key_head_dim, config.linear_value_head_dim, *mlp


def _hopper_forms(config: ModelConfig) -> Forms:
    forms = {}
    if gpu.supports(config.linear_key_head_dim, config.linear_value_head_dim, config.dtype):
        forms["gated_delta_rule"] = "pallas_gpu"
    if gpu_decode.supports(config.linear_key_head_dim, config.linear_value_head_dim):
        forms["gated_delta_step"] = "pallas_gpu"
    if gpu_cached.supports(config.head_dim, config.num_attention_heads, config.num_key_value_heads, config.dtype):
        forms["cached_attention"] = "pallas_gpu"
    if operands.supports(config.dtype):
        forms["fp8_training_linear"] = "pallas_gpu"
        if config.num_experts and not config.fp8_weights:
            forms["grouped_linear"] = "pallas_gpu"
        if config.fp8_weights and operands.supports(config.dtype, *_fp8_widths(config)):
            forms |= _fp8_forms(config, "pallas_gpu")
    return Forms(**forms)
