"""What a Qwen3.5 model is made of: frozen dataclasses read from a Hugging Face `config.json`, and the published sizes by name."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from typing import Any

from etils import epath

from qwen35_jax.errors import UserError

MODEL_TYPES = ("qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text")
ROPE_TYPES = ("default", "yarn")
LARGEST_INT = 2**31 - 1  # no size is larger, and what follows from one still fits a float
LARGEST_COUNT = 4096  # of layers and of experts: each is a parameter with a name
ASSETS = epath.Path(__file__).parent / "assets"


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: `rope_parameters` of config.json. `factor` and what follows belong to YaRN."""

    theta: float
    partial_rotary_factor: float
    mrope_section: tuple[int, ...]
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self):
        if self.rope_type not in ROPE_TYPES:
            raise UserError(f"rope_type is {self.rope_type!r}; accepted are {', '.join(ROPE_TYPES)}")
        if not 1 <= self.theta <= 1e12:
            raise UserError(f"config: rope_theta is {self.theta}; it must be 1 to 1e12")
        if not 0 < self.partial_rotary_factor <= 1:
            raise UserError(f"config: partial_rotary_factor is {self.partial_rotary_factor}; it must be above 0 and at most 1")
        if self.rope_type == "yarn" and not (self.factor >= 1 and self.original_max_position_embeddings):
            raise UserError("rope_type 'yarn' needs factor >= 1 and original_max_position_embeddings in rope_parameters")
        if self.rope_type == "yarn" and self.factor * self.original_max_position_embeddings > LARGEST_INT:
            raise UserError(f"yarn: {self.factor} times {self.original_max_position_embeddings} positions are too many")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower: `vision_config` of config.json, under its own names."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    num_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The text model under the field names of `text_config`, the vision tower beside it, and the form of the parameters.

    `dtype` is that of parameters and activations. `fp8_weights` keeps the linear layers that the published FP8 checkpoints
    quantise as `Fp8Weight`; `quantized_source` says that the checkpoint stores them so. `fp8_activations`: their products take
    activations in FP8 too.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    full_attention_interval: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    intermediate_size: int = 0
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    router_aux_loss_coef: float = 0.0
    mtp_num_hidden_layers: int = 0
    linear_conv_kernel_dim: int = 4
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    vision: VisionConfig | None = None
    image_token_id: int | None = None  # of the placeholders that rows of the vision tower replace
    video_token_id: int | None = None
    dtype: str = "bfloat16"
    fp8_weights: bool = False
    quantized_source: bool = False
    fp8_activations: bool = False

    def __post_init__(self):
        ffn = "moe_intermediate_size" if self.num_experts else "intermediate_size"
        for field in (*_POSITIVE, ffn):
            if getattr(self, field) <= 0:
                raise UserError(f"config: {field} is {getattr(self, field)}; it must be 1 or more")
        for field in ("num_hidden_layers", "num_experts"):
            if getattr(self, field) > LARGEST_COUNT:
                raise UserError(f"config: {field} is {getattr(self, field)}; the most that is supported is {LARGEST_COUNT}")
        if not 0 < self.rms_norm_eps < 1:
            raise UserError(f"config: rms_norm_eps is {self.rms_norm_eps}; it must be above 0 and below 1")
        for field, divisor in (
            ("num_hidden_layers", "full_attention_interval"),
            ("num_attention_heads", "num_key_value_heads"),
            ("linear_num_value_heads", "linear_num_key_heads"),
        ):
            n, d = getattr(self, field), getattr(self, divisor)
            if n <= 0 or d <= 0 or n % d:
                raise UserError(f"config: {field} ({n}) must be a positive multiple of {divisor} ({d})")
        if self.linear_conv_kernel_dim != 4:
            raise UserError(f"config: linear_conv_kernel_dim is {self.linear_conv_kernel_dim}; only 4 is supported")
        if self.mtp_num_hidden_layers not in (0, 1):
            raise UserError(f"config: mtp_num_hidden_layers is {self.mtp_num_hidden_layers}; accepted are 0 and 1")
        if self.num_experts and not 0 < self.num_experts_per_tok <= self.num_experts:
            raise UserError(
                f"config: num_experts_per_tok ({self.num_experts_per_tok}) must be 1 to num_experts ({self.num_experts})"
            )
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise UserError(
                f"config: head_dim x partial_rotary_factor = {self.head_dim * self.rope.partial_rotary_factor} is no even width"
            )
        if sum(self.rope.mrope_section) * 2 != self.rotary_dim:
            raise UserError(
                f"config: mrope_section {list(self.rope.mrope_section)} must add up to {self.rotary_dim // 2} rotary pairs"
            )
        if self.dtype not in ("bfloat16", "float32"):
            raise UserError(f"dtype is {self.dtype!r}; accepted are bfloat16 and float32")
        if self.fp8_activations and not self.fp8_weights:
            raise UserError("fp8_activations: only products of weights in FP8 take activations in FP8; keep the weights so too")

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rope.partial_rotary_factor)

    @property
    def num_units(self) -> int:
        """Repeating units: `full_attention_interval` layers each, the last of them with full attention."""
        return self.num_hidden_layers // self.full_attention_interval

    @property
    def context_length(self) -> int:
        """Tokens of the longest sequence: config.json may leave max_position_embeddings as they were before YaRN."""
        stretched = self.rope.factor * self.rope.original_max_position_embeddings if self.rope.rope_type == "yarn" else 0
        return max(self.max_position_embeddings, int(stretched))

    def replace(self, **changes) -> ModelConfig:
        return dataclasses.replace(self, **changes)

    def with_yarn(self, factor: float) -> ModelConfig:
        """The model for `factor` times its positions, stretched by YaRN. UserError for a factor below 1, or without end."""
        if not math.isfinite(factor):
            raise UserError(f"yarn is {factor}; it must be a number")
        known = self.rope.original_max_position_embeddings or self.max_position_embeddings
        rope = {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": known}
        return self.replace(rope=dataclasses.replace(self.rope, **rope), max_position_embeddings=int(known * factor))

    @classmethod
    def from_hf(cls, source: str | epath.Path | Mapping[str, Any]) -> ModelConfig:
        """Reads the contents, the file or the directory of a Hugging Face config.json.

        Raises UserError naming the field, its value and what is accepted, for anything missing, unknown or impossible.
        """
        raw = source if isinstance(source, Mapping) else _read_json(epath.Path(source))
        return _from_hf(cls, raw)

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """The published size called `name` (random weights), or `tiny`, the packaged model."""
        if name == "tiny":
            return cls.from_hf(ASSETS / "tiny")
        if name not in _SIZES:
            raise UserError(f"no preset {name!r}; presets are {', '.join(PRESETS)}")
        return _preset(cls, name)


def _read_json(path: epath.Path) -> dict[str, Any]:
    path = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no config.json at {path}: is this a Hugging Face model directory?") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not valid JSON ({e}): download it again") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds a {type(raw).__name__}, not a JSON object")
    return raw


