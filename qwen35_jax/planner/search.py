"""Which mesh: all that the devices form and the model fits, ranked by whether they hold it and by their rooflines, from abstract
arrays alone."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator

from qwen35_jax.errors import UserError
from qwen35_jax.ops.moe.products import BUFFER_BYTES
from qwen35_jax.planner.compiled import FULL
from qwen35_jax.planner.jobs import Job, Placed, shard_bytes
from qwen35_jax.planner.roofline import Roofline, make_roofline, one_pass, vision_ways
from qwen35_jax.planner.topologies import Topology, stand_ins
from qwen35_jax.sharding import make_mesh, parse_mesh


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh with estimates of one device: bytes of weights and state, counted; of temporaries, by the forms' large buffers.
    `forms`: {op: its form}, whether a step has the op or not; of `moe` where the model has experts that of each step."""

    mesh: str
    weights: int
    state: int
    temporaries: int
    rooflines: dict[str, Roofline]
    capacity: int
    forms: dict[str, str]

    @property
    def total(self) -> int:
        return self.weights + self.state + self.temporaries

    @property
    def fits(self) -> bool:
        return self.total <= FULL * self.capacity

    @property
    def seconds(self) -> float:
        return sum(r.seconds for r in self.rooflines.values())


def meshes(devices: int) -> list[str]:
    """All DATAxMODEL and REPLICAxDATAxMODEL of so many devices."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    shapes = [(r, d, devices // r // d) for r in divisors for d in divisors if devices % (r * d) == 0]
    return ["x".join(str(n) for n in shape[0 if shape[0] > 1 else 1 :]) for shape in shapes]


def check_size(mesh: str, topology: Topology) -> None:
    """UserError for a mesh that does not multiply to the topology's devices."""
    count = math.prod(parse_mesh(mesh))
    if count != topology.size:
        chips = f" ({topology.chips} chips of {topology.chip.devices})" if topology.chip.devices > 1 else ""
        raise UserError(f"--mesh {mesh} has {count} devices, but {topology} has {topology.size}{chips}")


def candidates(job: Job, topology: Topology) -> Iterator[Candidate]:
    """All meshes of the devices that can be, in no order."""
    for mesh in meshes(topology.size):
        with contextlib.suppress(UserError):
            yield estimate(job, mesh, topology)


def rank(job: Job, topology: Topology) -> list[Candidate]:
    """What fits first, by its bound on the time; then what does not, by its bytes. UserError where no mesh can be."""
    found = list(candidates(job, topology))
    if not found:
        raise UserError(f"no mesh of the {topology.size} devices of {topology} can be: {_problem(job, topology)}")
    return sorted(found, key=lambda c: (not c.fits, c.seconds if c.fits else 0.0, c.total))


def _problem(job: Job, topology: Topology) -> str:
    try:
        estimate(job, f"{topology.size}x1", topology)
    except UserError as error:
        return str(error)
    return "none was tried"


def estimate(job: Job, mesh: str, topology: Topology) -> Candidate:
    """UserError where the devices do not form the mesh, the model cannot be cut so, or the batch not be spread."""
    placed = Placed.on(job, make_mesh(mesh, stand_ins(topology)))
    steps = ("prefill", "decode") if job.workload == "sample" else (job.workload,)
    steps = ("vision", *steps) if job.image_tokens else steps
    rooflines = {step: make_roofline(placed, step, topology) for step in steps}
    temporaries = max(_temporaries(placed, step) for step in steps)
    kept = shard_bytes(placed.weights), shard_bytes(placed.state)
    return Candidate(mesh, *kept, temporaries, rooflines, topology.hbm, _forms(placed, steps))


def _forms(placed: Placed, steps: tuple[str, ...]) -> dict[str, str]:
    forms = dataclasses.asdict(placed.model.forms)
    if placed.config.num_experts:
        experts = {step: one_pass(placed, step).experts_form for step in steps if step != "vision"}
        same = len(set(experts.values())) == 1
        forms["moe"] = ", ".join(dict.fromkeys(form if same else f"{form} ({step})" for step, form in experts.items()))
    return forms


def _temporaries(placed: Placed, step: str) -> int:
    """The large buffers: one unit's weights where a scan takes them, the experts' (rows of a pass, or tokens of their group), the
    queries of cut sequences and their outputs in float32, twice, and in training the units' inputs that are kept, the gradients,
    the gathered unit with its own, and the gathered embedding and head. Of the tower a row's features and its block's."""
    if step == "vision":
        v = placed.config.vision
        return placed.images[1] * (2 * v.intermediate_size // vision_ways(placed) + 6 * v.hidden_size)
    c, one = placed.config, one_pass(placed, step)
    tokens, width, train = one.tokens, placed.config.hidden_size, step == "train"
    unit = shard_bytes(placed.params["units"]) // c.num_units
    # Passes forward, and again with gradients; of gathered tokens several copies are alive.
    experts = 2 * BUFFER_BYTES if one.sent_rows else one.group * width * (12 if train else 10) if c.num_experts else 0
    inference = ("embed", "lm_head")
    ends = shard_bytes({name: x for name, x in placed.params.items() if name != "units" and (train or name in inference)})
    if not train:
        queries = one.cuts * tokens * placed.sharding.heads(c.num_attention_heads) // placed.sharding.model * c.head_dim
        gathered = ends if placed.job.fully_sharded else 0
        return unit * placed.model.stacked + gathered + tokens * width * 40 + experts + (queries * 10 if one.cuts > 1 else 0)
    return shard_bytes(placed.weights) + 2 * unit + 2 * ends + tokens * width * (2 * c.num_units + 60) + experts
