"""The plan command as a stranger types it, without a compiler: estimates, JSON, and one line for every wrong input."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from qwen35_jax.errors import UserError
from qwen35_jax.planner import compiled, table, topologies
from qwen35_jax.planner.jobs import Job, Step
from qwen35_jax.planner.topologies import COMPILERS, parse_topology, stand_ins
from tests.forked import run_all

ROOT = Path(__file__).parents[2]
BIG = ["--model", "397b-a17b", "--weights", "fp8", "--batch", "64", "--context", "32768", "--compile", "0"]
GOOD = {
    "text": [*BIG, "--topology", "v5p:4x4x4"],
    "json": [*BIG, "--topology", "h100:8", "--mesh", "4x2", "--workload", "sample", "--batch", "8", "--json"],
    "crowded": ["--model", "397b-a17b", "--topology", "h100:8", "--compile", "0"],
}
WRONG = [
    ([], "--model and --topology are needed"),
    (["--model", "500b", "--topology", "h100:8"], "500b"),
    (["--model", "9b", "--topology", "h100"], "topology 'h100' is none"),
    (["--model", "9b", "--topology", "v5p:4x4"], "v5p:4x4x4"),
    (["--model", "9b", "--topology", "h100:16"], "1 to 8 GPUs of a node"),
    (["--model", "9b", "--topology", "tpu7x:2x2x4", "--mesh", "4x4"], "--mesh 4x4 has 16 devices, but tpu7x:2x2x4 has 32"),
    (["--model", "9b", "--topology", "h100:8", "--mesh", "eight"], "mesh 'eight' is not a mesh"),
    (["--model", "27b", "--topology", "v5e:16x16", "--mesh", "1x256"], "does not fit this model"),
    (["--model", "9b", "--topology", "h100:8", "--batch", "0"], "--batch is 0"),
    (["--model", "9b", "--topology", "h100:8", "--context", "262145"], "at most 262144 tokens"),
    (["--model", "9b", "--topology", "h100:8", "--workload", "train", "--mesh", "8x1", "--batch", "12"], "--batch 12"),
    (["--model", "9b", "--topology", "h100:8", "--workload", "serve"], "workload"),
    (["--model", "9b", "--topology", "h100:8", "--compile", "-1"], "compile"),
    (["--model", "9b", "--topology", "h100:8", "--prefill_chunk", "2048"], "--prefill_chunk is of prompts"),
    (["--model", "9b", "--topology", "h100:8", "--workload", "train", "--prefill_chunk", "64"], "--prefill_chunk is of prompts"),
    (["--all", "--prefill_chunk", "64"], "--prefill_chunk is of prompts"),
    (["--model", "9b", "--topology", "h100:8", "--mesh", "8x1", "--compile", "2"], "--mesh names one"),
    (["--all", "--model", "9b"], "leave --model out"),
    (["--all", "--json"], "leave --json out"),
    (["--all", "--moe", "gather"], "leave --moe out"),
    (["more"], "unexpected argument 'more'"),
]


@pytest.fixture(scope="module")
def done() -> list:
    """All commands, run from one process that has imported JAX once."""
    return run_all("qwen35_jax.plan", [*GOOD.values(), *(arguments for arguments, _ in WRONG)], ROOT)


def test_estimates_as_text(done):
    text = done[0].stdout
    assert done[0].returncode == 0 and "Fits (estimated)." in text, done[0].stderr
    first = next(line for line in text.splitlines() if line.startswith("  16x4"))
    assert f"Op forms on 16x4, of those ops that a step has, jax {jax.__version__}: gated_delta_rule=" in text
    assert "8.83 GiB" in first and "memory" in first and not done[0].stderr


def test_estimates_as_json(done):
    plan = json.loads(done[1].stdout)
    (candidate,) = plan["candidates"]
    assert (plan["devices"], plan["capacity"], plan["fits"], plan["compiled"]) == (8, 80 * 10**9, True, {})
    assert candidate["mesh"] == "4x2" and set(candidate["rooflines"]) == {"prefill", "decode"}
    decode = candidate["rooflines"]["decode"]
    assert (decode["calls"], candidate["rooflines"]["prefill"]["calls"], plan["jax"]) == (1, 16, jax.__version__)
    assert candidate["forms"]["moe"] == "gather" and {"attention", "gated_delta_rule"} <= set(candidate["forms"])
    assert decode["tokens_per_second"] == pytest.approx(8 / decode["seconds"])
    assert decode["seconds"] == max(decode[f"{part}_seconds"] for part in ("compute", "memory", "interconnect"))


def test_what_does_not_fit_is_said_with_what_would(done):
    assert "Does not fit" in done[2].stdout and "--weights fp8, or --topology h100:2x8" in done[2].stdout


@pytest.mark.parametrize("i", range(len(WRONG)), ids=[" ".join(a) or "nothing" for a, _ in WRONG])
def test_wrong_input_is_one_line_and_a_status(done, i):
    result, (_, message) = done[len(GOOD) + i], WRONG[i]
    lines = result.stderr.splitlines()
    assert result.returncode == 1 and len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert message in lines[0]


def test_an_absent_compiler_is_named_with_what_installs_it():
    if importlib.util.find_spec(COMPILERS["tpu"]):
        pytest.skip("libtpu is installed here")
    (result,) = run_all("qwen35_jax.plan", [["--model", "0.8b", "--topology", "v5e:2x4"]], ROOT)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and ".[aot]" in result.stderr


def test_an_absent_assembler_is_named(monkeypatch, tmp_path):
    """What XLA makes of a kernel goes through ptxas: of CUDA or of a wheel."""
    namespace = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: namespace)
    monkeypatch.setattr(topologies, "CUDA", tmp_path / "ptxas")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert topologies.missing_compiler("cuda") == "nvidia-cuda-nvcc" and topologies.missing_compiler("tpu") is None
    with pytest.raises(UserError, match="h100:8 needs nvidia-cuda-nvcc: pip install"):
        topologies.topology_devices(parse_topology("h100:8"))
    (tmp_path / "cu13/bin").mkdir(parents=True)
    (tmp_path / "cu13/bin/ptxas").touch()
    assert topologies.missing_compiler("cuda") is None


def test_the_table_of_all_sizes(monkeypatch):
    """A row for each size and topology: numbers of its plan, or why there is none."""
    monkeypatch.setattr(table, "SIZES", ("397b-a17b",))
    monkeypatch.setattr(table, "RENTED", ("v5p:4x4x4", "h100:8"))
    _, _, names, _, fits, crowded = table.lines(lambda model, _: Job(model, "decode", batch=8, context=8192), 0)
    assert "| 95 GiB | yes |" in fits and "| 80 GB | no |" in crowded, (fits, crowded)
    assert fits.count("|") == crowded.count("|") == names.count("|")
    monkeypatch.setattr(table, "RENTED", ("v5p:4x4x4",))
    head, *_, none = table.lines(lambda model, _: Job(model, "decode", batch=8, context=300_000), 0)
    assert "context 300,000" in head and "--context 300000" in none and none.count("|") == names.count("|"), (head, none)
    layout = {"context": 300_000, "yarn": 4.0, "context_parallel": True, "chunk": 4096}
    head, *_, long = table.lines(lambda model, _: Job(model, "sample", **layout), 0)
    assert "`--prefill_chunk=4096`, `--context_parallel`, `--yarn=4.0`" in head and "| yes |" in long, (head, long)


CRASHING = """
import os, sys
from qwen35_jax import command, plan
def make_plan(*_):
    {0}
