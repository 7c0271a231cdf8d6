"""Plans compiled for pods that are not there: 397b-a17b in FP8, a token of 64 streams of 32,768 tokens, its mesh not given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from qwen35_jax.planner.topologies import missing_compiler, parse_topology
from tests.aot.run import of_this_jax

ROOT = Path(__file__).parents[2]
# The mesh that the search finds, and the ceiling of temporaries in GiB, a tenth above what was measured with jax 0.10.2.
PODS = [
    ("v5p:4x4x4", "16x4", 0.84),
    ("h100:8", "4x2", 1.46),
    pytest.param("v6e:8x8", "8x8", 0.7, marks=pytest.mark.slow),
    pytest.param("tpu7x:2x2x4", "8x4", 2.05, marks=pytest.mark.slow),
    pytest.param("h200:8", "4x2", 1.46, marks=pytest.mark.slow),
]


# Of a plan with its search: what two cores do in so many minutes (the wall's would be those of whatever else runs), and memory.
MINUTES, GIBIBYTES = 3, 8


def plan_of(model: str, text: str, *flags: str) -> dict:
    if missing := missing_compiler(parse_topology(text).platform):
        pytest.skip(f"{missing} is not installed: pip install -e '.[test,aot]'")
    return json.loads(measured([sys.executable, "-m", "qwen35_jax.plan", "--model", model, "--topology", text, "--json", *flags]))


def compiled(text: str, *flags: str) -> tuple[dict, str, list[dict]]:
    """The plan of 397b-a17b in FP8 for a topology, the mesh that was compiled, and its steps."""
    plan = plan_of("397b-a17b", text, "--weights", "fp8", *flags)
    ((mesh, steps),) = plan["compiled"].items()
    for step in steps:
        print(text, mesh, step["step"], step["memory"], step["lower_seconds"], step["compile_seconds"])
    return plan, mesh, steps


def measured(command: list[str]) -> str:
    """What it prints, if it ends well and within the limits of time and memory, of its own children too."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        begin = time.perf_counter()
        started = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=out, stderr=errors)
        limit = threading.Timer(900, started.kill)
        limit.start()
        _, status, used = os.wait4(started.pid, 0)
        limit.cancel()
        started.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), errors.seek(0)
        assert started.returncode == 0, errors.read()[-4000:]
        cpu, memory = used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20
        print(f"{time.perf_counter() - begin:.0f} s, of processors {cpu:.0f} s, {memory:.2f} GiB")
        assert cpu < 2 * MINUTES * 60 and memory < GIBIBYTES, (cpu, memory)
        return out.read()


@pytest.mark.parametrize(("text", "mesh", "ceiling"), PODS)
def test_decoding_of_the_largest_model_fits(text, mesh, ceiling):
    plan, found, (step,) = compiled(text, "--batch", "64", "--context", "32768")
    memory = step["memory"]
    assert plan["fits"] and found == mesh == plan["candidates"][0]["mesh"]
    assert memory["temporaries"] < ceiling * 2**30 and memory["total"] < 0.95 * plan["capacity"]
    # Padding is what the compiler counts of the arguments beyond our bytes of them, nearly all of which are weights and state.
    assert abs(memory["padding"]) < 0.01 * (memory["weights"] + memory["state"])
    assert sum(c["count"] for c in step["collectives"] if c["bytes"] > 2**17) >= 60  # one or more a layer


@pytest.mark.slow
def test_training_of_the_largest_model_fits():
    """bfloat16 with float32 masters and AdamW, 8,192 tokens a chip: a minute and a half of two cores, 5.4 GiB."""
    plan, mesh, (step,) = compiled("v5p:8x8x8", "--workload", "train", "--batch", "512", "--context", "8192", "--weights", "bf16")
    assert plan["fits"] and mesh == "512x1"
    assert step["memory"]["temporaries"] < 26.6 * 2**30  # a tenth above what was measured with jax 0.10.2


@pytest.mark.slow
def test_a_prompt_of_a_million_tokens():
    """Cut over `data`, with YaRN; the mesh is found by the search."""
    sizes = ("--context", "1048576", "--yarn", "4", "--prefill_chunk", "65536")
    plan, mesh, steps = compiled("v5p:4x4x4", "--workload", "sample", "--context_parallel", *sizes)
    assert plan["fits"] and mesh == "64x1" and [step["step"] for step in steps] == ["prefill", "decode"]
    for step, ceiling in zip(steps, (6.8, 1.36), strict=True):  # a tenth above what was measured with jax 0.10.2
        assert step["memory"]["temporaries"] < ceiling * 2**30


@pytest.mark.slow
def test_a_prompt_with_the_largest_image():
    """16,384 of 20,480 tokens are an image of 4096 x 4096 pixels: the tower's program, and the prefill that reads its rows."""
    plan, mesh, steps = compiled("v5p:4x4x4", "--workload", "prefill", "--context", "20480", "--image_tokens", "16384")
    assert plan["fits"] and mesh == "4x1x16" and [step["step"] for step in steps] == ["vision", "prefill"]
    for step, ceiling in zip(steps, ((0.98, 1.2), (0.82,)), strict=True):  # a tenth above what was measured
        assert step["memory"]["temporaries"] < of_this_jax(ceiling) * 2**30


def test_what_a_tpu_has_no_room_for_is_a_plan():
    """A device would have 29 of 16 GiB of weights; the compiler ends, and the plan says what would hold it."""
    plan = plan_of("122b-a10b", "v5e:2x4")
    assert not plan["fits"] and not plan["compiled"] and "RESOURCE_EXHAUSTED" in plan["refused"]["1x8"]
    assert plan["advice"][-1] == "--topology v5e:4x8"
