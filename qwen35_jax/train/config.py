"""The run configuration: every field with its default and its meaning. Files in `configs/` start from it and change a few."""

from __future__ import annotations

import math

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from qwen35_jax.errors import UserError
from qwen35_jax.sharding import Sharding

MAX_SEED = 2**32 - 1  # JAX and Grain would cut off the bits above


def default_config() -> ConfigDict:
    """All fields of a training run. Unknown fields are errors, in a file and on the command line (`--config.steps=100`)."""
    c = ConfigDict()
    c.mesh = "1x1"  # DATAxMODEL or REPLICAxDATAxMODEL
    c.context_parallel = False  # cut each sequence over `data`, for long ones; batches are cut over `replica` alone then
    c.steps = 1000  # optimizer steps, also those of the learning rate's schedule where data.epochs ends the run before them
    c.seed = 0  # of random weights and of LoRA
    c.dtype = "bfloat16"  # of the computation; trained parameters are float32
    c.kernels = "auto"  # auto | xla | pallas (TPU and Hopper only): forms of the ops
    c.moe = "auto"  # auto (on TPU what moves fewer bytes, else gather) | gather | all_to_all: how tokens and experts meet
    # What the backward pass computes again: full (all but the units' inputs) | gated_delta (the same, but nothing of the
    # recurrence) | dots (all but products) | none
    c.remat = "full"
    c.accumulate = 1  # parts of a batch that are run one after the other
    c.stop_after_skipped = 10  # end the run after so many steps in a row without a finite loss and gradient

    c.model = ConfigDict()
    c.model.source = "tiny"  # a preset's name, a directory or a hub id
    c.model.revision = ""  # of a hub id
    c.model.random_weights = False  # random numbers in place of the stored ones
    c.model.changes = ConfigDict()  # other values for fields of ModelConfig, given in a file; needs random_weights
    c.model.vision = ConfigDict()  # fields of VisionConfig, given in a file: a new, random tower for a model without one
    c.model.tokenizer = ""  # directory of tokenizer and chat template; default: the source's

    c.data = ConfigDict()
    c.data.train = ()  # files or globs of JSONL: {"text": …} or {"messages": […], "tools": […]}
    c.data.eval = ()  # the same, for evaluation
    c.data.sequence_length = 1024  # tokens of a packed row
    c.data.batch_size = 8  # sequences of one optimizer step, over all devices and hosts
    c.data.loss_on = "assistant"  # assistant | all: which tokens of a chat are trained on
    c.data.enable_thinking = placeholder(bool)  # how chats are rendered; not set: as the chat template has it
    c.data.bad_lines = "stop"  # stop | skip (bad_lines.txt in the run's directory has them)
    c.data.shuffle_seed = 0  # of the order of the documents
    c.data.epochs = 0  # 0: as many as `steps` asks for
    c.data.patches = 0  # patches of a packed row of the vision tower; 0: no pictures in the data, and no tower
    c.data.patch_rows = 8  # such rows of one optimizer step, over all devices
    c.data.max_pixels = 0  # of an image, and of a frame; 0: as the checkpoint's files say, and so for the next two
    c.data.fps = 0.0  # frames of a second of video that are looked at
    c.data.max_frames = 0  # of a video

    c.loss = ConfigDict()
    # Coefficient of the experts' load balancing, of all tokens of a part of a batch; below 0: router_aux_loss_coef of the model
    c.loss.balance = -1.0
    c.loss.mtp = 0.1  # weight of the multi-token-prediction loss, for models that have the layer
    c.loss.z = 0.0  # coefficient of the squared log of the softmax's sum

    c.optimizer = ConfigDict()
    c.optimizer.name = "adamw"  # adamw | muon
    c.optimizer.learning_rate = 3e-4  # at its peak
    c.optimizer.schedule = "cosine"  # cosine | wsd | constant, after the warm-up
    c.optimizer.warmup_steps = 100  # from 0 to the peak
    c.optimizer.decay_fraction = 0.2  # wsd: the last part of the steps
    c.optimizer.final_fraction = 0.1  # of the learning rate, at the end
    c.optimizer.b1 = 0.9  # Adam: decay of the mean of gradients
    c.optimizer.b2 = 0.95  # Adam: decay of the mean of their squares
    c.optimizer.eps = 1e-8  # Adam: added to the root of that
    c.optimizer.weight_decay = 0.1  # of matrices
    c.optimizer.clip_norm = 1.0  # of the gradient; 0: off
    c.optimizer.muon_b1 = 0.95  # Muon: momentum
    c.optimizer.muon_learning_rate = 0.0  # muon: of its matrices; 0: learning_rate

    c.freeze = ()  # regular expressions over parameter paths such as units/layers/0/mixer/q: these are not trained
    c.lora = ConfigDict()
    c.lora.rank = 0  # 0: off, all of the model is trained
    c.lora.alpha = 16.0  # updates are scaled by alpha / rank
    c.lora.match = (r"mixer/(q|k|v|z|q_gate|out)$", r"mlp/")  # the matrices that get an update of low rank

    c.fp8 = ConfigDict()
    c.fp8.enabled = False  # block-scaled FP8 products in the layers that FP8 checkpoints quantise
    # Regular expressions of paths that stay in `dtype`. A path such as units/layers/0/mixer/q names a position in the unit of
    # layers: it is held in every unit, and cannot be in one alone.
    c.fp8.hold = ()
    c.fp8.monitor_every = 0  # steps between records of each layer's quantisation errors, of every unit's; 0: never

    c.eval_every = 0  # steps; 0: only at the end
    c.log_every = 10  # steps; and beside every checkpoint
    c.checkpoint = ConfigDict()
    c.checkpoint.every = 500  # steps; there is one at the end too
    c.checkpoint.keep_last = 2  # the newest ones
    c.checkpoint.keep_best = 0  # and so many with the smallest best_metric, however old
    c.checkpoint.best_metric = "eval/loss"  # eval/loss | eval/mtp_loss | loss | mtp_loss
    c.lock()
    c.model.changes.unlock()
    c.model.vision.unlock()
    return c


