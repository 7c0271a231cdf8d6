"""Seconds to lower and compile the decode step of a model, whole and cut to fewer layers, on abstract parameters.

    python -m benchmarks.compile_depth --model 397b-a17b --layers 8

Stacked units go through `lax.scan`, so depth should cost nothing. Prints one table with the ratio.
"""

from __future__ import annotations

import platform
import subprocess
import time

import jax
from absl import app, flags

from qwen35_jax.config import PRESETS, ModelConfig
from qwen35_jax.generate import steps
from qwen35_jax.model import Model
from qwen35_jax.sharding import Sharding, make_mesh

MODEL = flags.DEFINE_enum("model", "397b-a17b", PRESETS, "which preset")
LAYERS = flags.DEFINE_integer("layers", 8, "the cut")
ROUNDS = flags.DEFINE_integer("rounds", 3, "the smallest time of so many counts", lower_bound=1)


def seconds(config: ModelConfig) -> tuple[float, int]:
    """Lowering and compiling time of decode, and the lines of its StableHLO."""
    model = Model(config, Sharding(make_mesh("1x1")))
    begin = time.perf_counter()
    lowered = steps.make_decode(model, 1, 1024, config.vocab_size).lower()
    lowered.compile()
    return time.perf_counter() - begin, lowered.as_text().count("\n")


def main(_) -> None:
    whole = ModelConfig.preset(MODEL.value)
    cut = whole.replace(num_hidden_layers=LAYERS.value)
    seconds(cut)  # what is done once in a process: imports, LLVM start-up
    rounds = [(seconds(cut), seconds(whole)) for _ in range(ROUNDS.value)]
    (short, short_lines), (full, full_lines) = (min(r[i] for r in rounds) for i in (0, 1))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(f"{platform.processor() or platform.machine()}, jax {jax.__version__}, commit {commit}")
    print(f"{'layers':>8}{'seconds':>10}{'StableHLO lines':>18}")
    for layers, s, lines in ((cut.num_hidden_layers, short, short_lines), (whole.num_hidden_layers, full, full_lines)):
        print(f"{layers:>8}{s:>10.1f}{lines:>18,}")
    print(f"ratio {full / short:.2f}")


if __name__ == "__main__":
    app.run(main)
