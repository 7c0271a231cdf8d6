"""Export: a live parameter tree as a Hugging Face directory, with the names, layouts and dtypes of the published ones."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from qwen35_jax.checkpoint.canonical import CanonicalSource, source_has_vision
from qwen35_jax.checkpoint.names import VISION, Path, tensor_parts
from qwen35_jax.checkpoint.safetensors_file import is_local
from qwen35_jax.checkpoint.shards import Spec, shards_of, write_shards
from qwen35_jax.checkpoint.source import TensorSource, copy_into, text_files
from qwen35_jax.checkpoint.staging import check_destination, staging
from qwen35_jax.config import ModelConfig
from qwen35_jax.errors import UserError, writable
from qwen35_jax.sharding import to_host

FLOAT32 = (".A_log", ".linear_attn.norm.weight")  # as published; everything else is of the export's dtype
PIECE_BYTES = 256 << 20  # what is gathered from the devices at once
NOT_COPIED = ("config.json", "README.md")  # the first is written here, the second describes another model


def check_export_target(directory: epath.PathLike) -> None:
    """UserError where `export_hf` could not write: something is there, or may not be. Call it before training."""
    directory = check_destination(directory)
    if is_local(directory):
        above = next(parent for parent in pathlib.Path(directory).parents if parent.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise UserError(f"{directory} cannot be made: {above} is not a directory one can write to")


def export_hf(
    params: dict,
    config: ModelConfig,
    directory: epath.PathLike,
    *,
    template_dir: epath.PathLike | None = None,
    dtype: str = "bfloat16",
    hf_config: Mapping[str, Any] | None = None,
    vision_source: TensorSource | None = None,
) -> None:
    """Writes a directory that transformers and `load` read. All processes call it together; the first one writes.

    Args:
        params: the model's parameters, stacked or unrolled, in any float dtype and sharding; with `mtp` or without; "vision" may
            hold those of its vision tower.
        config: of the model.
        directory: to make, local or gs://. It must not exist, and appears only when it is complete.
        template_dir: where tokenizer, chat template, generation settings and licence are copied from.
        dtype: of the tensors, bfloat16 or float32. Decay rates and gated norms are float32 always, as published.
        hf_config: the config.json that the model was loaded with; without it one is made from `config`.
        vision_source: the checkpoint whose vision tower, if it has one and `params` have none, is copied unchanged. Without
            either the export is text alone.

    On the host there is one tensor at a time. Raises UserError where `directory` exists or cannot be written, and
    ValueError where `params` or `hf_config` are not those of `config`.
    """
    if dtype not in ("bfloat16", "float32"):
        raise UserError(f"cannot export as {dtype!r}; accepted are bfloat16 and float32")
    check_export_target(directory)
    vision = None if "vision" in params else _vision_tensors(vision_source, config)
    sees = vision or "vision" in params
    described = config.replace(
        vision=config.vision if sees else None, mtp_num_hidden_layers=int("mtp" in params), fp8_weights=False
    )
    text = json.dumps(_final_config(hf_config, described, dtype), indent=2, ensure_ascii=False) + "\n"
    export = _Export(params, config, np.dtype(dtype), vision)
    if jax.process_index() != 0:
        for shard in export.shards:
            for _ in export.data(shard):  # takes part in gathering
                pass
    else:
        with writable(directory), staging(directory) as work:
            work.mkdir(exist_ok=True)
            (work / "config.json").write_text(text)
            for file in text_files(epath.Path(template_dir)) if template_dir is not None else ():
                if file.name not in NOT_COPIED:
                    copy_into(work, file)
            export.write(work)
    multihost_utils.sync_global_devices("export_hf")


class _Export:
    """The tensors of one export and the files that they go to. `vision`: where the vision tower is copied from, or None."""

    def __init__(self, params: dict, config: ModelConfig, dtype: np.dtype, vision: CanonicalSource | None):
        self.params, self.vision = params, vision
        self.parts = tensor_parts(config, mtp="mtp" in params, vision="vision" in params)
        self.tensors: dict[str, Spec] = {}
        for name, parts in self.parts.items():
            self.tensors[name] = (np.dtype(np.float32) if name.endswith(FLOAT32) else dtype, parts[0][1].tensor_shape)
        for name, spec in vision.tensors.items() if vision else ():
            if name.startswith(VISION):
                self.tensors[name] = (spec.dtype, spec.shape)
        self._check()
        self.shards = shards_of(self.tensors)

    def _check(self) -> None:
        for path, view in (part for parts in self.parts.values() for part in parts):
            leaf, unit = _leaf(self.params, path)
            shape = leaf.shape if unit is None else leaf.shape[1:]
            if shape != view.shape:
                raise ValueError(f"{'/'.join(map(str, path))} has shape {shape}; the configuration makes it {view.shape}")

    def write(self, work: epath.Path) -> None:
        """The weights: one file, or shards and their index."""
        write_shards(work, self.tensors, self.shards, self.data)

    def data(self, shard: list[str]) -> Iterator[np.ndarray]:
        """The tensors of a file, one after the other."""
        for name in shard:
            if name in self.parts:
                yield self._joined(name)
            else:
                yield self.vision.read(name)
                self.vision.release(name)

    def _joined(self, name: str) -> np.ndarray:
        dtype, shape = self.tensors[name]
        tensor = np.empty(shape, dtype)
        bits = np.dtype(f"u{dtype.itemsize}")  # NumPy copies bfloat16 slowly
        for path, view in self.parts[name]:
            # The devices transpose (NumPy is slow at it), so that what is put lies as in the tensor.
            order = tuple(int(axis) for axis in np.argsort(view.order))
            part = _on_host(*_leaf(self.params, path), order, dtype)
            view.put(tensor.view(bits), part.view(bits).transpose(view.order))
        return tensor


def _leaf(params: dict, path: Path) -> tuple[jax.Array, int | None]:
    """The array that holds a parameter and, where units are stacked in it, the parameter's unit."""
    keys, unit = path, None
    if path[:2] == ("vision", "blocks"):
        keys, unit = (*path[:2], *path[3:]), path[2]
    elif path[0] == "units" and isinstance(params["units"], dict):
        keys, unit = (path[0], *path[2:]), path[1]
    leaf: Any = params
    for key in keys:
        if isinstance(leaf, dict) and key not in leaf:
            raise ValueError(f"the parameters lack {'/'.join(map(str, path))}")
        leaf = leaf[key]
    return leaf, unit


