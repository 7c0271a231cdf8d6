"""Seconds from the shell to the sampler's first byte and to its end, with an empty compilation cache and a filled one.

    python -m benchmarks.start --mesh 8x1

Run it on an idle machine. `--source` names another directory to run the package from, for a comparison.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags

MESH = flags.DEFINE_string("mesh", "8x1", "of the sampler")
SOURCE = flags.DEFINE_string("source", str(Path(__file__).parents[1]), "directory that holds the package")
WARM = flags.DEFINE_integer("warm", 2, "runs with the filled cache", lower_bound=0)


def run(cache: str) -> tuple[float, float]:
    """Seconds to the first byte of stdout, and to the end of the process."""
    command = [sys.executable, "-m", "qwen35_jax.sample", "--mesh", MESH.value, "--max_new_tokens", "40"]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
    begin = time.perf_counter()
    with subprocess.Popen(
        command, cwd=SOURCE.value, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    ) as process:
        byte = process.stdout.read(1)
        first = time.perf_counter() - begin
        process.stdout.read()
    if not byte or process.returncode:
        sys.exit(f"{' '.join(command)} failed ({process.returncode}); run it to see why")
    return first, time.perf_counter() - begin


def main(_) -> None:
    with tempfile.TemporaryDirectory() as cache:
        print(f"{'cache':8}{'first byte, s':>15}{'end, s':>10}")
        for i in range(1 + WARM.value):
            print(f"{'warm' if i else 'empty':8}" + "{:>15.1f}{:>10.1f}".format(*run(cache)), flush=True)


if __name__ == "__main__":
    app.run(main)
