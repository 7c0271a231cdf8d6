"""All sizes on the topologies that people rent, as a Markdown table."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator

from qwen35_jax.config import PRESETS
from qwen35_jax.planner.jobs import LAYOUT, Job
from qwen35_jax.planner.report import capacity_text, gib, seconds
from qwen35_jax.planner.topologies import parse_topology

SIZES = tuple(name for name in PRESETS if name != "tiny")
RENTED = ("v5e:2x4", "v6e:2x4", "v6e:8x8", "v5p:2x2x1", "v5p:4x4x4", "tpu7x:2x2x1", "tpu7x:2x2x4", "h100:8", "h200:8", "h100:2x8")

COLUMNS = (
    "model",
    "topology",
    "batch",
    "mesh",
    "weights",
    "state",
    "total",
    "of",
    "fits",
    "step at least",
    "tokens/s at most",
    "bound",
)


def lines(make_job: Callable[[str, int], Job], count: int) -> Iterator[str]:
    """Row by row. Each plan is made in a process of its own: a compiler that crashes takes its process along."""
    first = make_job(SIZES[0], 1)
    how = "compiled" if count else "estimated"
    more = "".join(f", `{flag}`" for flag in first.flags("image_tokens", "chunk", *LAYOUT))
    yield f"`{first.workload}`, {first.weights}, context {first.context:,}{more}; memory of one device, {how}."
    yield ""
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|" + " --- |" * len(COLUMNS)
    for model in SIZES:
        for text in RENTED:
            yield _row(make_job(model, parse_topology(text).size), text, count)


def _row(job: Job, text: str, count: int) -> str:
    head = f"| {job.model} | {text} | {job.batch} |"
    command = [sys.executable, "-m", "qwen35_jax.plan", "--topology", text, "--compile", str(count), "--json"]
    command += job.flags(*(field.name for field in dataclasses.fields(job))) + [f"--batch={job.batch}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"the compiler ended with status {done.returncode}"]
        return f"{head} {reason[0].removeprefix('error: ')} |" + " |" * (len(COLUMNS) - 4)
    plan = json.loads(done.stdout)
    best = plan["candidates"][0]
    mesh, sizes, capacity = best["mesh"], [best[name] for name in ("weights", "state")], capacity_text(parse_topology(text))
    total, rooflines = gib(sum(sizes) + best["temporaries"]), list(best["rooflines"].values())
    if plan["compiled"]:  # the first that fits, or else the first
        fitting = (x for x in plan["compiled"].items() if all(s["memory"]["fits"] for s in x[1]))
        mesh, steps = next(fitting, next(iter(plan["compiled"].items())))
        sizes = [steps[0]["memory"][name] for name in ("weights", "state")]
        total, rooflines = gib(max(s["memory"]["total"] for s in steps)), [s["roofline"] for s in steps]
    elif plan["refused"]:  # the compiler does not say how much all of it would take
        total = f"over {capacity}"
    memory = f"{gib(sizes[0])} | {gib(sizes[1])} | {total} | {capacity} | {_yes(plan['fits'])}"
    time, last = sum(r["seconds"] for r in rooflines), rooflines[-1]
    return f"{head} {mesh} | {memory} | {seconds(time)} | {last['tokens_per_second']:,.0f} | {last['bound']} |"


def _yes(fits: bool) -> str:
    return "yes" if fits else "no"
