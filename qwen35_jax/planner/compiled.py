"""What the real compiler says of a step: bytes on a device by what they are, and the collectives."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
from jax.sharding import Mesh

from qwen35_jax.errors import UserError
from qwen35_jax.planner import hlo, links
from qwen35_jax.planner.jobs import Job, Placed, Step, make_steps, shard_bytes
from qwen35_jax.planner.roofline import Roofline, Transfer, make_roofline
from qwen35_jax.planner.topologies import Topology, topology_devices
from qwen35_jax.sharding import make_mesh

# A training step is a large program: optimised as for a run it takes the TPU compiler minutes of two cores, without a quarter of
# that. Its buffers come out a little larger (docs/lab_notes.md).
QUICK = (
    {"optimization_level": "O0", "memory_fitting_level": "O0"}
    if jax.__version_info__ >= (0, 12)
    else {"exec_time_optimization_effort": -1.0}
)
FULL = 0.95  # a device is full at this part of its memory: runtime, buffers of collectives and fragments take the rest


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device while a step runs.

    weights and state: all of the model's, also what this step does not read. arguments: what else it is given. padding: what
    the compiler's layout of the arguments takes beyond their own bytes (tiles of TPUs). results: arrays not written in place.
    """

    weights: int
    state: int
    arguments: int
    padding: int
    temporaries: int
    results: int
    code: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Collectives:
    """`count` collectives of one kind and size, over `group` devices (of permutes 0) along the mesh axes `axes`, in one call of
    the step; in a decode step, of one token. Of ragged ones `filled` is the part of the bytes that even routing moves."""

    kind: str
    bytes: int
    group: int
    axes: tuple[str, ...]
    count: int
    filled: float = 1.0


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled step."""

    name: str
    memory: Memory
    collectives: list[Collectives]
    roofline: Roofline
    lower_seconds: float
    compile_seconds: float


class NoRoomError(UserError):
    """The compiler found no room for a step in a device's memory, as that of TPUs says instead of compiling it."""


def compile_job(job: Job, mesh: str, topology: Topology) -> list[Compiled]:
    """Compiles the job's programs for the topology. UserError for a mesh or a batch that cannot be, and for what the compiler
    refuses; of that NoRoomError for what does not fit."""
    devices = topology_devices(topology)
    placed = Placed.on(job, make_mesh(mesh, devices))
    return [_compile(placed, step, mesh, topology) for step in make_steps(job, mesh, devices)]


def _compile(placed: Placed, step: Step, text: str, topology: Topology) -> Compiled:
    mesh, begin = placed.sharding.mesh, time.perf_counter()
    lowered = step.program.lower()
    lowering = time.perf_counter() - begin
    try:
        compiled = lowered.compile(QUICK if step.name == "train" and topology.platform == "tpu" else None)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        what = f"{placed.job.model}, {step.name} on mesh {text} of {topology}"
        kind = NoRoomError if "RESOURCE_EXHAUSTED" in str(error) else UserError
        raise kind(f"{what}: the compiler refuses it: {' '.join(str(error).split())[:300]}") from error
    compiling = time.perf_counter() - begin - lowering
    found = count_collectives(compiled.as_text(), mesh)
    transfers = [Transfer(c.kind, c.bytes * c.filled, c.axes, c.count) for c in found]
    roofline = make_roofline(placed, step.name, topology, transfers)
    return Compiled(step.name, account(step, compiled), found, roofline, lowering, compiling)


def account(step: Step, compiled: Any) -> Memory:
    """The bytes of a compiled step. Arguments that the program does not use are no arguments to the compiler, but lie there."""
    analysis = compiled.memory_analysis()
    everything = shard_bytes((step.program.arguments, step.beside))
    used = shard_bytes([x for x, where in zip(*_leaves(step, compiled), strict=True) if where is not None])
    weights, state = shard_bytes(step.weights), shard_bytes(step.state)
    return Memory(
        weights,
        state,
        everything - weights - state,
        analysis.argument_size_in_bytes - used,
        analysis.temp_size_in_bytes,
        analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        analysis.generated_code_size_in_bytes,
    )


def _leaves(step: Step, compiled: Any) -> tuple[list, list]:
    """The abstract arguments, and beside each its sharding in the compiled program, None where that does not use it."""
    places, _ = compiled.input_shardings
    return jax.tree.leaves(step.program.arguments), jax.tree.leaves(places, is_leaf=lambda x: x is None)


def count_collectives(text: str, mesh: Mesh) -> list[Collectives]:
    """Those of the optimised HLO, with the trips of the loops around them, the largest traffic first; without those of one device
    alone, which the compiler leaves where an axis is 1."""
    runs, totals = hlo.runs(text), {}
    for c in hlo.collectives(text):
        if c.group == 1:
            continue
        around = runs[c.computation]
        filled = around.filled if c.kind == "ragged-all-to-all" else 1.0
        key = (c.kind, c.bytes, c.group, links.axes_of(mesh, c.pairs), filled)
        totals[key] = totals.get(key, 0) + around.count
    found = [Collectives(*key, count, filled) for (*key, filled), count in totals.items()]
    return sorted(found, key=lambda c: -c.bytes * c.filled * c.count)
