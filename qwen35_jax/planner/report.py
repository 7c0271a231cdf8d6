"""A plan as text for the terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax

from qwen35_jax.planner.compiled import FULL, QUICK, Compiled
from qwen35_jax.planner.jobs import LAYOUT
from qwen35_jax.planner.planning import Plan, fits
from qwen35_jax.planner.roofline import ASSUMPTIONS, Roofline
from qwen35_jax.planner.search import Candidate
from qwen35_jax.planner.topologies import Topology

GIB, MIB = 2**30, 2**20
SHOWN_MESHES = 6
SHOWN_COLLECTIVES = 8
NAMES = {"weights": "weights", "state": "state", "arguments": "other arguments", "padding": "padding of layouts"}
NAMES |= {"temporaries": "temporaries", "results": "new results", "code": "code"}


def lines(plan: Plan) -> Iterator[str]:
    """The report, line by line."""
    job, topology = plan.job, plan.topology
    kind = f"{topology.chip.name}, {capacity_text(topology)} each"
    tokens = f"batch {job.batch}, context {job.context:,}"
    tokens += f" (images: {job.image_tokens:,})" if job.image_tokens else ""
    tokens += "".join(f", {flag}" for flag in job.flags(*LAYOUT))
    yield f"{job.model}, {job.workload}, {job.weights} weights, {tokens} on {topology}: {topology.size} devices ({kind})"
    yield ""
    yield "Meshes, one device, estimated from abstract arrays:"
    yield from _meshes(plan.candidates)
    best = plan.candidates[0]
    forms = ", ".join(f"{op}={form}" for op, form in best.forms.items())
    yield f"Op forms on {best.mesh}, of those ops that a step has, jax {jax.__version__}: {forms}"
    for reason in plan.refused.values():
        yield ""
        yield reason
    for mesh, steps in plan.compiled.items():
        for step in steps:
            yield ""
            yield f"Mesh {mesh}, {step.name}, compiled for {topology}, one device:"
            yield from _compiled(step, topology)
    yield ""
    yield _verdict(plan)
    yield "Assumed:"
    yield from (f"  - {text}" for text in ASSUMPTIONS)
    if job.training and topology.platform == "tpu":
        effort = ", ".join(f"{name} {value}" for name, value in QUICK.items())
        yield f"  - compiled with the least effort on speed ({effort}): a run's buffers are not the same"
    if topology.platform == "cuda":
        yield "  - JAX is given the whole memory (XLA_PYTHON_CLIENT_MEM_FRACTION=0.95); on its own it takes 75 % of a GPU's"


def capacity_text(topology: Topology) -> str:
    return f"{topology.hbm / GIB:.0f} GiB" if topology.platform == "tpu" else f"{topology.hbm / 1e9:.0f} GB"


def _verdict(plan: Plan) -> str:
    how = "compiled" if plan.compiled or plan.refused else "estimated"
    if plan.fits:
        return f"Fits ({how})."
    advice = ", or ".join(plan.advice) if plan.advice else "nothing near it: fewer tokens, fp8 or more chips of this kind do not"
    return f"Does not fit ({how}: a device is full at {FULL:.0%}). What would, by estimate: {advice}"


def _meshes(candidates: list[Candidate]) -> Iterator[str]:
    yield f"  {'mesh':<10}{'weights':>11}{'state':>11}{'temporaries':>13}{'of capacity':>13}{'step at least':>16}{'bound by':>14}"
    for c in candidates[:SHOWN_MESHES]:
        sizes = "".join(f"{gib(x):>{width}}" for x, width in ((c.weights, 11), (c.state, 11), (c.temporaries, 13)))
        bound = ", ".join(r.bound for r in c.rooflines.values())
        yield f"  {c.mesh:<10}{sizes}{c.total / c.capacity:>12.0%} {seconds(c.seconds):>16} {bound:>13}"
    if len(candidates) > SHOWN_MESHES:
        yield f"  and {len(candidates) - SHOWN_MESHES} more"


def _compiled(step: Compiled, topology: Topology) -> Iterator[str]:
    for field in dataclasses.fields(step.memory):
        yield f"  {NAMES[field.name]:<20}{gib(getattr(step.memory, field.name)):>12}"
    part = step.memory.total / topology.hbm
    yield f"  {'total':<20}{gib(step.memory.total):>12} of {capacity_text(topology)}, {part:.0%}: " + (
        "fits" if fits([step], topology) else "does not fit"
    )
    calls = step.roofline.calls
    which = "one token" if step.name == "decode" else "one call" if calls == 1 else f"one call of {calls}; the times are of all"
    yield f"  collectives in {which}:"
    for c in step.collectives[:SHOWN_COLLECTIVES]:
        filled = f", {c.filled:.0%} filled" if c.filled < 1 else ""
        over = f"{c.group or 'pairs of'} devices ({' and '.join(c.axes)})"
        yield f"    {c.count:>5} x {c.kind:<18}{c.bytes / MIB:>12.3f} MiB over {over}{filled}"
    if rest := step.collectives[SHOWN_COLLECTIVES:]:
        yield f"    and {sum(c.count for c in rest)} more, {sum(c.count * c.bytes for c in rest) / MIB:.3f} MiB together"
    yield from roofline_lines(step.roofline, topology)
    yield f"  lowered in {step.lower_seconds:.1f} s, compiled in {step.compile_seconds:.1f} s"


def roofline_lines(r: Roofline, topology: Topology) -> Iterator[str]:
    """The three times of a device, and what they bound."""
    rate, total = r.operations / r.compute_seconds, sum(r.memory.values())
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in r.memory.items())
    received = sum(size for size, _ in r.interconnect.values())
    links = ", ".join(f"{axes} {size / 1e9:.2f} at {rate / 1e9:.0f} GB/s" for axes, (size, rate) in r.interconnect.items())
    notes = {
        "compute": f"{r.operations / 1e12:.3f} Tflop at {rate / 1e12:.0f} Tflop/s",
        "memory": f"{total / 1e9:.2f} GB at {topology.chip.hbm_bandwidth / 1e9:.0f} GB/s: {parts}",
        "interconnect": f"{received / 1e9:.2f} GB in, over {links}" if links else "one device: nothing to send",
    }
    for name, note in notes.items():
        yield f"  {name:<20}{seconds(getattr(r, f'{name}_seconds')):>12}  {note}".rstrip()
    yield f"  {'at least':<20}{seconds(r.seconds):>12}  ({r.bound}), at most {r.tokens_per_second:,.0f} tokens/s on all devices"


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if abs(size) >= GIB / 100 else f"{size / MIB:.2f} MiB"


def seconds(time: float) -> str:
    return f"{time:.2f} s" if time >= 1 else f"{time * 1e3:.2f} ms"
