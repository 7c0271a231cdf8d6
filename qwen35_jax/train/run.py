"""From a run configuration to everything that a training run is made of."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from qwen35_jax.checkpoint import (
    CanonicalSource,
    TensorSource,
    load_params,
    load_vision_params,
    open_source,
    source_has_mtp,
    source_has_vision,
)
from qwen35_jax.config import ASSETS, PRESETS, ModelConfig
from qwen35_jax.errors import UserError
from qwen35_jax.model import Model, VisionModel
from qwen35_jax.ops.forms import resolve_forms
from qwen35_jax.sharding import Sharding, check_mesh, make_mesh
from qwen35_jax.text import ChatTemplate, Tokenizer
from qwen35_jax.train.config import check_cuts
from qwen35_jax.train.data import PatchShape, PictureReader
from qwen35_jax.train.fp8 import fp8_layers
from qwen35_jax.train.lora import abstract_lora, init_lora, lora_axes
from qwen35_jax.train.optimizer import learning_rate, make_optimizer, state_shardings
from qwen35_jax.train.partition import flatten, join, logical_axes, split, unflatten
from qwen35_jax.train.step import Loss, abstract_batch, make_eval_step, make_monitor_step, make_train_step
from qwen35_jax.train.vision import added_tower, make_tower, settings
from qwen35_jax.train.weights import LoraWeights, Weights, kept_params, wanted_params


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a run's model comes from: its configuration, the checkpoint (None: random weights) and the text files."""

    config: ModelConfig
    source: TensorSource | None
    hf_config: dict[str, Any] | None  # config.json of the checkpoint, None where the run's model is another one
    tokenizer_dir: Any


def find_origin(config: ConfigDict) -> Origin:
    """Opens what `config.model` names, and reads headers only. UserError for whatever is not there or does not go together."""
    c = config.model
    if c.source in PRESETS:
        if c.revision:
            raise UserError(f"config.model.revision belongs to a hub id, but {c.source} is a preset")
        model, source, directory = ModelConfig.preset(c.source), None, ASSETS / "tiny"
        if c.source == "tiny" and not c.random_weights:
            source = open_source(str(directory))
        elif not c.random_weights:
            raise UserError(f"preset {c.source} has random weights only: set config.model.random_weights, or name a directory")
    else:
        source = open_source(c.source, c.revision or None)
        model, directory = ModelConfig.from_hf(source.config), source.directory
    if source is not None and not source_has_mtp(CanonicalSource(source, model)):
        model = model.replace(mtp_num_hidden_layers=0)
    hf_config = source.config if source else None
    if c.random_weights:
        source = None
    if c.changes:
        model, hf_config = _changed(model, c.changes), None
    directory = c.tokenizer or directory
    if c.vision:
        model, hf_config = added_tower(model, hf_config, source, c.vision, directory)
    return Origin(model.replace(dtype=config.dtype), source, hf_config, directory)