def check_config(c: ConfigDict) -> None:
    """UserError for values outside what their fields accept."""
    choices = {
        "remat": ("full", "gated_delta", "dots", "none"),
        "dtype": ("bfloat16", "float32"),
        "data.loss_on": ("assistant", "all"),
        "data.bad_lines": ("stop", "skip"),
        "optimizer.name": ("adamw", "muon"),
        "optimizer.schedule": ("cosine", "wsd", "constant"),
        "checkpoint.best_metric": ("eval/loss", "eval/mtp_loss", "loss", "mtp_loss"),
    }
    for field, accepted in choices.items():
        if _get(c, field) not in accepted:
            raise UserError(f"config.{field} is {_get(c, field)!r}; accepted are {', '.join(accepted)}")
    at_least_one = ("steps", "accumulate", "stop_after_skipped", "log_every", "data.sequence_length", "data.batch_size")
    at_least_one += ("checkpoint.every", "checkpoint.keep_last", "data.patch_rows")
    for field in at_least_one:
        if _get(c, field) < 1:
            raise UserError(f"config.{field} is {_get(c, field)}; it must be at least 1")
    at_least_zero = ("data.epochs", "loss.mtp", "loss.z", "lora.rank", "fp8.monitor_every", "eval_every")
    at_least_zero += ("checkpoint.keep_best", "data.patches", "data.max_pixels", "data.fps", "data.max_frames")
    for field in at_least_zero:
        if not 0 <= _get(c, field) < math.inf:
            raise UserError(f"config.{field} is {_get(c, field)}; it must be a number and not negative")
    if not 0 <= c.seed <= MAX_SEED:
        raise UserError(f"config.seed is {c.seed}; it must be from 0 to {MAX_SEED}")
    if not math.isfinite(c.loss.balance):
        raise UserError(f"config.loss.balance is {c.loss.balance}; it must be a number (below 0: the model's own coefficient)")
    if c.data.batch_size % c.accumulate:
        raise UserError(f"config.data.batch_size ({c.data.batch_size}) must be a multiple of accumulate ({c.accumulate})")
    if c.data.patches and c.data.patch_rows % c.accumulate:
        raise UserError(f"config.data.patch_rows ({c.data.patch_rows}) must be a multiple of accumulate ({c.accumulate})")
    for field in ("max_pixels", "fps", "max_frames"):
        if c.data[field] and not c.data.patches:
            raise UserError(f"config.data.{field} is about pictures: set config.data.patches")
    if c.model.vision and not c.data.patches:
        raise UserError("config.model.vision makes a vision tower, which only pictures train: set config.data.patches")
    if not c.data.train:
        raise UserError("config.data.train names no files: give JSONL files, such as --config.data.train='(\"mine.jsonl\",)'")
    if c.model.changes and not c.model.random_weights:
        raise UserError("config.model.changes makes another model, which has no stored weights: set config.model.random_weights")
    if c.eval_every and not c.data.eval:
        raise UserError("config.eval_every asks for evaluations: name files in config.data.eval")
    if c.checkpoint.keep_best and not c.data.eval and c.checkpoint.best_metric.startswith("eval/"):
        raise UserError("config.checkpoint.keep_best compares evaluations: name files in config.data.eval")
    for field in ("hold", "monitor_every"):
        if c.fp8[field] and not c.fp8.enabled:
            raise UserError(f"config.fp8.{field} is about FP8 layers: set config.fp8.enabled")
    if c.lora.rank and (c.freeze or c.fp8.enabled):
        raise UserError("config.lora trains nothing but its own matrices: it goes with neither freeze nor fp8.enabled")
    if c.lora != default_config().lora and not c.lora.rank:
        raise UserError("config.lora changes nothing without a rank, and all of the model is trained: set config.lora.rank")
    _check_used(c.optimizer, default_config().optimizer)


def _check_used(optimizer: ConfigDict, default: ConfigDict) -> None:
    """UserError for a field that was changed and that nothing reads, since another one says so."""
    idle = {
        "muon_b1": ("name", ("muon",)),
        "muon_learning_rate": ("name", ("muon",)),
        "decay_fraction": ("schedule", ("wsd",)),
        "final_fraction": ("schedule", ("cosine", "wsd")),
    }
    for field, (other, values) in idle.items():
        if optimizer[field] != default[field] and optimizer[other] not in values:
            text = f"config.optimizer.{field} does nothing with config.optimizer.{other} {optimizer[other]!r}"
            raise UserError(f"{text}: leave it out, or set {other} to {' or '.join(values)}")


def check_cuts(c: ConfigDict, sharding: Sharding) -> None:
    """UserError where the mesh does not cut the batch or the sequences."""
    cuts, ways = sharding.size("T"), sharding.batch * c.accumulate
    if c.data.sequence_length % cuts:
        text = f"config.data.sequence_length ({c.data.sequence_length}) must be a multiple of {cuts}"
        raise UserError(f"{text}: config.context_parallel cuts sequences over the data shards")
    if c.data.batch_size % ways:
        text = f"config.data.batch_size ({c.data.batch_size}) must be a multiple of {ways}"
        raise UserError(f"{text}: {sharding.batch} shards of the batch x accumulate {c.accumulate}")


def _get(c: ConfigDict, field: str):
    for name in field.split("."):
        c = c[name]
    return c
