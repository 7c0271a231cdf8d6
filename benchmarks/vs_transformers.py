"""Prefill and decode speed beside transformers, on this machine's CPU, in one run; prints one table.

    python -m benchmarks.vs_transformers --dtype float32 --dtype bfloat16

Each library has its own process with the same shape (random weights), cores and prompt length, batch 1, greedy. After a
warm-up they take turns: a round is the prompt and then the new tokens, one library after the other; speeds are medians
of the rounds. transformers runs as fast as it does here without extra packages: sdpa attention, inference mode, cache.
Its threads suffer most from other processes, whose share of the CPU is therefore part of the table: it should be near 0.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from absl import app, flags

from qwen35_jax.config import PRESETS, ModelConfig
from qwen35_jax.errors import UserError

_MODEL = flags.DEFINE_enum("model", "0.8b", [p for p in PRESETS if p != "tiny"], "Shape of the model.")
_DTYPE = flags.DEFINE_multi_enum("dtype", ["float32"], ["float32", "bfloat16"], "Of weights; repeatable.")
_PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 512, "Length of the prompt.", lower_bound=1)
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 32, "Tokens decoded after the first.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds that each library runs after the warm-up.", lower_bound=1)

ROOT = Path(__file__).parents[1]
CORES = len(os.sched_getaffinity(0))
LIBRARIES = ("transformers", "qwen35_jax")


class Library:
    """A worker process that runs a round whenever it is asked to."""

    def __init__(self, name: str, options: dict):
        command = [sys.executable, "-m", f"benchmarks.worker_{name}", json.dumps(options)]
        self.name = name
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.versions = self._read()["versions"]

    def _read(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise UserError(f"the process of {self.name} ended with status {self.process.wait()}; its messages are above")

    def round(self) -> dict[str, float]:
        """Seconds of `prefill` and `decode`, and `others`, the share of the CPU that other processes took meanwhile."""
        begin, all_before, own_before = time.perf_counter(), _machine_seconds(), self._seconds()
        print("round", file=self.process.stdin, flush=True)
        result = self._read()
        others = (_machine_seconds() - all_before) - (self._seconds() - own_before)
        return result | {"others": max(0.0, others) / (time.perf_counter() - begin) / CORES}

    def _seconds(self) -> float:
        """CPU time of the process so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def _machine_seconds() -> float:
    """CPU time of everything on this machine so far."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8]]
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK")


def measure(dtype: str) -> tuple[dict[str, list[dict[str, float]]], str]:
    """Rounds by library, and the versions that ran."""
    options = {"model": _MODEL.value, "config": dataclasses.asdict(ModelConfig.preset(_MODEL.value)), "dtype": dtype}
    options |= {"prompt_tokens": _PROMPT_TOKENS.value, "new_tokens": _NEW_TOKENS.value, "threads": CORES}
    workers = [Library(name, options) for name in LIBRARIES]
    rounds: dict[str, list] = {name: [] for name in LIBRARIES}
    for i in range(_ROUNDS.value):
        for worker in workers if i % 2 == 0 else reversed(workers):
            rounds[worker.name].append(worker.round())
    for worker in workers:
        worker.close()
    return rounds, ", ".join(worker.versions for worker in workers)


def rows(dtype: str, rounds: dict[str, list[dict[str, float]]]) -> list[str]:
    """Table rows: median speeds (lowest to highest), the ratio of the medians, the largest share of other processes."""
    result, others = [], max(r["others"] for name in LIBRARIES for r in rounds[name])
    for stage, tokens in (("prefill", _PROMPT_TOKENS.value), ("decode", _NEW_TOKENS.value)):
        speeds = {name: [tokens / r[stage] for r in rounds[name]] for name in LIBRARIES}
        theirs, ours = (statistics.median(speeds[name]) for name in LIBRARIES)
        cells = [f"{statistics.median(s):.2f} ({min(s):.2f} to {max(s):.2f})" for s in (speeds[n] for n in LIBRARIES)]
        result.append(f"| {dtype} | {stage} | {cells[0]} | {cells[1]} | {ours / theirs:.2f} | {others:.0%} |")
    return result


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.processor())


def commit() -> str:
    result = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: options start with --")
    for i, dtype in enumerate(_DTYPE.value):
        rounds, versions = measure(dtype)
        if i == 0:
            print_head(versions)
        print("\n".join(rows(dtype, rounds)), flush=True)


def print_head(versions: str) -> None:
    print(
        f"{_MODEL.value} shape, random weights, batch 1, prompt of {_PROMPT_TOKENS.value} tokens, {_NEW_TOKENS.value} "
        f"decoded, medians of {_ROUNDS.value} rounds\n{cpu_model()}, {CORES} cores; {versions}; "
        f"{datetime.date.today()}; commit {commit()}\n"
    )
    print("| dtype | stage | transformers, tokens/s | qwen35_jax, tokens/s | ratio | other processes |")
    print("|---|---|---|---|---|---|")


def run(argv: list[str]) -> None:
    try:
        main(argv)
    except UserError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    app.run(run)
