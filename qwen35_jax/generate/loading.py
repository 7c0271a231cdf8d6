"""`load`: from a directory, a hub id or a preset's name to a LanguageModel on a mesh."""

from __future__ import annotations

import dataclasses
import os
import time

import jax
from etils import epath

from qwen35_jax.checkpoint import (
    CanonicalSource,
    TensorSource,
    load_params,
    load_vision_params,
    open_source,
    source_has_mtp,
    source_has_vision,
)
from qwen35_jax.compilation import use_compilation_cache
from qwen35_jax.config import ASSETS, PRESETS, ModelConfig
from qwen35_jax.errors import UserError
from qwen35_jax.generate.language_model import LanguageModel
from qwen35_jax.generate.multimodal import Vision
from qwen35_jax.generate.sampling import LARGEST_SEED
from qwen35_jax.generate.steps import MAX_END_TOKENS
from qwen35_jax.generate.vision import VisionEncoder
from qwen35_jax.model import Model, VisionModel
from qwen35_jax.ops.forms import resolve_forms
from qwen35_jax.sharding import Sharding, check_mesh, make_mesh
from qwen35_jax.text import ChatTemplate, GenerationConfig, Tokenizer, read_generation_config
from qwen35_jax.text.generation_config import LARGEST_ID
from qwen35_jax.vision_io import VisionSettings

TINY = ASSETS / "tiny"


def load(
    path_or_id_or_preset: str | os.PathLike,
    mesh: str = "1x1",
    dtype: str = "bfloat16",
    *,
    revision: str | None = None,
    keep_fp8: bool = False,
    fp8_activations: bool = False,
    kernels: str = "auto",
    moe: str = "auto",
    fully_sharded: bool = False,
    seed: int = 0,
    random_weights: bool = False,
    context_parallel: bool = False,
    yarn: float | None = None,
) -> LanguageModel:
    """Loads a model onto a mesh.

    Args:
        path_or_id_or_preset: a directory (Hugging Face or converted; local or gs://), a hub id such as `Qwen/Qwen3.5-4B`, or a
            preset's name. `tiny` is the packaged model; every other preset means random weights of that shape. A directory
            of a preset's name is `./tiny`.
        mesh: DATAxMODEL or REPLICAxDATAxMODEL.
        dtype: of weights and activations, bfloat16 or float32.
        revision: of a Hugging Face id.
        keep_fp8: keep the weights of an FP8 checkpoint as they are stored; without it they are dequantised while loading.
        fp8_activations: with `keep_fp8`: round the inputs of those weights to FP8 as well (one scale for 128 numbers of a token),
            as servers of FP8 checkpoints do, and multiply in FP8. Without it the weights alone are FP8.
        kernels: auto, xla, or pallas (TPU and Hopper only).
        moe: how tokens and experts meet: gather, all_to_all, or auto, the one that moves fewer bytes (on TPU; else gather).
        fully_sharded: cut the weights over all devices, the data axes too, and gather each unit's when it is computed: for models
            that do not fit otherwise. Slower, the more so in decoding.
        seed: of random weights, 0 to 4294967295.
        random_weights: random numbers in place of the stored ones.
        context_parallel: cut sequences over `data`, and the cache with them, for prompts too long for one device; batches are cut
            over `replica` alone. `prefill_chunk` tokens are then read by all data shards together.
        yarn: so many times the positions that the model was made for, by YaRN, as the model cards have it for long prompts; it
            changes short ones a little too.

    Raises UserError for whatever is wrong with the input.
    """
    begin = time.perf_counter()
    use_compilation_cache()
    name = os.fspath(path_or_id_or_preset)
    if name in PRESETS and not isinstance(path_or_id_or_preset, str):  # pathlib makes `tiny` of `./tiny`
        name = os.path.join(".", name)
    if not name:
        raise UserError("no model is named: give a directory, a hub id or a preset")
    if name in PRESETS and revision is not None:
        raise UserError(f"a revision belongs to a hub id, but {name} is a preset; a directory of that name is ./{name}")
    if not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"seed is {seed}; it must be 0 to {LARGEST_SEED}")
    sharding = Sharding(make_mesh(mesh), context_parallel)
    published = name in PRESETS and name != "tiny"
    random_weights |= published
    if name in PRESETS:
        config, directory = ModelConfig.preset(name), TINY
        source = None if random_weights else open_source(str(TINY))
    else:
        source = open_source(name, revision)
        config, directory = ModelConfig.from_hf(source.config), source.directory
    if fp8_activations and not keep_fp8:
        raise UserError("fp8_activations needs keep_fp8: only products of weights kept in FP8 take activations in FP8")
    config = config if yarn is None else config.with_yarn(yarn)
    config = config.replace(dtype=dtype, fp8_weights=keep_fp8, fp8_activations=fp8_activations)
    check_mesh(config, sharding)
    if fully_sharded and sharding.mesh.size == sharding.model:
        raise UserError(
            f"fully_sharded cuts weights over the data axes, but mesh {mesh} has none: use one such as 8x1, or leave it out"
        )
    if keep_fp8 and not random_weights and not config.quantized_source:
        raise UserError(f"keep_fp8: {name} holds no FP8 weights")
    thinking = bool(config.num_experts) or config.hidden_size > 2048  # 0.8B and 2B answer without thinking by default
    tokenizer = Tokenizer.from_directory(directory)
    text = (
        tokenizer,
        ChatTemplate.from_directory(directory, thinking_by_default=thinking),
        _generation_config(directory, {} if source is None else source.config, tokenizer),
    )
    stored = None if random_weights else source
    forms = resolve_forms(sharding.mesh, config, kernels, moe, context_parallel=context_parallel)
    model, params = _parameters(Model(config, sharding, forms, fully_sharded), stored, seed)
    return LanguageModel(
        model,
        params,
        *text,
        # Of the packaged model they borrow the tokenizer, but not the processor, which is of its own tower.
        vision=_vision(model, stored, None if published else directory, seed),
        random_weights=random_weights,
        load_seconds=time.perf_counter() - begin,
    )


