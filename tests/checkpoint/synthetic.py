"""Small random checkpoints in every layout that occurs, made with NumPy and the safetensors library's own writer."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy

from qwen35_jax.checkpoint.names import halves, scale_name, scale_shape, tensor_parts, vision_shapes
from qwen35_jax.config import ModelConfig

BF16 = ml_dtypes.bfloat16
FP8 = ml_dtypes.float8_e4m3fn
F32_NAMES = ("A_log", "linear_attn.norm.weight")


def hf_config(
    *,
    moe: bool = False,
    tied: bool = False,
    vision: bool = True,
    mtp: bool = True,
    hidden: int = 48,
    head_dim: int = 16,
    linear_head_dim: int = 8,
    ffn: int = 72,
    experts: int = 4,
    layers: int = 4,
) -> dict:
    """A config.json: two units of one Gated DeltaNet and one attention layer each."""
    text = {
        "model_type": "qwen3_5_moe_text" if moe else "qwen3_5_text",
        "vocab_size": 96,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "full_attention_interval": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": linear_head_dim,
        "linear_value_head_dim": linear_head_dim,
        "linear_conv_kernel_dim": 4,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "mtp_num_hidden_layers": int(mtp),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "mrope_section": [head_dim // 4 - 2, 1, 1],
            "mrope_interleaved": True,
        },
    }
    if moe:
        text |= {
            "num_experts": experts,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": ffn,
            "shared_expert_intermediate_size": ffn,
        }
    else:
        text["intermediate_size"] = ffn
    config = {"model_type": "qwen3_5_moe" if moe else "qwen3_5", "tie_word_embeddings": tied, "text_config": text}
    if vision:
        config["vision_config"] = {
            "hidden_act": "gelu_pytorch_tanh",
            "depth": 1,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_heads": 2,
            "out_hidden_size": hidden,
            "in_channels": 3,
            "patch_size": 4,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "num_position_embeddings": 9,
        }
    return config


def canonical_tensors(config: dict, *, fp8: bool = False, mtp: bool = True, vision: bool = True, seed: int = 0) -> dict:
    """Random tensors under canonical names: bf16, f32 as published, FP8 with scales where asked."""
    c = ModelConfig.from_hf(config)
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, parts in tensor_parts(c, mtp=mtp).items():
        shape = parts[0][1].tensor_shape
        if fp8 and parts[0][1].fp8:
            codes = rng.integers(0, 256, shape, dtype=np.uint8)
            tensors[name] = np.where(codes % 128 == 127, 1, codes).astype(np.uint8).view(FP8)  # 0x7f and 0xff are NaN
            tensors[scale_name(name)] = rng.uniform(0.01, 2, scale_shape(shape, halves(name))).astype(BF16)
        else:
            tensors[name] = rng.normal(size=shape).astype(np.float32 if name.endswith(F32_NAMES) else BF16)
    if vision:
        tensors |= {n: rng.normal(size=s).astype(BF16) for n, s in vision_shapes(c).items()}
    return tensors


def per_expert(tensors: dict, only: str = "") -> dict:
    """Fused experts (of names that contain `only`) as transformers writes them: a tensor per expert and projection."""
    out = {}
    for name, x in tensors.items():
        base, _, kind = name.partition(".mlp.experts.")
        if not kind or only not in name:
            out[name] = x
            continue
        suffix = ".weight_scale_inv" if kind.endswith("_scale_inv") else ".weight"
        for e, expert in enumerate(x):
            if kind.startswith("down"):
                out[f"{base}.mlp.experts.{e}.down_proj{suffix}"] = expert
            else:
                gate, up = np.split(expert, 2)
                out[f"{base}.mlp.experts.{e}.gate_proj{suffix}"] = gate
                out[f"{base}.mlp.experts.{e}.up_proj{suffix}"] = up
    return out


def renamed(tensors: dict, style: str) -> dict:
    """`text` (model., as text-only exports), `old` (language_model.model., visual.), or `published`."""
    rules = {
        "published": {},
        "text": {"model.language_model.": "model."},
        "old": {
            "model.language_model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
            "model.visual.": "visual.",
        },
    }[style]

    def rename(name: str) -> str:
        for prefix, new in rules.items():
            if name.startswith(prefix):
                return new + name[len(prefix) :]
        return name

    return {rename(name): x for name, x in tensors.items()}


def write(directory: Path, config: dict, tensors: dict, shards: int = 1) -> Path:
    """Writes config.json, some tokenizer files and the tensors, in one file or in shards with an index."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer", "note": "ü"}')
    (directory / "chat_template.jinja").write_text("{{ messages }}\n")
    (directory / "processor_config.json").write_text("{}\n")
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    if shards == 1:
        safetensors.numpy.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: tensors[n] for n in names[i::shards]}
        safetensors.numpy.save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = float(sum(x.nbytes for x in tensors.values()))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return directory
