"""FP8 beside bfloat16 products in training the tiny model: the same data, the same first weights, the same steps."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from absl import flags

from configs import tiny
from qwen35_jax import command
from qwen35_jax.errors import UserError
from qwen35_jax.train.loop import train

USAGE = """
Trains the tiny model twice, with bfloat16 and with FP8 products, and compares the losses.

  python -m scripts.tiny_data --out runs/tiny_data
  python -m benchmarks.fp8_training --data runs/tiny_data/train.jsonl
"""
DATA = flags.DEFINE_string("data", "runs/tiny_data/train.jsonl", "training data, JSONL")
STEPS = flags.DEFINE_integer("steps", 500, "optimizer steps of each run", lower_bound=1)
TOKENS = flags.DEFINE_integer("tokens", 1024, "tokens of a step, in sequences of 256", lower_bound=256)
MESH = flags.DEFINE_string("mesh", "1x1", "DATAxMODEL or REPLICAxDATAxMODEL")
LAST = 50  # the final loss is the mean of so many steps: one batch is too small to compare on


def run(fp8: bool) -> list[float]:
    """The loss of every step."""
    c = tiny.get_config()
    c.mesh, c.dtype, c.steps, c.fp8.enabled = MESH.value, "bfloat16", STEPS.value, fp8
    c.data.train, c.data.eval = (DATA.value,), ()
    c.data.sequence_length, c.data.batch_size = 256, TOKENS.value // 256
    c.log_every, c.checkpoint.every = 1, STEPS.value
    with tempfile.TemporaryDirectory() as workdir:
        train(c, workdir)
        lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def main(arguments: list[str]) -> None:
    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}: options start with --")
    curves = {name: run(fp8) for name, fp8 in (("bfloat16", False), ("fp8", True))}
    print(f"\n{STEPS.value} steps of {TOKENS.value} tokens, mesh {MESH.value}\n\n| step | bfloat16 | FP8 | FP8 / bfloat16 |")
    print("| --- | --- | --- | --- |")
    width = min(LAST, STEPS.value)
    for end in sorted({*range(100, STEPS.value, 100), STEPS.value}):
        means = [sum(curve[end - width : end]) / width for curve in curves.values()]
        print(f"| {end - width + 1} to {end} | {means[0]:.4f} | {means[1]:.4f} | {means[1] / means[0]:.4f} |")


if __name__ == "__main__":
    command.run(main, USAGE)