class _Fields:
    """Typed access to one JSON object: every complaint names the field, the value and what is accepted."""

    def __init__(self, raw: Mapping[str, Any], where: str):
        self.raw, self.where = raw, where

    def get(self, name: str, kind: type, default: Any = ...) -> Any:
        value = self.raw.get(name, ...)
        if value is ...:
            if default is ...:
                raise UserError(f"config: {self.where}{name} is missing (expected {kind.__name__})")
            return default
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"config: {self.where}{name} is {value!r:.200}; expected {kind.__name__}")
        if kind is int and not 0 <= value <= LARGEST_INT:
            raise UserError(f"config: {self.where}{name} is {value!r:.60}; expected 0 to {LARGEST_INT}")
        if kind is float and not abs(value) <= sys.float_info.max:  # NaN, Infinity, and integers that are no float
            raise UserError(f"config: {self.where}{name} is {value!r:.60}; expected a finite number")
        return kind(value)

    def only(self, name: str, *accepted: Any) -> None:
        """The field, where present, must have one of these values: there is no code for others."""
        value = self.raw.get(name, accepted[0])
        if not any(value is a if isinstance(a, bool) or a is None else value == a for a in accepted):
            raise UserError(f"config: {self.where}{name} is {value!r}; supported: {', '.join(map(repr, accepted))}")


