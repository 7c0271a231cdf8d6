"""What each launcher would start, for each job: the dry runs that tests/launch/golden holds. `python -m tests.launch.cases`
writes them anew, those of launch.xm where XManager is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.forked import ROOT, run_all

GOLDEN = Path(__file__).parent / "golden"
ASK = ["sample", "--checkpoint", "gs://bucket/model", "--prompt", "Why isn't the sky $(green)?"]
COPY = ["convert", "Qwen/Qwen3.5-4B", "gs://bucket/it's here"]
DATA = "--config.data.train=('gs://bucket/mine.jsonl',)"
TUNE = ["train", "--config", "configs/finetune.py", DATA, "--workdir", "gs://bucket/run"]
SLICES = {"v5p": ("v5p:2x2x4", "4x4"), "v6e": ("v6e:4x4", "2x8"), "tpu7x": ("tpu7x:2x2x4", "8x4"), "h100": ("h100:2x8", "2x8")}


def jobs(mesh: str) -> dict[str, list[str]]:
    return {"sample": [*ASK, "--mesh", mesh], "convert": COPY, "train": [*TUNE, f"--config.mesh={mesh}"]}


def gke_cases() -> dict[str, list[str]]:
    """Arguments of `python -m launch.gke` by golden file."""
    cases = {}
    for accelerator, (where, mesh) in SLICES.items():
        for job, words in jobs(mesh).items():
            more = ["--restarts", "5", "--spot", "--queue", "local-queue"] if job == "train" else []
            flags = ["--dry_run", "--slice", where, "--name", f"my-{job}", "--image", "registry/image:1", *more]
            cases[f"gke_{accelerator}_{job}.txt"] = [*flags, "--", *words]
    return cases


def script_cases() -> dict[str, list[str]]:
    """Words of the command lines of the scripts by golden file."""
    cases = {}
    for job, words in jobs("2x8").items():
        more = ["--restarts", "3"] if job == "train" else []
        tpu = ["launch/tpu_vm.sh", "--dry_run", "--name", f"my-{job}", "--zone", "us-east5-b", "--slice", "v6e:4x4"]
        slurm = ["launch/slurm.sh", "--dry_run", "--slice", "h100:2x8", "--partition", "gpu", "--time", "2:00:00"]
        cases[f"tpu_vm_{job}.txt"] = [*tpu, "--python", sys.executable, *(["--spot", *more] if more else []), "--", *words]
        cases[f"slurm_{job}.txt"] = [*slurm, "--python", sys.executable, *more, "--", *words]
    return cases


def xm_cases() -> dict[str, list[str]]:
    """Arguments of `python -m launch.xm` by golden file: on this machine, a sweep of two jobs of training; and on Vertex AI."""
    cases = {}
    vertex = ["--executor", "vertex", "--slice", "h100:8", "--image", "registry/image:1", "--project", "p", "--bucket", "b"]
    for job, words in jobs("2x4").items():
        sweep = ["--sweep", "config.seed=0,1"] if job == "train" else []
        cases[f"xm_local_{job}.txt"] = ["--dry_run", *sweep, "--", *words]
        cases[f"xm_vertex_{job}.txt"] = ["--dry_run", *vertex, "--", *words]
    return cases


def xm_outputs(home: str) -> dict[str, str]:
    """XManager keeps what it knows under `home`."""
    done = run_all("launch.xm", list(xm_cases().values()), ROOT, JAX_PLATFORMS="cpu", HOME=home)
    return {name: _text(result) for name, result in zip(xm_cases(), done, strict=True)}


def gke_outputs() -> dict[str, str]:
    done = run_all("launch.gke.__main__", list(gke_cases().values()), ROOT, JAX_PLATFORMS="cpu")
    return {name: _text(result) for name, result in zip(gke_cases(), done, strict=True)}


def script_output(words: list[str]) -> str:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TMPDIR": "/tmp"}
    return _text(subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment))


def _text(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout.replace(sys.executable, "PYTHON")


if __name__ == "__main__":
    outputs = gke_outputs() | {name: script_output(words) for name, words in script_cases().items()}
    if importlib.util.find_spec("xmanager"):
        with tempfile.TemporaryDirectory() as home:
            outputs |= xm_outputs(home)
    for name, text in outputs.items():
        (GOLDEN / name).write_text(text)
