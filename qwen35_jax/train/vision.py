"""Runs with pictures: the tower that a model gets, and what its configuration must be."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from qwen35_jax.checkpoint import CanonicalSource, TensorSource, source_has_vision, vision_hf_config
from qwen35_jax.config import ModelConfig, VisionConfig
from qwen35_jax.errors import UserError
from qwen35_jax.model import Model, VisionModel
from qwen35_jax.sharding import Sharding
from qwen35_jax.text import Tokenizer
from qwen35_jax.vision_io import PADS, VisionSettings


def added_tower(
    model: ModelConfig, hf_config: Mapping[str, Any] | None, source: TensorSource | None, fields: ConfigDict, directory: Any
) -> tuple[ModelConfig, dict[str, Any] | None]:
    """The model, and its config.json, with a new tower of `config.model.vision`. UserError where it has one that is stored."""
    if source is not None and source_has_vision(CanonicalSource(source, model)):
        raise UserError("config.model.vision is for models without a tower, but the checkpoint has one: leave it empty")
    known = [f.name for f in dataclasses.fields(VisionConfig)]
    if wrong := sorted(set(known) ^ set(fields)):
        raise UserError(f"config.model.vision.{wrong[0]}: give exactly the fields {', '.join(known)}")
    vision = VisionConfig(**fields)
    _check(vision)
    if vision.out_hidden_size != model.hidden_size:
        text = f"config.model.vision.out_hidden_size is {vision.out_hidden_size}"
        raise UserError(f"{text}; it must be the model's width, {model.hidden_size}")
    tokenizer = Tokenizer.from_directory(directory)
    ids = {}
    for kind, pad in PADS.items():
        found = tokenizer.encode(pad) if tokenizer else []
        if len(found) != 1:
            raise UserError(f"the tokenizer of {directory} has no {pad}, which stands for {kind}s: name another")
        ids[f"{kind}_token_id"] = found[0]
    model = model.replace(vision=vision, **ids)
    return model, vision_hf_config(hf_config, model)


def _check(vision: VisionConfig) -> None:
    """UserError for a tower that cannot be."""
    for name, value in dataclasses.asdict(vision).items():
        if type(value) is not int or value < 1:
            raise UserError(f"config.model.vision.{name} is {value!r}; it must be a whole number from 1 on")
    places = vision.num_position_embeddings
    wrong = {
        "in_channels": (vision.in_channels != 3, "3, of red, green and blue"),
        "hidden_size": (vision.hidden_size % (4 * vision.num_heads), f"a multiple of 4 x num_heads ({vision.num_heads})"),
        "num_position_embeddings": (math.isqrt(places) ** 2 != places, "a square"),
    }
    for name, (problem, wanted) in wrong.items():
        if problem:
            raise UserError(f"config.model.vision.{name} is {getattr(vision, name)}; it must be {wanted}")


def settings(data: ConfigDict, directory: epath.PathLike, vision: VisionConfig) -> VisionSettings:
    """How large pictures are looked at: as the files beside the tokenizer say, and as `config.data` does."""
    options = {name: data[name] or None for name in ("max_pixels", "fps", "max_frames")}
    return VisionSettings.from_directory(directory, vision).changed(**options)


def make_tower(config: ConfigDict, model: Model) -> VisionModel | None:
    """The vision tower of a run with pictures (`config.data.patches`), None of one of text.

    UserError for a model without one, and for rows of patches that the tower or the mesh cannot take.
    """
    d, c = config.data, model.config
    if not d.patches:
        return None
    if c.vision is None or c.image_token_id is None or c.video_token_id is None:
        raise UserError("config.data.patches: the model has no vision tower for pictures; describe one in config.model.vision")
    # Pictures are not cut as sequences are: their rows lie over the data axes in any case.
    tower = VisionModel(c, Sharding(model.sharding.mesh), model.forms)
    squared = c.vision.spatial_merge_size**2
    if d.patches % squared:
        raise UserError(f"config.data.patches is {d.patches}; it must be a multiple of {squared}, the patches of one token")
    shards = tower.sharding.size(tower.layout.rows)
    if d.patch_rows % (shards * config.accumulate):
        text = f"config.data.patch_rows ({d.patch_rows}) must be a multiple of {shards * config.accumulate}"
        raise UserError(f"{text}: {shards} shards of rows of patches x accumulate {config.accumulate}")
    return tower
