"""Small random transformers models: the oracle of the parity tests and of the golden files.

Every parameter is drawn so that a mistake in its use shows (norm offsets, decay, biases and convolution taps are not at
their trivial starting values), and rounded to bfloat16 except those that published checkpoints store in fp32: a
checkpoint therefore holds exactly the numbers that the oracle computes with, in fp32 and in bf16.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
)
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer, Qwen3_5RMSNorm
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeDecoderLayer, Qwen3_5MoeRMSNorm

from qwen35_jax.generate.multimodal import Prepared

FP32_LEAVES = ("A_log", "linear_attn.norm.weight")
FLOAT32 = torch.float32  # under a name that `double_precision` leaves alone


@dataclasses.dataclass(frozen=True)
class Case:
    """One small configuration. `heads` and `gdn_heads` are (query or value heads, key heads)."""

    name: str
    heads: tuple[int, int] = (8, 2)
    gdn_heads: tuple[int, int] = (8, 4)
    hidden: int = 96
    ffn: int = 160
    vocab: int = 512
    layers: int = 8
    interval: int = 4
    head_dim: int = 64
    gdn_head_dim: int = 32
    experts: tuple[int, int, int, int] | None = None  # number, per token, width, width of the shared expert
    tied: bool = False
    yarn: dict | None = None
    mtp: bool = False
    vision: bool = True
    fused: bool = True  # routed experts in one tensor a layer, as published; save_pretrained writes one an expert
    tower: tuple[int, int, int, int] = (1, 32, 48, 2)  # of the vision tower: depth, hidden, width, heads
    embedding: float = 1.0  # factor on the input embedding, a power of two
    seed: int = 0


CASES = {
    case.name: case
    for case in (
        Case("dense", seed=1),
        Case("dense_tied", heads=(4, 4), gdn_heads=(4, 4), tied=True, mtp=True, interval=2, layers=4, seed=2),
        Case("dense_ratio3", heads=(6, 1), gdn_heads=(6, 2), interval=2, layers=4, seed=3),
        Case("yarn", yarn={"factor": 4.0, "original_max_position_embeddings": 256}, interval=2, layers=4, seed=4),
        Case("moe", experts=(12, 3, 48, 64), fused=False, seed=5),
        Case(
            "moe_tied_mtp",
            heads=(4, 2),
            gdn_heads=(4, 2),
            experts=(8, 2, 64, 48),
            tied=True,
            mtp=True,
            vision=False,
            interval=2,
            layers=4,
            seed=6,
        ),
        # "dense" and "moe" with states that start about as large as the sum of what the layers add to them. There, they start at
        # a twelfth of it, and each early rounding is magnified: fp32 does not determine gradients to 1e-4.
        Case("dense_deep", embedding=16.0, seed=1),
        Case("moe_deep", experts=(12, 3, 48, 64), fused=False, embedding=16.0, seed=5),
        Case("attention_only", interval=1, layers=3, seed=7),
        Case("vision", heads=(8, 8), gdn_heads=(16, 8), tower=(3, 64, 96, 4), interval=2, layers=4, seed=12),
        Case("vision_moe", experts=(8, 2, 64, 48), tower=(3, 64, 96, 4), interval=2, layers=4, seed=13),
        # Head counts, widths and experts that eight shards divide …
        Case("mesh_dense", heads=(8, 8), gdn_heads=(16, 8), interval=2, layers=2, seed=8),
        Case("mesh_moe", heads=(16, 8), gdn_heads=(8, 8), experts=(16, 3, 48, 64), interval=2, layers=2, seed=9),
        # … and that two to eight shards have to repeat (experts: over `data` alone on most meshes).
        Case("mesh_dense_repeat", heads=(4, 2), gdn_heads=(4, 2), tied=True, interval=2, layers=2, seed=10),
        Case("mesh_moe_repeat", heads=(2, 1), gdn_heads=(4, 1), experts=(4, 2, 64, 64), interval=2, layers=2, seed=11),
    )
}


def hf_config(case: Case):
    """The transformers configuration (multimodal; text-only where the case has no vision tower)."""
    pairs = case.head_dim // 8
    section = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    rope |= {"mrope_section": section, "mrope_interleaved": True}
    text = {
        "vocab_size": case.vocab,
        "hidden_size": case.hidden,
        "num_hidden_layers": case.layers,
        "layer_types": [("linear", "full")[(i + 1) % case.interval == 0] + "_attention" for i in range(case.layers)],
        "num_attention_heads": case.heads[0],
        "num_key_value_heads": case.heads[1],
        "head_dim": case.head_dim,
        "linear_num_value_heads": case.gdn_heads[0],
        "linear_num_key_heads": case.gdn_heads[1],
        "linear_key_head_dim": case.gdn_head_dim,
        "linear_value_head_dim": case.gdn_head_dim,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": case.tied,
        "rope_parameters": rope | ({"rope_type": "yarn"} | case.yarn if case.yarn else {}),
        "eos_token_id": case.vocab - 1,
        "mtp_num_hidden_layers": int(case.mtp),
    }
    if case.experts:
        names = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
        text |= dict(zip(names, case.experts, strict=True))
    else:
        text["intermediate_size"] = case.ffn
    vision = dict(zip(("depth", "hidden_size", "intermediate_size", "num_heads"), case.tower, strict=True))
    vision |= {"out_hidden_size": case.hidden}
    vision |= {"num_position_embeddings": 16, "patch_size": 4}
    special = {"image_token_id": case.vocab - 2, "video_token_id": case.vocab - 3}
    special |= {"vision_start_token_id": case.vocab - 4, "vision_end_token_id": case.vocab - 5}
    kind = Qwen3_5MoeConfig if case.experts else Qwen3_5Config
    config = kind(text_config=text, vision_config=vision, tie_word_embeddings=case.tied, **special)
    return config if case.vision else config.text_config


class MtpHead(nn.Module):
    """The multi-token-prediction layer (which transformers drops) from its blocks, under the checkpoint's names."""

    def __init__(self, text_config):
        super().__init__()
        moe = "moe" in text_config.model_type
        norm = Qwen3_5MoeRMSNorm if moe else Qwen3_5RMSNorm
        config = copy.deepcopy(text_config)
        config.layer_types = ["full_attention"]
        config._attn_implementation = "eager"
        width = config.hidden_size
        self.fc = nn.Linear(2 * width, width, bias=False)
        self.layers = nn.ModuleList([(Qwen3_5MoeDecoderLayer if moe else Qwen3_5DecoderLayer)(config, 0)])
        self.pre_fc_norm_embedding = norm(width, eps=config.rms_norm_eps)
        self.pre_fc_norm_hidden = norm(width, eps=config.rms_norm_eps)
        self.norm = norm(width, eps=config.rms_norm_eps)

    def forward(self, embedding, hidden, cos_sin):
        """Embedding of the next token and final hidden state [B,T,D] -> state [B,T,D] for the token after next."""
        x = self.fc(torch.cat([self.pre_fc_norm_embedding(embedding), self.pre_fc_norm_hidden(hidden)], dim=-1))
        length = x.shape[1]
        mask = torch.full((length, length), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)[None, None]
        return self.norm(self.layers[0](x, position_embeddings=cos_sin, attention_mask=mask))