def _changed(model: ModelConfig, changes: ConfigDict) -> ModelConfig:
    known = [f.name for f in dataclasses.fields(ModelConfig) if f.name not in ("rope", "vision", "dtype")]
    unknown = [name for name in changes if name not in known]
    if unknown:
        raise UserError(f"config.model.changes.{unknown[0]} is no field of the model; fields are {', '.join(known)}")
    return model.replace(**changes)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's static parts. `state` is abstract: shapes, dtypes and shardings of the train state."""

    config: ConfigDict
    origin: Origin
    loss: Loss
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    state: dict

    @property
    def model(self) -> Model:
        return self.loss.model

    @property
    def tower(self) -> VisionModel | None:
        """The vision tower of a run with pictures."""
        return self.loss.tower

    @property
    def draws_tower(self) -> bool:
        """Whether the tower starts from random numbers: the checkpoint, if there is one, holds none."""
        source = self.origin.source
        return self.tower is not None and not (source and source_has_vision(CanonicalSource(source, self.origin.config)))

    def batch(self, parts: int = 1) -> dict:
        """The abstract arrays of a batch that is run in so many parts."""
        d = self.config.data
        patches = {"tower": self.tower, "patches": (d.patch_rows, d.patches)}
        return abstract_batch(self.model, d.batch_size, d.sequence_length, parts, **patches)

    def train_step(self):
        """The `Program` of one optimizer step."""
        parts = self.config.accumulate
        return make_train_step(self.loss, self.optimizer, self.schedule, self.state, self.batch(parts), parts)

    def eval_step(self):
        """The `Program` of the evaluation of one batch, in as many parts as a training step: more at once may not fit."""
        parts = self.config.accumulate
        return make_eval_step(self.loss, self.state["params"], self.state["frozen"], self.batch(parts), parts)

    def monitor_step(self):
        """The `Program` of the FP8 monitor on one batch."""
        parts = self.config.accumulate
        return make_monitor_step(self.loss, self.state["params"], self.state["frozen"], self.batch(parts), parts)

    def pictures(self, parts: int = 1) -> PictureReader | None:
        """What reads the pictures of batches that are run in so many parts; None in a run of text."""
        if self.tower is None:
            return None
        d, v = self.config.data, self.model.config.vision
        width = v.in_channels * v.temporal_patch_size * v.patch_size**2
        shape = PatchShape(d.patch_rows, d.patches, width, v.spatial_merge_size, parts)
        return PictureReader(self.model.config, settings(d, self.origin.tokenizer_dir, v), shape)

    def tokenizer(self) -> Tokenizer:
        """UserError where the directory has none, or one with more ids than the model."""
        tokenizer = Tokenizer.from_directory(self.origin.tokenizer_dir)
        if tokenizer is None:
            raise UserError(f"{self.origin.tokenizer_dir} has no tokenizer.json: name a directory in config.model.tokenizer")
        if tokenizer.vocab_size > self.model.config.vocab_size:
            ids = f"{tokenizer.vocab_size} ids, but the model has {self.model.config.vocab_size}"
            raise UserError(f"the tokenizer of {self.origin.tokenizer_dir} has {ids}")
        return tokenizer

    def template(self) -> ChatTemplate:
        """The chat template beside the tokenizer, or our own."""
        thinking = bool(self.model.config.num_experts) or self.model.config.hidden_size > 2048
        return ChatTemplate.from_directory(self.origin.tokenizer_dir, thinking_by_default=thinking)

    def merged(self, state: dict) -> dict:
        """All parameters of the model, stacked, for export: LoRA's updates are in them."""
        if not self.config.lora.rank:
            return join(state["params"], state["frozen"])
        weights = self.loss.weights
        return jax.jit(weights.merged, out_shardings=_shardings(kept_params(self.model, self.tower)))(
            state["params"], state["frozen"]
        )


def frozen_paths(config: ConfigDict, model: ModelConfig) -> tuple[str, ...]:
    """What is not trained: `config.freeze`, and the MTP layer where no loss reaches it, which weight decay would only shrink."""
    unreached = model.mtp_num_hidden_layers and not config.loss.mtp
    return (*config.freeze, *(("^mtp/",) if unreached else ()))


def make_run(config: ConfigDict, origin: Origin, devices: list | None = None) -> Run:
    """Everything but arrays. `devices`: other ones than this machine's, for compiling without them."""
    sharding = Sharding(make_mesh(config.mesh, devices), config.context_parallel)
    check_mesh(origin.config, sharding)
    check_cuts(config, sharding)
    context = {"context_parallel": config.context_parallel}
    model = Model(origin.config, sharding, resolve_forms(sharding.mesh, origin.config, config.kernels, config.moe, **context))
    tower = make_tower(config, model)
    axes, kept = logical_axes(model, tower), kept_params(model, tower)
    if config.lora.rank:
        weights = LoraWeights(model, config=config.lora, axes=axes, tower=tower)
        axes, trained, frozen = lora_axes(axes, config.lora), abstract_lora(kept, axes, config.lora), kept
    else:
        fp8 = fp8_layers(model, tuple(config.fp8.hold)) if config.fp8.enabled else None
        weights = Weights(model, fp8, tower=tower)
        trained, frozen = split(kept, frozen_paths(config, origin.config))
        axes, _ = split(axes, frozen_paths(config, origin.config))
    optimizer = make_optimizer(config.optimizer, config.steps, axes, trained)
    balance = config.loss.balance if config.loss.balance >= 0 else origin.config.router_aux_loss_coef
    # XLA:CPU copies every slice that a scan takes of stacked weights.
    stacked = sharding.mesh.devices.flat[0].platform != "cpu"
    loss = Loss(weights, config.remat, config.loss.mtp, config.loss.z, balance, stacked)
    best = config.checkpoint.best_metric
    if config.checkpoint.keep_best and "mtp" in best and not loss.has_mtp:
        raise UserError(f"config.checkpoint.best_metric is {best}, but this run has no such loss: see config.loss.mtp")
    state = _abstract_state(sharding, optimizer, trained, _in_dtype(frozen, wanted_params(model, tower)))
    run = Run(config, origin, loss, optimizer, learning_rate(config.optimizer, config.steps), state)
    if run.draws_tower and config.lora.rank:
        text = "config.lora trains nothing but its own matrices, and the vision tower starts from random weights here"
        raise UserError(f"{text}: train the tower first, with config.lora.rank 0")
    return run


