"""A plan: the meshes ranked, the best of them compiled, and where nothing fits, what would."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from qwen35_jax.errors import UserError
from qwen35_jax.planner.compiled import FULL, Compiled, NoRoomError, compile_job
from qwen35_jax.planner.jobs import Job
from qwen35_jax.planner.search import Candidate, candidates, check_size, estimate, rank
from qwen35_jax.planner.topologies import Topology, larger

DOUBLINGS = 7  # of chips, that are tried before the planner says that more of them do not help


@dataclasses.dataclass(frozen=True)
class Plan:
    """`candidates`, best first; `compiled`: {mesh: its compiled steps} of the first of them, but for those `refused`: {mesh: what
    the compiler says} where it found no room; `advice` where nothing fits."""

    job: Job
    topology: Topology
    candidates: list[Candidate]
    compiled: dict[str, list[Compiled]]
    refused: dict[str, str]
    advice: list[str]

    @property
    def fits(self) -> bool:
        """Of what was compiled, or else of what was estimated, whether a mesh holds the job."""
        if self.compiled or self.refused:
            return any(fits(steps, self.topology) for steps in self.compiled.values())
        return any(c.fits for c in self.candidates)

    def as_json(self) -> dict[str, Any]:
        """The whole plan as numbers, strings, lists and dicts: bytes, seconds, tokens a second."""
        meshes = []
        for c in self.candidates:
            times = {step: _times(r) for step, r in c.rooflines.items()}
            estimated = {"weights": c.weights, "state": c.state, "temporaries": c.temporaries, "fits": c.fits, "rooflines": times}
            meshes.append({"mesh": c.mesh} | estimated | {"forms": c.forms})
        compiled = {mesh: [_step(s, self.topology) for s in steps] for mesh, steps in self.compiled.items()}
        head = dataclasses.asdict(self.job) | {"topology": str(self.topology), "devices": self.topology.size}
        head |= {"capacity": self.topology.hbm, "fits": self.fits, "advice": self.advice, "jax": jax.__version__}
        return head | {"candidates": meshes, "compiled": compiled, "refused": self.refused}


def fits(steps: list[Compiled], topology: Topology) -> bool:
    """Whether a device holds every one of the compiled steps."""
    return all(step.memory.total <= FULL * topology.hbm for step in steps)


def make_plan(job: Job, topology: Topology, mesh: str | None = None, count: int = 1) -> Plan:
    """Ranks the meshes (or takes `mesh`) and compiles the first `count`. UserError for what cannot be."""
    job.check_context()
    if mesh is None:
        ranked = rank(job, topology)
    else:
        check_size(mesh, topology)
        ranked = [estimate(job, mesh, topology)]
    compiled, refused = {}, {}
    for c in ranked[:count]:
        try:
            compiled[c.mesh] = compile_job(job, c.mesh, topology)
        except NoRoomError as error:
            refused[c.mesh] = str(error)
    plan = Plan(job, topology, ranked, compiled, refused, [])
    return plan if plan.fits else dataclasses.replace(plan, advice=list(_advice(plan, mesh)))


def _advice(plan: Plan, mesh: str | None) -> Iterator[str]:
    """What would fit, by estimate: another mesh than those that do not, then less on `mesh` (None: any), then more chips."""
    job, topology = plan.job, plan.topology
    tried = {*plan.compiled, *plan.refused, *([mesh] if mesh else [])}
    others = [c.mesh for c in rank(job, topology) if c.fits and c.mesh not in tried]
    if others:
        yield f"--mesh {others[0]}" + ("" if mesh else f" (or --compile {len(tried) + 1})")
    if job.weights == "bf16" and not job.training and _holds(job.replace(weights="fp8"), topology, mesh):
        yield "--weights fp8"
    for name in ("batch", "context"):
        size, least = getattr(job, name), max(2, 2 * job.image_tokens if name == "context" else 0)
        while size >= least:
            size //= 2
            if _holds(job.replace(**{name: size}), topology, mesh):
                yield f"--{name} {size}"
                break
    for more in larger(topology, DOUBLINGS):
        if _holds(job, more, None):
            yield f"--topology {more}" + (" without --mesh" if mesh else "")
            return


def _holds(job: Job, topology: Topology, mesh: str | None) -> bool:
    """Whether the mesh, or where it is None some mesh, holds the job by estimate."""
    if mesh is None:
        return any(c.fits for c in candidates(job, topology))
    try:
        return estimate(job, mesh, topology).fits
    except UserError:  # which spreads no such batch
        return False


def _times(r: Any) -> dict[str, Any]:
    derived = {"seconds": r.seconds, "bound": r.bound, "tokens_per_second": r.tokens_per_second}
    derived["interconnect_seconds"] = r.interconnect_seconds
    return dataclasses.asdict(r) | derived


def _step(step: Compiled, topology: Topology) -> dict[str, Any]:
    memory = dataclasses.asdict(step.memory) | {"total": step.memory.total, "fits": fits([step], topology)}
    collectives = [dataclasses.asdict(c) for c in step.collectives]
    seconds = {"lower_seconds": step.lower_seconds, "compile_seconds": step.compile_seconds}
    return {"step": step.name, "memory": memory, "collectives": collectives, "roofline": _times(step.roofline)} | seconds