@dataclasses.dataclass
class Oracle:
    """A transformers model, with its MTP layer if the case has one."""

    case: Case
    model: nn.Module
    mtp: MtpHead | None

    @property
    def text_model(self) -> nn.Module:
        return self.model.model.language_model if self.case.vision else self.model.model


def build(case: Case) -> Oracle:
    """The random model of a case, in fp32; the same numbers every time."""
    config = hf_config(case)
    config._attn_implementation = "eager"
    kinds = {
        (False, True): Qwen3_5ForConditionalGeneration,
        (True, True): Qwen3_5MoeForConditionalGeneration,
        (False, False): Qwen3_5ForCausalLM,
        (True, False): Qwen3_5MoeForCausalLM,
    }
    model = kinds[bool(case.experts), case.vision](config).eval()
    mtp = MtpHead(config.get_text_config()).eval() if case.mtp else None
    generator = torch.Generator().manual_seed(case.seed)
    for module in (model, mtp) if mtp else (model,):
        for name, parameter in module.named_parameters():
            parameter.data = _random(name, parameter.shape, generator)
            if name.endswith("embed_tokens.weight"):
                parameter.data *= case.embedding
            parameter.requires_grad_(False)
    return Oracle(case, model, mtp)


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    normal = torch.randn(shape, generator=generator)
    if name.endswith("A_log"):
        return torch.empty(shape).uniform_(0.01, 8.0, generator=generator).log_()
    if name.endswith("linear_attn.norm.weight"):
        return 1 + 0.3 * normal
    if name.endswith("dt_bias"):
        x = normal - 1.5
    elif "conv1d" in name:
        x = 0.5 * normal
    elif "embed_tokens" in name or "lm_head" in name:
        x = 2.0 * normal / shape[-1] ** 0.5
    elif len(shape) == 1:  # norm offsets; the vision tower's norms and biases
        x = 0.3 * normal
    elif name.endswith("mlp.gate.weight"):  # a decided router: with flat probabilities bf16 would choose other experts
        x = 3.0 * normal / shape[-1] ** 0.5
    else:
        x = normal / shape[-1] ** 0.5
    return x.to(torch.bfloat16).to(torch.float32)


