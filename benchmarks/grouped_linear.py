"""Time of the grouped product at fixed rows against the number of experts, rows spread evenly; prints one table.

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
    product = jax.jit(grouped_linear)
    print(f"{ROWS.value} rows, {width_in} x {width_out}, float32, {platform.machine()}, jax {jax.__version__}")
    print(f"{'experts':>8}{'ms, best of 8':>15}")
    for experts in map(int, EXPERTS.value):
        w = jnp.ones((experts, width_in, width_out))
        sizes = jnp.full((experts,), ROWS.value // experts, jnp.int32)
        seconds = []
        for _ in range(9):
            begin = time.perf_counter()
            jax.block_until_ready(product(x, w, sizes))
            seconds.append(time.perf_counter() - begin)
        print(f"{experts:>8}{min(seconds[1:]) * 1e3:>15.1f}", flush=True)


if __name__ == "__main__":
    app.run(main)