plan.make_plan = make_plan
sys.argv[1:] = "--model 0.8b --topology v5e:2x4".split()
command.run(plan.main, plan.USAGE)
"""


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("os.kill(os.getpid(), 11)", "the compiler crashed with signal 11 (Segmentation fault)"),
        ("os.kill(os.getpid(), 9)", "the plan of 0.8b on v5e:2x4 was ended by signal 9 (Killed)"),
        ("raise plan.UserError('no such thing')", "no such thing"),
    ],
)
def test_a_compiler_that_crashes_is_one_line(what, message):
    command = [sys.executable, "-c", CRASHING.format(what)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr and not done.stdout


@pytest.mark.parametrize("gently", [True, pytest.param(False, marks=pytest.mark.skipif(sys.platform != "linux", reason="Linux"))])
def test_a_stopped_plan_leaves_no_compiler_behind(gently):
    command = [sys.executable, "-c", CRASHING.format("print(os.getpid(), flush=True); import time; time.sleep(60)")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        child = int(started.stdout.readline())
        if gently:
            started.terminate()
            assert started.wait(timeout=120) == 1 and "ended by signal 15" in started.stderr.read()
        else:
            started.kill()
            started.stderr.read()  # which the fork has open too
    for _ in range(100):  # until whoever adopted it has noticed
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split(") ")[1][:1]:
            return
        time.sleep(0.1)
    pytest.fail("the fork is still there")


def test_what_a_compiler_refuses_is_one_line(monkeypatch):
    """The exception that XLA raises, whose text has many lines."""
    job, topology = Job("tiny", "decode"), parse_topology("v5e:2x4")
    monkeypatch.setattr(compiled, "topology_devices", stand_ins)
    program = SimpleNamespace(lower=lambda: SimpleNamespace(compile=refuse))
    monkeypatch.setattr(compiled, "make_steps", lambda *_: [Step("decode", program, (), ())])
    with pytest.raises(UserError, match="^tiny, decode on mesh 8x1 of v5e:2x4: the compiler refuses it: INTERNAL: no such op$"):
        compiled.compile_job(job, "8x1", topology)


def refuse(_):
    raise jax.errors.JaxRuntimeError("INTERNAL: no\n  such op")
