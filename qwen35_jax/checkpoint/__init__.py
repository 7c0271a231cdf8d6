"""Checkpoints: Hugging Face safetensors and converted (Orbax) directories, one interface, into sharded arrays."""

from qwen35_jax.checkpoint.canonical import CanonicalSource, source_has_mtp, source_has_vision
from qwen35_jax.checkpoint.export import check_export_target, export_hf, to_hf_config, vision_hf_config
from qwen35_jax.checkpoint.load import load_params, load_vision_params
from qwen35_jax.checkpoint.opening import open_source
from qwen35_jax.checkpoint.source import TensorSource

__all__ = [
    "CanonicalSource",
    "TensorSource",
    "check_export_target",
    "export_hf",
    "load_params",
    "load_vision_params",
    "open_source",
    "source_has_mtp",
    "source_has_vision",
    "to_hf_config",
    "vision_hf_config",
]