def _from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UserError(f"config: model_type is {model_type!r}; accepted are {', '.join(MODEL_TYPES)}")
    nested = "text_config" in raw
    text = raw["text_config"] if nested else raw
    if not isinstance(text, Mapping):
        raise UserError(f"config: text_config is {type(text).__name__}; expected an object")
    if not nested and not model_type.endswith("_text"):
        raise UserError(f"config: text_config is missing (model_type {model_type!r} needs one)")
    if text.get("model_type", model_type) not in MODEL_TYPES:
        raise UserError(f"config: text_config.model_type is {text['model_type']!r}; accepted are {', '.join(MODEL_TYPES)}")
    f = _Fields(text, "text_config." if nested else "")
    moe = "moe" in model_type
    _refuse_unsupported(f)
    numbers = {name: f.get(name, int) for name in _REQUIRED + (_REQUIRED_MOE if moe else _REQUIRED_DENSE)}
    return cls(
        **numbers,
        full_attention_interval=_interval(f, numbers["num_hidden_layers"]),
        rope=_rope(f),
        tie_word_embeddings=f.get("tie_word_embeddings", bool, _Fields(raw, "").get("tie_word_embeddings", bool, False)),
        rms_norm_eps=f.get("rms_norm_eps", float),
        initializer_range=f.get("initializer_range", float, 0.02),
        router_aux_loss_coef=f.get("router_aux_loss_coef", float, 0.001) if moe else 0.0,
        mtp_num_hidden_layers=f.get("mtp_num_hidden_layers", int, 0),
        vision=_vision(raw),
        **{name: _Fields(raw, "").get(name, int, None) for name in ("image_token_id", "video_token_id")},
        quantized_source=_quantized(raw),
    )


_REQUIRED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
    "linear_conv_kernel_dim", "max_position_embeddings",
)  # fmt: skip
_POSITIVE = (
    "vocab_size", "hidden_size", "head_dim", "linear_key_head_dim", "linear_value_head_dim", "max_position_embeddings",
)  # fmt: skip
_REQUIRED_DENSE = ("intermediate_size",)
_REQUIRED_MOE = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")


def _refuse_unsupported(f: _Fields) -> None:
    f.only("hidden_act", "silu")
    f.only("attention_bias", False)
    f.only("attention_dropout", 0.0, 0)
    f.only("attn_output_gate", True)
    f.only("output_gate_type", "swish", "silu")
    f.only("mamba_ssm_dtype", "float32")
    f.only("mtp_use_dedicated_embeddings", False)
    f.only("norm_topk_prob", True)
    f.only("mlp_only_layers", [], None)


