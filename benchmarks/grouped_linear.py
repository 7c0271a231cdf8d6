"""Time of the grouped product at fixed rows against the number of experts, rows spread evenly; prints one table.

Each expert's weight has to be read once, which the last column shows alone: the sum of all weights.

python -m benchmarks.grouped_linear
"""

from __future__ import annotations

import platform
import time

import jax
import jax.numpy as jnp
from absl import app, flags

from qwen35_jax.ops.grouped_linear import grouped_linear

ROWS = flags.DEFINE_integer("rows", 4096, "rows in all", lower_bound=1)
WIDTHS = flags.DEFINE_list("widths", ["512", "1024"], "input and output width of an expert")
EXPERTS = flags.DEFINE_list("experts", ["4", "8", "32", "64", "128"], "numbers of experts; each divides rows")


def main(_) -> None:
    width_in, width_out = map(int, WIDTHS.value)
    x = jax.random.normal(jax.random.key(0), (ROWS.value, width_in))
    product, reading = jax.jit(grouped_linear), jax.jit(jnp.sum)
    print(f"{ROWS.value} rows, {width_in} x {width_out}, float32, {platform.machine()}, jax {jax.__version__}")
    print(f"{'experts':>8}{'ms, best of 8':>15}{'reading, ms':>13}")
    for experts in map(int, EXPERTS.value):
        w = jnp.ones((experts, width_in, width_out))
        sizes = jnp.full((experts,), ROWS.value // experts, jnp.int32)
        print(f"{experts:>8}{_milliseconds(product, x, w, sizes):>15.1f}{_milliseconds(reading, w):>13.1f}", flush=True)


def _milliseconds(f, *args) -> float:
    """The best of eight calls after the first, which compiles."""
    seconds = []
    for _ in range(9):
        begin = time.perf_counter()
        jax.block_until_ready(f(*args))
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:]) * 1e3


if __name__ == "__main__":
    app.run(main)
