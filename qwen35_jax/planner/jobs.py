"""What is planned: a model, a workload and its sizes; and the programs that `sample` or `train` would run for it."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
from jax.sharding import Mesh

from qwen35_jax.config import PRESETS, ModelConfig
from qwen35_jax.errors import UserError
from qwen35_jax.generate.generation import MIN_SHARD_TOKENS, capacity_bucket, prompt_layout, slot_bucket
from qwen35_jax.generate.steps import abstract_session, make_decode, make_prefill
from qwen35_jax.generate.vision import make_vision, row_length
from qwen35_jax.model import Model, VisionModel
from qwen35_jax.ops.forms import resolve_forms
from qwen35_jax.program import Program
from qwen35_jax.sharding import Sharding, check_mesh, make_mesh
from qwen35_jax.train.config import default_config
from qwen35_jax.train.run import Run, find_origin, make_run
from qwen35_jax.train.weights import kept_params

WORKLOADS = ("decode", "prefill", "train", "sample")
WEIGHTS = ("bf16", "fp8")
IMAGE = 16384  # tokens of the largest image that the published processor makes
FLAGS = {"chunk": "prefill_chunk"}  # of fields that have another name there
LAYOUT = ("kernels", "moe", "fully_sharded", "context_parallel", "yarn")  # fields of a Job that are not its sizes
LARGEST = 2**24  # of batch and context: nobody has more, and what follows from them still fits


@dataclasses.dataclass(frozen=True)
class Job:
    """`batch` sequences of at most `context` tokens.

    decode: a token of each, with `context` tokens in the cache. prefill: prompts of `context` tokens, `chunk` at once.
    sample: both. train: a step of the default configuration (AdamW, float32 masters, bfloat16 computation, remat full).
    weights: fp8 keeps the weights of inference in FP8; training multiplies in FP8, and its masters stay float32. image_tokens:
    so many tokens of each prompt are images, as large as the published processor makes them. moe and context_parallel are those
    of `sample` and `train`, fully_sharded and yarn (times the model's positions) those of `sample`.
    """

    model: str
    workload: str
    weights: str = "bf16"
    batch: int = 1
    context: int = 4096
    chunk: int = 2048
    kernels: str = "auto"
    image_tokens: int = 0
    moe: str = "auto"
    fully_sharded: bool = False
    context_parallel: bool = False
    yarn: float | None = None

    def __post_init__(self):
        for name, choices in (("model", PRESETS), ("workload", WORKLOADS), ("weights", WEIGHTS)):
            if getattr(self, name) not in choices:
                raise UserError(f"--{name} {getattr(self, name)!r}: choose from {', '.join(choices)}")
        for name in ("batch", "context", "chunk"):
            if not 1 <= getattr(self, name) <= LARGEST:
                raise UserError(f"--{FLAGS.get(name, name)} is {getattr(self, name)}; it must be 1 to {LARGEST}")
        if self.image_tokens and not self.prefills:
            raise UserError("--image_tokens are part of a prompt: they need --workload prefill or sample")
        if not 0 <= self.image_tokens <= self.context:
            raise UserError(f"--image_tokens {self.image_tokens}: a prompt has {self.context} tokens (--context)")
        if self.training and self.fully_sharded:
            raise UserError("--fully_sharded is of inference: training cuts all that it keeps anyway; leave it out")
        if self.training and self.yarn:
            raise UserError("--yarn is of inference: leave it out")

    def check_context(self) -> None:
        """UserError where the model was not made for so many tokens."""
        longest = self.config.context_length
        if self.context > longest:
            more = "" if self.training else "; --yarn gives it more"
            raise UserError(f"--context {self.context}: {self.model} takes at most {longest} tokens{more}")

    @property
    def config(self) -> ModelConfig:
        fp8 = self.weights == "fp8" and not self.training
        config = ModelConfig.preset(self.model).replace(fp8_weights=fp8)
        return config.with_yarn(self.yarn) if self.yarn else config

    def flags(self, *names: str) -> list[str]:
        """Those of these fields that are not at their defaults, as the command takes them."""
        changed = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        return [f"--{FLAGS.get(n, n)}" + ("" if changed[n] is True else f"={changed[n]}") for n in names if n in changed]

    @property
    def training(self) -> bool:
        return self.workload == "train"

    @property
    def prefills(self) -> bool:
        return self.workload in ("prefill", "sample")

    def replace(self, **changes) -> Job:
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class Step:
    """One program of a job, and the arrays on the devices while it runs. `beside`: those of them that are no arguments."""

    name: str
    program: Program
    weights: Any
    state: Any
    beside: Any = ()


@dataclasses.dataclass(frozen=True)
class Placed:
    """A job on a mesh (stand-ins will do): the model and its abstract arrays."""

    job: Job
    model: Model

    @classmethod
    def on(cls, job: Job, mesh: Mesh) -> Placed:
        """UserError where the model cannot be cut, or the batch not be spread, as the mesh asks."""
        config, sharding = job.config, Sharding(mesh, job.context_parallel)
        check_mesh(config, sharding)
        shape = "x".join(str(n) for n in mesh.devices.shape[int(mesh.devices.shape[0] == 1) :])
        if job.training and job.batch % sharding.batch:
            raise UserError(f"--batch {job.batch} is no multiple of the {sharding.batch} shards of the batch on mesh {shape}")
        parts = sharding.size("T")
        if job.training and parts > 1 and (job.context % parts or job.context // parts < MIN_SHARD_TOKENS):
            wanted = f"a multiple of the {parts} parts of a sequence on mesh {shape}, of at least {MIN_SHARD_TOKENS} tokens"
            raise UserError(f"--context is {job.context}; it must be {wanted}")
        if job.fully_sharded and mesh.size == sharding.model:
            reason = f"--fully_sharded cuts weights over the data axes, but mesh {shape} has none"
            raise UserError(f"{reason}: use one such as 8x1, or leave it out")
        forms = resolve_forms(mesh, config, job.kernels, job.moe, context_parallel=job.context_parallel)
        return cls(job, Model(config, sharding, forms, job.fully_sharded))

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def sharding(self) -> Sharding:
        return self.model.sharding

    @property
    def slots(self) -> int:
        """Rows of all devices: of inference a power of two on each data shard, as `sample` makes them, some perhaps dead."""
        return self.job.batch if self.job.training else slot_bucket(self.job.batch, self.sharding.batch)

    @property
    def rows(self) -> int:
        """Of one device."""
        return self.slots // self.sharding.batch

    @functools.cached_property
    def layout(self) -> tuple[list[int], int]:
        """(lengths of the prefill calls, tokens that the cache of a sequence holds), as `sample` has them."""
        context = self.job.context
        if not self.job.prefills and not self.sharding.context_parallel:
            return [], capacity_bucket(context)
        return prompt_layout(self.sharding, context, context, self.job.chunk)

    @property
    def capacity(self) -> int:
        return self.layout[1]

    @functools.cached_property
    def params(self) -> dict:
        """The abstract parameters as products take them: where they are fully sharded, as gathered for a unit."""
        return _abstract_params(dataclasses.replace(self.model, fully_sharded=False), True)

    @functools.cached_property
    def tower(self) -> VisionModel | None:
        """That reads the images of the prompts, if they have some."""
        return VisionModel(self.config, Sharding(self.sharding.mesh), self.model.forms) if self.job.image_tokens else None

    @functools.cached_property
    def images(self) -> tuple[int, int, int]:
        """Of a call of the tower: rows, patches of a row; and how many calls there are."""
        parts, merged = -(-self.job.image_tokens // IMAGE), self.config.vision.spatial_merge_size**2
        size, count = -(-self.job.image_tokens // parts) * merged, parts * self.job.batch
        shards = self.tower.sharding.size(self.tower.layout.rows)
        length = row_length(size, size * count, shards)
        return shards, length, -(-count // (length // size * shards))

    @functools.cached_property
    def weights(self) -> dict:
        """What lies on the devices between the steps: of training the float32 masters."""
        if self.job.training:
            return kept_params(self.model)
        params = _abstract_params(self.model, self.model.stacked)
        return params if self.tower is None else params | {"vision": self.tower.abstract_params()}

    @functools.cached_property
    def state(self) -> Any:
        """The decoding state; of training AdamW's two moments of each parameter."""
        if self.job.training:
            return self.weights, self.weights
        return abstract_session(self.model, self.slots, self.capacity, stacked=self.model.stacked)["state"]


@functools.lru_cache(64)
def _abstract_params(model: Model, stacked: bool) -> dict:
    """The same for every batch and context that a search tries, and most of the time that one takes."""
    return model.abstract_params(stacked)


def make_steps(job: Job, mesh: str, devices: list) -> list[Step]:
    """The programs, on the mesh of this text over `devices`. UserError for a mesh or a batch that cannot be."""
    placed, vocabulary = Placed.on(job, make_mesh(mesh, devices)), job.config.vocab_size
    if job.training:
        run = training_run(job, mesh, devices)
        moments = {name: x for name, x in run.state.items() if name not in ("params", "frozen")}
        return [Step("train", run.train_step(), (run.state["params"], run.state["frozen"]), moments)]
    model, rows, (chunks, capacity), programs, tower = placed.model, placed.slots, placed.layout, {}, placed.tower
    if tower is not None:
        programs["vision"] = make_vision(tower, *placed.images[:2])
    if job.prefills:
        programs["prefill"] = make_prefill(
            model, rows, rows, max(chunks), capacity, stacked=model.stacked, vision=tower is not None
        )
    if job.workload != "prefill":
        chunk = chunks[0] if job.context_parallel else 0
        programs["decode"] = make_decode(model, rows, capacity, vocabulary, stacked=model.stacked, chunk=chunk)
    idle = () if tower is None else placed.weights["vision"]  # while the text model runs
    beside = {name: (model.abstract_params(model.stacked), placed.state) if name == "vision" else idle for name in programs}
    return [Step(name, x, placed.weights, placed.state, beside[name]) for name, x in programs.items()]


def training_run(job: Job, mesh: str, devices: list) -> Run:
    """What `train` makes of the default configuration with this model, batch and sequence length."""
    c = default_config()
    c.model.source, c.model.random_weights, c.mesh, c.kernels = job.model, True, mesh, job.kernels
    c.moe, c.context_parallel = job.moe, job.context_parallel
    c.data.sequence_length, c.data.batch_size, c.fp8.enabled = job.context, job.batch, job.weights == "fp8"
    return make_run(c, find_origin(c), devices)


def shard_bytes(tree: Any) -> int:
    """Bytes of a tree of abstract arrays on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
