"""Command line: what a model needs and at best reaches on chips that are not there. `python -m qwen35_jax.plan --help`."""

from __future__ import annotations

from qwen35_jax import command

if __name__ == "__main__":
    command.quiet_interrupts()

import json

from absl import flags

from qwen35_jax.config import PRESETS
from qwen35_jax.errors import UserError
from qwen35_jax.ops.forms import KERNEL_CHOICES
from qwen35_jax.ops.moe import MOE_CHOICES
from qwen35_jax.planner import report, table
from qwen35_jax.planner.crashes import go_on_in_a_fork
from qwen35_jax.planner.jobs import WEIGHTS, WORKLOADS, Job
from qwen35_jax.planner.planning import make_plan
from qwen35_jax.planner.topologies import CHIPS, parse_topology, prepare_process

USAGE = """
Compiles what sample or train would run for TPUs or GPUs that are not there, and says what a device holds and how fast it can be.

  python -m qwen35_jax.plan --model 397b-a17b --topology v5p:4x4x4 --workload decode --weights fp8 --batch 64 --context 32768
  python -m qwen35_jax.plan --model 35b-a3b --topology h100:8 --workload train --batch 8 --context 4096
  python -m qwen35_jax.plan --model 35b-a3b --topology v5p:4x4x4 --workload sample --context 1048576 --yarn 4 \\
      --context_parallel --prefill_chunk 65536
  python -m qwen35_jax.plan --all --weights fp8 --batch 8 --context 8192

It needs pip install -e '.[aot]'; with --compile 0 it estimates without a compiler, and needs nothing.
"""

MODEL = flags.DEFINE_enum("model", None, PRESETS, "which size")
TOPOLOGY = flags.DEFINE_string("topology", None, f"KIND:SHAPE of {', '.join(CHIPS)}: v5p:4x4x4, v6e:8x8, h100:8, h100:2x8")
MESH = flags.DEFINE_string("mesh", None, "DATAxMODEL or REPLICAxDATAxMODEL of all devices; default: the best by estimate")
WORKLOAD = flags.DEFINE_enum("workload", "decode", WORKLOADS, "decode, prefill, sample (both) or a training step")
WEIGHT_FORM = flags.DEFINE_enum("weights", "bf16", WEIGHTS, "fp8: weights kept in FP8; in training, products in FP8")
BATCH = flags.DEFINE_integer(
    "batch", None, "sequences; default: 1, in training one a device if --context_parallel does not cut them"
)
CONTEXT = flags.DEFINE_integer("context", 4096, "tokens of a sequence: prompt and answer, or a training sequence")
IMAGE_TOKENS = flags.DEFINE_integer("image_tokens", 0, "of each prompt: tokens of images, for which the vision tower runs too")
PREFILL_CHUNK = flags.DEFINE_integer("prefill_chunk", 2048, "prompt tokens read at once")
KERNELS = flags.DEFINE_enum("kernels", "auto", KERNEL_CHOICES, "forms of the ops, as of sample and train")
MOE = flags.DEFINE_enum("moe", "auto", MOE_CHOICES, "how tokens and experts meet, as of sample and train")
FULLY_SHARDED = flags.DEFINE_bool("fully_sharded", False, "of inference: cut the weights over the data axes too")
CONTEXT_PARALLEL = flags.DEFINE_bool("context_parallel", False, "cut each sequence over `data`, for long ones")
YARN = flags.DEFINE_float("yarn", None, "so many times the model's positions, as of sample", lower_bound=1)
COMPILE = flags.DEFINE_integer("compile", 1, "how many of the best meshes are compiled; 0: estimates alone", lower_bound=0)
ALL = flags.DEFINE_bool("all", False, "a table of all sizes on the topologies that people rent")
JSON = flags.DEFINE_bool("json", False, "print the plan as one JSON object")


def main(arguments: list[str]) -> None:
    """Flags to one call, and the printing of what comes."""
    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}; see --help")
    _refuse_unused_chunk()
    if ALL.value:
        _refuse_with_all()
        for line in table.lines(_job, COMPILE.value):
            print(line, flush=True)
        return
    if MODEL.value is None or TOPOLOGY.value is None:
        raise UserError("--model and --topology are needed (or --all); see --help")
    if MESH.value is not None and COMPILE.value > 1:
        raise UserError(f"--compile {COMPILE.value} is of the best meshes, and --mesh names one: leave one of them out")
    topology = parse_topology(TOPOLOGY.value)
    if COMPILE.value:
        go_on_in_a_fork(f"the plan of {MODEL.value} on {topology}")
    prepare_process(topology.platform)
    plan = make_plan(_job(MODEL.value, topology.size), topology, MESH.value, COMPILE.value)
    print(json.dumps(plan.as_json()) if JSON.value else "\n".join(report.lines(plan)))


def _refuse_unused_chunk() -> None:
    """UserError for --prefill_chunk where there is no prefill. A decode step's cache of cut sequences is laid out by it."""
    if not flags.FLAGS["prefill_chunk"].present:
        return
    if WORKLOAD.value == "train":
        raise UserError("--prefill_chunk is of prompts: leave it out with --workload train")
    if WORKLOAD.value == "decode" and not CONTEXT_PARALLEL.value:
        raise UserError(
            "--prefill_chunk is of prompts: with --workload decode it matters for --context_parallel alone; leave it out"
        )


def _refuse_with_all() -> None:
    for flag in (MODEL, TOPOLOGY, MESH):
        if flag.value is not None:
            raise UserError(f"--all is of all sizes and topologies: leave --{flag.name} out")
    if JSON.value:
        raise UserError("--all prints a table: leave --json out")
    if MOE.value != "auto":
        raise UserError("--all has models without experts too: leave --moe out")


def _job(model: str, devices: int) -> Job:
    one_each = WORKLOAD.value == "train" and not CONTEXT_PARALLEL.value
    batch = BATCH.value if BATCH.value is not None else devices if one_each else 1
    sizes = {"batch": batch, "context": CONTEXT.value, "chunk": PREFILL_CHUNK.value, "image_tokens": IMAGE_TOKENS.value}
    forms = {"kernels": KERNELS.value, "moe": MOE.value, "fully_sharded": FULLY_SHARDED.value}
    forms |= {"context_parallel": CONTEXT_PARALLEL.value, "yarn": YARN.value}
    return Job(model, WORKLOAD.value, WEIGHT_FORM.value, **sizes, **forms)


if __name__ == "__main__":
    command.run(main, USAGE)