def _vision(model: Model, source: TensorSource | None, directory: epath.PathLike | None, seed: int) -> Vision | None:
    """The tower, whose parameters are read when the first picture comes; None for a model, or a checkpoint, without one."""
    config = model.config
    if config.vision is None or config.image_token_id is None or config.video_token_id is None:
        return None
    source = source and CanonicalSource(source, config)
    if source and not source_has_vision(source):
        return None
    # Rows of patches are cut, whatever sequences of text are cut by.
    tower = VisionModel(config, Sharding(model.sharding.mesh), model.forms)

    def parameters() -> dict:
        if source is None:
            return tower.init_params(seed)
        return load_vision_params(source, config, tower.abstract_params(), progress=jax.process_index() == 0)

    return Vision(VisionEncoder(tower, parameters), lambda: VisionSettings.from_directory(directory, config.vision))


def _generation_config(directory: epath.PathLike, config: dict, tokenizer: Tokenizer | None) -> GenerationConfig:
    """Some published sizes have no generation_config.json: there an answer ends where the model and its chats do."""
    defaults = read_generation_config(directory)
    if not defaults.eos_token_ids:
        found = (config.get("text_config") or config).get("eos_token_id"), tokenizer and tokenizer.eos_token_id
        ids = [i for each in found for i in (each if isinstance(each, list) else [each])]
        ends = dict.fromkeys(i for i in ids if type(i) is int and 0 <= i <= LARGEST_ID)
        defaults = dataclasses.replace(defaults, eos_token_ids=tuple(ends))
    count = len(defaults.eos_token_ids)
    if count > MAX_END_TOKENS:
        path = epath.Path(directory) / "generation_config.json"
        raise UserError(f"{path}: eos_token_id names {count} end tokens; at most {MAX_END_TOKENS} are possible")
    return defaults


def _parameters(model: Model, source: TensorSource | None, seed: int) -> tuple[Model, dict]:
    """The parameters, and the model without what the checkpoint does not have."""
    if source is None:
        return model, model.init_params(seed, model.stacked)
    source = CanonicalSource(source, model.config)
    if not source_has_mtp(source):
        model = dataclasses.replace(model, config=model.config.replace(mtp_num_hidden_layers=0))
    return model, load_params(source, model.config, model.abstract_params(model.stacked), progress=jax.process_index() == 0)