def _in_dtype(frozen: dict, wanted: dict) -> dict:
    """What is not trained needs no more digits than the model computes with."""
    wanted = flatten(wanted)

    def leaf(path: str, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, wanted[path].dtype, sharding=x.sharding)

    return unflatten({path: leaf(path, x) for path, x in flatten(frozen).items()})


def _abstract_state(sharding: Sharding, optimizer, trained: dict, frozen: dict) -> dict:
    counter = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(sharding.mesh, PartitionSpec()))
    shapes, places = jax.eval_shape(optimizer.init, trained), state_shardings(optimizer, trained)
    opt = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)
    counters = dict.fromkeys(("step", "skipped", "skipped_in_a_row"), counter)
    return {"params": trained, "frozen": frozen, "opt": opt} | counters


def initial_state(run: Run) -> dict:
    """The train state before the first step: weights read from the origin or drawn, on the devices that hold them."""
    lora, wanted = run.config.lora.rank, run.state["frozen"]
    wanted = wanted if lora else join(run.state["params"], wanted)
    params = _stored(run, wanted)
    params |= _drawn(run, {name: tree for name, tree in wanted.items() if name not in params})
    if lora:
        axes = logical_axes(run.model, run.tower)
        trained, frozen = init_lora(run.config.seed, kept_params(run.model, run.tower), axes, run.config.lora), params
    else:
        trained, frozen = split(params, frozen_paths(run.config, run.model.config))
    opt = jax.jit(run.optimizer.init, out_shardings=_shardings(run.state["opt"]))(trained)
    counters = {n: jax.device_put(jnp.int32(0), run.state[n].sharding) for n in ("step", "skipped", "skipped_in_a_row")}
    return {"params": trained, "frozen": frozen, "opt": opt} | counters


def _stored(run: Run, wanted: dict) -> dict:
    """What the origin's checkpoint holds of the parameters: nothing, those of text, or all. Frozen ones are never there in
    float32: they are read in the dtype that `wanted` has for them."""
    source, config, progress = run.origin.source, run.origin.config, jax.process_index() == 0
    if source is None:
        return {}
    params = load_params(source, config, {n: tree for n, tree in wanted.items() if n != "vision"}, progress=progress)
    if run.tower and not run.draws_tower:
        params["vision"] = load_vision_params(source, config, wanted["vision"], progress=progress)
    return params


def _drawn(run: Run, wanted: dict) -> dict:
    """Random parameters in place of those that the checkpoint lacks: of the tower, of all, or none."""
    master, seed = run.model.config.replace(dtype="float32"), run.config.seed
    params = {}
    if "units" in wanted:  # each device gets only what it keeps of them
        params = Model(master, run.model.sharding, run.model.forms, fully_sharded=True).init_params(seed, stacked=True)
    if "vision" in wanted:
        params["vision"] = VisionModel(master, run.tower.sharding, run.tower.forms).init_params(seed, wanted["vision"])
    return jax.tree.map(lambda x, like: x.astype(like.dtype), params, wanted)


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)