def _interval(f: _Fields, layers: int) -> int:
    """The unit length, from `layer_types` where given: it must repeat (n-1) x linear_attention, full_attention."""
    kinds = f.raw.get("layer_types")
    if kinds is None:
        return f.get("full_attention_interval", int)
    interval = kinds.index("full_attention") + 1 if isinstance(kinds, list) and "full_attention" in kinds else 0
    pattern = ["linear_attention"] * (interval - 1) + ["full_attention"]
    if not interval or len(kinds) != layers or kinds != pattern * (layers // interval):
        raise UserError(
            f"config: {f.where}layer_types must hold num_hidden_layers ({layers}) entries that "
            "repeat linear_attention, …, full_attention"
        )
    return interval


def _rope(f: _Fields) -> RopeConfig:
    raw = f.raw.get("rope_parameters")
    if not isinstance(raw, Mapping):
        raise UserError(f"config: {f.where}rope_parameters is {raw!r}; expected an object")
    r = _Fields(raw, f.where + "rope_parameters.")
    section = raw.get("mrope_section")
    if not isinstance(section, list) or len(section) != 3 or not all(isinstance(n, int) and n >= 0 for n in section):
        raise UserError(f"config: {r.where}mrope_section is {section!r}; expected three whole numbers")
    r.only("mrope_interleaved", True)
    factor = f.get("partial_rotary_factor", float, None)
    yarn = {}
    if raw.get("rope_type") == "yarn":
        yarn = {
            "factor": r.get("factor", float),
            "original_max_position_embeddings": r.get("original_max_position_embeddings", int),
            "attention_factor": r.get("attention_factor", float, None) if raw.get("attention_factor") is not None else None,
            "beta_fast": r.get("beta_fast", float, 32.0),
            "beta_slow": r.get("beta_slow", float, 1.0),
            "truncate": r.get("truncate", bool, True),
        }
        r.only("mscale", None)
        r.only("mscale_all_dim", None)
    return RopeConfig(
        theta=r.get("rope_theta", float),
        partial_rotary_factor=r.get("partial_rotary_factor", float, ... if factor is None else factor),
        mrope_section=tuple(section),
        rope_type=r.get("rope_type", str),
        **yarn,
    )


def _vision(raw: Mapping[str, Any]) -> VisionConfig | None:
    vision = raw.get("vision_config")
    if vision is None:
        return None
    if not isinstance(vision, Mapping):
        raise UserError(f"config: vision_config is {type(vision).__name__}; expected an object")
    f = _Fields(vision, "vision_config.")
    f.only("hidden_act", "gelu_pytorch_tanh")
    f.only("deepstack_visual_indexes", [], None)
    return VisionConfig(**{field.name: f.get(field.name, int) for field in dataclasses.fields(VisionConfig)})


def _quantized(raw: Mapping[str, Any]) -> bool:
    quantization = raw.get("quantization_config")
    if quantization is None:
        return False
    if not isinstance(quantization, Mapping):
        raise UserError(f"config: quantization_config is {type(quantization).__name__}; expected an object")
    f = _Fields(quantization, "quantization_config.")
    f.only("quant_method", "fp8")
    f.only("fmt", "e4m3")
    f.only("weight_block_size", [128, 128])
    return True


# hidden, layers, query heads, key/value heads, Gated DeltaNet value heads, dense width or (experts, top-k, expert width), tied,
# vision (depth, hidden, intermediate, heads)
_SIZES: dict[str, tuple] = {
    "0.8b": (1024, 24, 8, 2, 16, 3584, True, (12, 768, 3072, 12)),
    "2b": (2048, 24, 8, 2, 16, 6144, True, (24, 1024, 4096, 16)),
    "4b": (2560, 32, 16, 4, 32, 9216, True, (24, 1024, 4096, 16)),
    "9b": (4096, 32, 16, 4, 32, 12288, False, (27, 1152, 4304, 16)),
    "27b": (5120, 64, 24, 4, 48, 17408, False, (27, 1152, 4304, 16)),
    "35b-a3b": (2048, 40, 16, 2, 32, (256, 8, 512), False, (27, 1152, 4304, 16)),
    "122b-a10b": (3072, 48, 32, 2, 64, (256, 8, 1024), False, (27, 1152, 4304, 16)),
    "397b-a17b": (4096, 60, 32, 2, 64, (512, 10, 1024), False, (27, 1152, 4304, 16)),
}
PRESETS = ("tiny", *_SIZES)


def _preset(cls, name: str) -> ModelConfig:
    hidden, layers, heads, kv_heads, value_heads, ffn, tied, (depth, v_hidden, v_inter, v_heads) = _SIZES[name]
    dense = isinstance(ffn, int)
    experts, top_k, width = (0, 0, 0) if dense else ffn
    return cls(
        vocab_size=248320,
        hidden_size=hidden,
        num_hidden_layers=layers,
        full_attention_interval=4,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=value_heads,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        rope=RopeConfig(theta=1e7, partial_rotary_factor=0.25, mrope_section=(11, 11, 10)),
        max_position_embeddings=262144,
        tie_word_embeddings=tied,
        intermediate_size=ffn if dense else 0,
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=width,
        shared_expert_intermediate_size=width,
        router_aux_loss_coef=0.0 if dense else 0.001,
        mtp_num_hidden_layers=1,
        vision=VisionConfig(depth, v_hidden, v_inter, v_heads, hidden, 3, 16, 2, 2, 2304),
        image_token_id=248056,
        video_token_id=248057,
    )
