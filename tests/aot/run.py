"""Compiles one step of the model for devices that are not there and prints what the compiler says, as one line of JSON.

    python -m tests.aot.run '{"target": "v5e", "mesh": "2x4", "model": "0.8b", "step": "decode"}'

One compilation a process: the compilers keep state, one that crashes takes its process along, and the TPU compiler
wants its settings in the environment before JAX is imported.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from qwen35_jax.config import ModelConfig
from qwen35_jax.generate.steps import make_decode, make_prefill
from qwen35_jax.generate.vision import make_vision
from qwen35_jax.model import Model, VisionModel
from qwen35_jax.ops.forms import resolve_forms
from qwen35_jax.ops.moe import EXPERT_AXES, Routing, moe_apply
from qwen35_jax.planner import hlo
from qwen35_jax.planner.compiled import count_collectives
from qwen35_jax.planner.topologies import GPU_SETTINGS, SETTINGS
from qwen35_jax.program import Program, abstract_array
from qwen35_jax.sharding import Sharding, make_mesh
from qwen35_jax.train.config import default_config
from qwen35_jax.train.run import find_origin, make_run
from tests.aot.devices import TARGETS, target_devices

PATCHES = 4096  # of a row in training: one picture of 1024 x 1024, or several smaller ones


@dataclasses.dataclass(frozen=True)
class Case:
    """One step of one model on one mesh: decode, prefill, train, vision (the tower, on a row of `length` patches a shard), or
    experts (the routed experts of one layer, on `length` tokens of each data shard, and all their gradients).

    `rows` sequences of at most `capacity` tokens; prefill and training take `length` of each. `layers` cuts the model (0:
    whole). `fp8`: decode and prefill from FP8 weights, training with FP8 products. `pictures`: a prefill that reads rows of the
    vision tower; training of the tower too, on a row of PATCHES for each device. `context_parallel`: sequences are cut over
    `data`, and where they are longer than the model's positions YaRN stretches these. `moe`: the form of the experts.
    `fully_sharded`: weights of decode and prefill are cut over the data axes too.
    """

    target: str
    mesh: str
    model: str
    step: str
    rows: int = 8
    length: int = 512
    capacity: int = 4096
    layers: int = 0
    fp8: bool = False
    pictures: bool = False
    context_parallel: bool = False
    moe: str = "auto"
    fully_sharded: bool = False


def _config(case: Case) -> ModelConfig:
    config = ModelConfig.preset(case.model).replace(fp8_weights=case.fp8)
    if case.capacity > config.max_position_embeddings:
        config = config.with_yarn(case.capacity / config.max_position_embeddings)
    return config.replace(num_hidden_layers=case.layers) if case.layers else config


def _model(case: Case) -> Model:
    config, mesh = _config(case), make_mesh(case.mesh, target_devices(case.target))
    forms = resolve_forms(mesh, config, moe=case.moe, context_parallel=case.context_parallel)
    return Model(config, Sharding(mesh, case.context_parallel), forms, case.fully_sharded)


def make_program(case: Case) -> Program:
    if case.step == "train":
        return _training(case)
    config = _config(case)
    model = _model(case)
    if case.step == "vision":
        tower = VisionModel(config, Sharding(model.sharding.mesh), model.forms)
        return make_vision(tower, model.sharding.size(tower.layout.rows), case.length)
    if case.step == "experts":
        return _experts(case, model)
    if case.step == "decode":
        chunk = case.length if case.context_parallel else 0
        return make_decode(model, case.rows, case.capacity, config.vocab_size, stacked=model.stacked, chunk=chunk)
    options = {"stacked": model.stacked, "vision": case.pictures}
    return make_prefill(model, case.rows, case.rows, case.length, case.capacity, **options)


def _experts(case: Case, model: Model) -> Program:
    c, sharding = model.config, model.sharding
    e, d, f, shape = c.num_experts, c.hidden_size, c.moe_intermediate_size, (sharding.batch, case.length)
    x = abstract_array(sharding, "B T D", (*shape, d), c.dtype)
    ids, weights = (abstract_array(sharding, "B T X", (*shape, c.num_experts_per_tok), t) for t in ("int32", "float32"))
    sizes = {name: tuple({"E": e, "D": d, "F": f}[a] for a in axes.split()) for name, axes in EXPERT_AXES.items()}
    places = {n: NamedSharding(sharding.mesh, sharding.parameter_spec(EXPERT_AXES[n], size)) for n, size in sizes.items()}
    experts = {n: jax.ShapeDtypeStruct(size, jnp.dtype(c.dtype), sharding=places[n]) for n, size in sizes.items()}
    options = {"form": case.moe, "implementation": model.forms.grouped_linear}

    def step(x, ids, weights, experts, gradient):
        y, back = jax.vjp(lambda x, w, e: moe_apply(x, Routing(ids, w), e, sharding, **options), x, weights, experts)
        return y, back(gradient)

    return Program(jax.jit(step), (x, ids, weights, experts, x))


def _training(case: Case) -> Program:
    """A step of a run with the defaults: bfloat16, float32 masters, AdamW, everything but the units' inputs made again."""
    c = default_config()
    c.model.source, c.model.random_weights, c.mesh = case.model, True, case.mesh
    c.context_parallel = case.context_parallel
    if case.layers:
        c.model.changes = ConfigDict({"num_hidden_layers": case.layers})
    c.data.sequence_length, c.data.batch_size, c.fp8.enabled, c.moe = case.length, case.rows, case.fp8, case.moe
    devices = target_devices(case.target)
    if case.pictures:
        c.data.patches, c.data.patch_rows = PATCHES, len(devices)
    return make_run(c, find_origin(c), devices).train_step()


def compile_case(case: Case) -> dict:
    """Seconds, bytes per device and collectives [kind, bytes, bits an element, joined] of the compiled step, the bytes of rows
    that go to their experts and back if routing is even, and the sizes of the model that they follow from."""
    config, scanned, start = _config(case), case.step == "train" or _model(case).stacked, time.perf_counter()
    lowered = make_program(case).lower()
    lowering = time.perf_counter() - start
    compiled = lowered.compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    found = count_collectives(text, _model(case).sharding.mesh)
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "hidden_size": config.hidden_size,
        "experts": config.num_experts,
        "query_width": config.num_attention_heads * config.head_dim,
        "layers": config.full_attention_interval if scanned else config.num_hidden_layers,
        "lower_seconds": round(lowering, 1),
        "compile_seconds": round(time.perf_counter() - start - lowering, 1),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "total_bytes": used + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        "ragged_bytes": sum(c.bytes * c.filled * c.count for c in found if c.kind == "ragged-all-to-all"),
        "collectives": [[c.kind, c.bytes, c.bits, c.joined] for c in hlo.collectives(text)],
    }


def of_this_jax(ceilings: tuple[float, ...]) -> float:
    """Of ceilings the one that was measured with jax 0.10.2, the first, or with the newest, 0.12.0.1, the last."""
    return ceilings[-1 if jax.__version_info__ >= (0, 12) else 0]


def compile_elsewhere(case: Case, timeout: float) -> dict:
    """`compile_case` in a process of its own; AssertionError with the end of its errors if it fails."""
    command = [sys.executable, "-m", "tests.aot.run", json.dumps(dataclasses.asdict(case))]
    root = Path(__file__).parents[2]
    env = os.environ | SETTINGS | (GPU_SETTINGS if TARGETS[case.target].platform == "cuda" else {})
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{case} did not compile:\n{done.stderr[-4000:]}"
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(compile_case(Case(**json.loads(sys.argv[1])))))
