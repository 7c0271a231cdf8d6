"""The commands that time the kernels: that they run, what they choose, and what they say of the aims."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import aims, fp8
from qwen35_jax.compat import HAS_MOSAIC_GPU

ROOT = Path(__file__).parents[1]


def run(*command: str) -> subprocess.CompletedProcess:
    options = {"capture_output": True, "text": True, "timeout": 600, "cwd": ROOT, "env": os.environ | {"JAX_PLATFORMS": "cpu"}}
    return subprocess.run([sys.executable, *command], **options)


def test_forms_of_fp8_products():
    """On a TPU the table is not of XLA alone."""
    tpu, cpu = (SimpleNamespace(platform=name) for name in ("tpu", "cpu"))
    hopper, older = (SimpleNamespace(platform="gpu", compute_capability=c) for c in ("9.0", "8.0"))
    dense, grouped = fp8.Shape(256, 256, 384), fp8.Shape(256, 256, 384, 4)
    for product in ("both", "weights", "training"):
        assert fp8.forms_of(tpu, dense, product) == ["xla", "pallas_tpu"]
        assert fp8.forms_of(cpu, dense, product) == fp8.forms_of(older, grouped, product) == ["xla"]
        kernel = ["pallas_gpu"] if HAS_MOSAIC_GPU else []
        assert fp8.forms_of(hopper, dense, product) == fp8.forms_of(hopper, grouped, product) == ["xla", *kernel]
    assert fp8.forms_of(tpu, grouped, "both") == fp8.forms_of(tpu, grouped, "weights") == ["xla", "pallas_tpu"]
    assert fp8.forms_of(tpu, grouped, "training") == fp8.forms_of(tpu, grouped, "bfloat16") == ["xla"]


def test_shares_of_the_aims():
    kind, forward = "NVIDIA H200", ("forward", 4, 8192, 16, 64)
    assert aims.of_rule(kind, forward, 2.4) == "0.50, 0.35"
    assert aims.of_product(kind, (4096, 7168, 16384, 1), 1400) == "1.17, 1.00"
    assert aims.of_decode(kind, 64, 0.4) == "0.50"
    nothing = aims.of_rule("cpu", forward, 2.4), aims.of_rule(kind, ("both", *forward[1:]), 2.4), aims.of_decode(kind, 1, 0.4)
    assert set(nothing) == {""}


def test_what_fails_does_not_stop_the_rest():
    jobs = "[('nowhere',), ('timing',)]"
    code = f"from benchmarks import all_kernels as a; a.REDUCED = {jobs}; a.app.run(a.main, ['all_kernels', '--small'])"
    done = run("-c", code)
    assert done.returncode == 1, done.stderr
    assert done.stdout.index("benchmarks.nowhere ended with 1") < done.stdout.index("== benchmarks.timing")
    assert done.stdout.endswith("1 of 2 failed: nowhere\n")


@pytest.mark.slow
def test_all_of_them_in_small():
    done = run("-m", "benchmarks.all_kernels", "--small")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("cpu, jax ") and "benchmarks.hopper is left out" in done.stdout
    for line in ("0.8b  16/16  forward", "256x256x384 in 4   weights", "0.8b      2         xla"):
        assert line in done.stdout
