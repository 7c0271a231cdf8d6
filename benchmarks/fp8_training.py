"""FP8 beside bfloat16 products in training the tiny model: the same data, the same first weights, the same steps."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import numpy as np
from absl import flags

from configs import tiny, tiny_more
from qwen35_jax import command
from qwen35_jax.errors import UserError
from qwen35_jax.train.loop import train

USAGE = """
Trains the tiny model with bfloat16 and with FP8 products, from the first weights and in the order of the data of each of
--seeds seeds, and compares the losses. From random weights one pair says little: two bfloat16 runs that differ in a rounding
are a percent apart or two, since skills are learned a little sooner or later. --start packaged trains the packaged weights on,
with the second run's settings.

  python -m scripts.tiny_data --out runs/tiny_data
  python -m benchmarks.fp8_training --data runs/tiny_data/train.jsonl [--start packaged]
"""
DATA = flags.DEFINE_string("data", "runs/tiny_data/train.jsonl", "training data, JSONL")
STEPS = flags.DEFINE_integer("steps", 500, "optimizer steps of each run", lower_bound=1)
TOKENS = flags.DEFINE_integer("tokens", 1024, "tokens of a step, in sequences of 256", lower_bound=256)
MESH = flags.DEFINE_string("mesh", "1x1", "DATAxMODEL or REPLICAxDATAxMODEL")
START = flags.DEFINE_enum("start", "random", ["random", "packaged"], "the first weights")
SEEDS = flags.DEFINE_integer("seeds", 6, "pairs of runs", lower_bound=1)
LAST = 50  # a loss is the mean of so many steps: one batch is too small to compare on


def run(fp8: bool, seed: int) -> np.ndarray:
    """The loss of every step."""
    c = tiny.get_config() if START.value == "random" else tiny_more.get_config()
    c.model.source = "tiny"
    c.mesh, c.dtype, c.steps, c.fp8.enabled = MESH.value, "bfloat16", STEPS.value, fp8
    c.seed = c.data.shuffle_seed = seed
    c.data.train, c.data.eval = (DATA.value,), ()
    c.data.sequence_length, c.data.batch_size = 256, TOKENS.value // 256
    c.log_every, c.checkpoint.every = 1, STEPS.value
    with tempfile.TemporaryDirectory() as workdir:
        train(c, workdir)
        lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return np.array([row["loss"] for row in map(json.loads, lines) if "loss" in row])


def table(curves: np.ndarray) -> list[str]:
    """Lines of [seeds, 2, steps] losses: the means, their ratio and its spread over seeds, and each pair's final ratio."""
    seeds, _, steps = curves.shape
    width = min(LAST, steps)
    lines = ["| step | bfloat16 | FP8 | FP8 / bfloat16 | standard error |", "| --- | --- | --- | --- | --- |"]
    for end in sorted({*range(100, steps, 100), steps}):
        plain, fp8 = curves[:, :, end - width : end].mean(2).T
        ratios = fp8 / plain
        error = f"{ratios.std(ddof=1) / math.sqrt(seeds):.4f}" if seeds > 1 else "-"
        lines.append(f"| {end - width + 1} to {end} | {plain.mean():.4f} | {fp8.mean():.4f} | {ratios.mean():.4f} | {error} |")
    spread = f", bfloat16 between {plain.min():.4f} and {plain.max():.4f}"
    return [*lines, "", "final ratios: " + ", ".join(f"{r:.4f}" for r in ratios) + spread]


def main(arguments: list[str]) -> None:
    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}: options start with --")
    curves = []
    for seed in range(SEEDS.value):
        curves.append([run(False, seed), run(True, seed)])
        print(
            f"\n{STEPS.value} steps of {TOKENS.value} tokens from {START.value} weights, mesh {MESH.value}, seeds 0 to {seed}\n"
        )
        print("\n".join(table(np.array(curves))), flush=True)


if __name__ == "__main__":
    command.run(main, USAGE)