def save(oracle: Oracle, directory: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes a Hugging Face directory in the layout of published checkpoints: names, prefixes, dtypes."""
    directory = Path(directory)
    model = copy.deepcopy(oracle.model)
    for name, parameter in model.named_parameters():
        if not name.endswith(FP32_LEAVES):
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(directory)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    if oracle.case.experts and oracle.case.fused:
        tensors = {name: x for name, x in tensors.items() if ".mlp.experts." not in name}
        tensors |= {name: x.clone() for name, x in model.state_dict().items() if ".mlp.experts." in name}
    for name, x in oracle.mtp.state_dict().items() if oracle.mtp else ():
        tensors |= {f"mtp.{part}": y.to(dtype).contiguous() for part, y in _per_expert(name, x)}
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config.pop("_attn_implementation", None)
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def _per_expert(name: str, x: torch.Tensor):
    """Published MTP layers keep their experts apart: one tensor a projection and expert."""
    if name.endswith("experts.gate_up_proj"):
        for i, expert in enumerate(x):
            for part, y in zip(("gate", "up"), expert.chunk(2), strict=True):
                yield name.replace("gate_up_proj", f"{i}.{part}_proj.weight"), y
    elif name.endswith("experts.down_proj"):
        for i, expert in enumerate(x):
            yield name.replace("down_proj", f"{i}.down_proj.weight"), expert
    else:
        yield name, x


def random_tokens(case: Case, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Ordinary token ids (the last few of the vocabulary are special)."""
    return torch.randint(0, case.vocab - 8, shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def full_forward(oracle: Oracle, ids: torch.Tensor, layers: bool = False):
    """Logits [B,T,V] of a batch without padding; with `layers` also the states after embedding and each layer."""
    if not layers:
        return oracle.model(input_ids=ids, use_cache=False).logits
    hidden = [oracle.text_model.embed_tokens(ids)]
    hooks = [layer.register_forward_hook(lambda _, __, out: hidden.append(out)) for layer in oracle.text_model.layers]
    try:
        logits = oracle.model(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return logits, hidden


@torch.inference_mode()
def greedy(oracle: Oracle, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """The next tokens [B,new_tokens] by argmax, through the cache of transformers."""
    out = oracle.model(input_ids=ids, use_cache=True)
    tokens = [out.logits[:, -1].argmax(-1, keepdim=True)]
    while len(tokens) < new_tokens:
        out = oracle.model(input_ids=tokens[-1], past_key_values=out.past_key_values, use_cache=True)
        tokens.append(out.logits[:, -1].argmax(-1, keepdim=True))
    return torch.cat(tokens, dim=1)


@torch.inference_mode()
def mtp_logits(oracle: Oracle, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B,T-1,V] of the MTP layer: position i sees final hidden state i and token i+1, predicts token i+2."""
    hidden = oracle.text_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    embedding = oracle.text_model.embed_tokens(ids[:, 1:])
    positions = torch.arange(hidden.shape[1]).expand(3, ids.shape[0], -1)
    return oracle.model.lm_head(oracle.mtp(embedding, hidden, oracle.text_model.rotary_emb(hidden, positions)))


def to_bfloat16(oracle: Oracle) -> Oracle:
    """The same model computing in bf16; what checkpoints keep in fp32 stays fp32 (transformers at its best)."""
    model = copy.deepcopy(oracle.model)
    for name, parameter in model.named_parameters():
        if not name.endswith(FP32_LEAVES):
            parameter.data = parameter.data.to(torch.bfloat16)
    return Oracle(oracle.case, model, None)


def to_float64(oracle: Oracle) -> Oracle:
    """The same numbers in float64, to compute with under `double_precision`."""
    model, mtp = copy.deepcopy((oracle.model, oracle.mtp))
    for module in (model, mtp) if mtp else (model,):
        module.double()
        for block in module.modules():
            if hasattr(block, "config"):
                block.config._experts_implementation = "eager"  # the grouped products have no float64
    return Oracle(oracle.case, model, mtp)


class _NoFloat32(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        assert not any(isinstance(x, torch.Tensor) and x.dtype == FLOAT32 for x in tree_leaves(out)), operation
        return out


@contextlib.contextmanager
def double_precision():
    """Inside, what transformers casts to float32 is cast to float64, and an operation with a float32 result is an error."""
    torch.set_default_dtype(torch.float64)
    try:
        with (
            mock.patch.object(torch, "float32", torch.float64),
            mock.patch.object(torch, "float", torch.float64),
            mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
            _NoFloat32(),
        ):
            yield
    finally:
        torch.set_default_dtype(FLOAT32)


def pictured_inputs(prepared: Prepared, image_id: int, video_id: int) -> dict:
    """Arguments of transformers' forward pass for a prompt with pictures; the ids are those of the placeholders."""
    ids = torch.tensor([prepared.token_ids])
    result = {"input_ids": ids}
    for kind, pixels, grids in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        own = [x for x in prepared.visuals if x.kind == kind]
        if own:
            result[pixels] = torch.tensor(np.concatenate([x.patches for x in own]).astype(np.float32) / 127.5 - 1)
            result[grids] = torch.tensor([x.grid for x in own])
    if prepared.visuals:
        result["mm_token_type_ids"] = (ids == image_id).int() + 2 * (ids == video_id).int()
    return result