def _on_host(x: jax.Array, unit: int | None, order: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The parameter cast to `dtype`, its axes in the tensor's `order`, from wherever its shards are, on every process."""
    place = x.sharding.spec if isinstance(x.sharding, jax.sharding.NamedSharding) else ()
    place = (*place, *(None,) * x.ndim)[unit is not None :]
    x = _arranged(x, order, dtype) if unit is None else _arranged_unit(x, unit, order, dtype)
    # Cut along an axis that no device shares with another: the pieces are gathered without moving anything first.
    axis = next((i for i, a in enumerate(order) if x.shape[i] > 1 and place[a] is None), None)
    if axis is None or x.nbytes <= PIECE_BYTES:
        return to_host(x)
    out = np.empty(x.shape, dtype)
    step = max(1, PIECE_BYTES * x.shape[axis] // x.nbytes)
    for start in range(0, x.shape[axis], step):
        size = min(step, x.shape[axis] - start)
        out[(slice(None),) * axis + (slice(start, start + size),)] = to_host(_piece(x, start, size, axis))
    return out


@functools.partial(jax.jit, static_argnames=("order", "dtype"))
def _arranged(x: jax.Array, order: tuple[int, ...], dtype) -> jax.Array:
    return x.transpose(order).astype(dtype)


@functools.partial(jax.jit, static_argnames=("order", "dtype"))
def _arranged_unit(x: jax.Array, unit, order: tuple[int, ...], dtype) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, unit, keepdims=False).transpose(order).astype(dtype)


@functools.partial(jax.jit, static_argnames=("size", "axis"))
def _piece(x: jax.Array, start, size: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _vision_tensors(source: TensorSource | None, config: ModelConfig) -> CanonicalSource | None:
    """The source under canonical names if it has a vision tower."""
    if source is None:
        return None
    canonical = source if isinstance(source, CanonicalSource) else CanonicalSource(source, config)
    return canonical if source_has_vision(canonical) else None


def _final_config(hf_config: Mapping[str, Any] | None, config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json to write. ValueError where `hf_config` describes another model."""
    if hf_config is None:
        return to_hf_config(config.replace(dtype=dtype))
    result = copy.deepcopy(dict(hf_config))
    text = result.get("text_config", result)
    result.pop("quantization_config", None)
    for part in (result, text):
        part.pop("torch_dtype", None)  # the older name of dtype
        if "dtype" in part or part is text:
            part["dtype"] = dtype
    if text.get("mtp_num_hidden_layers", 0) != config.mtp_num_hidden_layers:
        text["mtp_num_hidden_layers"] = config.mtp_num_hidden_layers
    if config.vision is None and result.pop("vision_config", None) is not None:
        result["architectures"] = _architectures(config)
    read = ModelConfig.from_hf(result)
    for field in dataclasses.fields(config):
        ours, theirs = getattr(config, field.name), getattr(read, field.name)
        if ours != theirs and field.name not in ("dtype", "quantized_source"):
            raise ValueError(f"hf_config is of another model: its {field.name} is {theirs}, the parameters have {ours}")
    return result


def _architectures(config: ModelConfig) -> list[str]:
    family = "Qwen3_5Moe" if config.num_experts else "Qwen3_5"
    return [family + ("ForConditionalGeneration" if config.vision else "ForCausalLM")]


_COPIED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "full_attention_interval", "num_attention_heads", "num_key_value_heads",
    "head_dim", "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
    "linear_conv_kernel_dim", "max_position_embeddings", "tie_word_embeddings", "rms_norm_eps", "initializer_range",
    "mtp_num_hidden_layers", "dtype",
)  # fmt: skip
_COPIED_DENSE = ("intermediate_size",)
_COPIED_MOE = (
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size", "router_aux_loss_coef",
)  # fmt: skip
# What the model does and has no choice in, stated as the published files state it.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_output_gate": True,
    "mamba_ssm_dtype": "float32",
    "mtp_use_dedicated_embeddings": False,
    "mlp_only_layers": [],
    "use_cache": True,
}


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """A config.json in the published form: `ModelConfig.from_hf` makes `config` of it again (but for the dtype and FP8 forms
    of its parameters, which are choices of whoever loads), and transformers reads it."""
    family = "qwen3_5_moe" if config.num_experts else "qwen3_5"
    copied = _COPIED + (_COPIED_MOE if config.num_experts else _COPIED_DENSE)
    interval = config.full_attention_interval
    text = {"model_type": f"{family}_text", **_FIXED, **{name: getattr(config, name) for name in copied}}
    text["layer_types"] = (["linear_attention"] * (interval - 1) + ["full_attention"]) * config.num_units
    text["rope_parameters"] = _rope_parameters(config)
    result = {
        "architectures": _architectures(config),
        "model_type": family,
        "text_config": text,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    if config.vision is not None:
        fixed = {"model_type": family, "hidden_act": "gelu_pytorch_tanh", "deepstack_visual_indexes": []}
        result["vision_config"] = fixed | dataclasses.asdict(config.vision)
    tokens = {name: getattr(config, name) for name in ("image_token_id", "video_token_id")}
    result |= {name: token for name, token in tokens.items() if token is not None}
    return result


def vision_hf_config(hf_config: Mapping[str, Any] | None, config: ModelConfig) -> dict[str, Any] | None:
    """A config.json of a model without a vision tower, with the tower of `config` in it; None where it is not of that form."""
    if hf_config is None or "text_config" not in hf_config:
        return None
    made = to_hf_config(config)
    return {**hf_config, **{name: made[name] for name in ("architectures", "vision_config", "image_token_id", "video_token_id")}}


def _rope_parameters(config: ModelConfig) -> dict[str, Any]:
    rope = dataclasses.asdict(config.rope)
    result = {
        "rope_type": rope.pop("rope_type"),
        "rope_theta": rope.pop("theta"),
        "partial_rotary_factor": rope.pop("partial_rotary_factor"),
        "mrope_section": list(rope.pop("mrope_section")),
        "mrope_interleaved": True,
    }
    yarn = {name: value for name, value in rope.items() if value is not None}
    return result | yarn if config.rope.rope_type == "yarn" else result
