"""The scripts, with programs of ours in place of gcloud, sbatch and srun: what they run, and what they do when it fails."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from launch.machines import GPU_ENVIRONMENT, TPU_ENVIRONMENT
from tests.forked import ROOT

# Writes its words down; fails at the n-th call whose words hold the text in $FAIL_AT, for n in $FAILURES.
FAKE = """#!/usr/bin/env bash
[[ "$*" != *" describe "* ]] || exit "${DESCRIBED:-1}"
printf '%s\\n' "$(basename "$0") $*" >> "$CALLS"
if [[ "$*" == *"$FAIL_AT"* ]]; then
  echo >> "$CALLS.count"
  [[ " $FAILURES " != *" $(wc -l < "$CALLS.count") "* ]] || exit 7
fi
"""
SBATCH = (
    FAKE
    + 'script=$(cat)\nfor restart in 0 1 2; do SLURM_JOB_ID=5 SLURM_RESTART_COUNT=$restart bash -c "$script" && break; done\n'
)


@pytest.fixture
def fake(tmp_path):
    """(directory for PATH, file of calls)"""
    for name in ("gcloud", "sbatch", "srun", "scontrol"):
        path = tmp_path / name
        path.write_text(SBATCH if name == "sbatch" else FAKE)
        path.chmod(0o755)
    return tmp_path


def start(fake, words: list[str], fail_at: str, failures: str, cwd: Path = ROOT) -> tuple[int, str, list[str]]:
    environment = {"PATH": f"{fake}:{os.environ['PATH']}", "CALLS": str(fake / "calls"), "TMPDIR": str(fake)}
    environment |= {"FAIL_AT": fail_at, "FAILURES": failures, "JAX_PLATFORMS": "cpu"}
    words = [words[0], "--python", sys.executable, *words[1:]]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=120, env=os.environ | environment)
    return done.returncode, done.stderr, (fake / "calls").read_text().splitlines()


TPU = ["launch/tpu_vm.sh", "--name", "a", "--zone", "z", "--slice", "v6e:4x4", "--spot"]
SAMPLE = ["--", "sample", "--mesh", "4x4"]


def verbs(calls: list[str]) -> list[str]:
    """create, scp, ssh (of the installation, then of the job), delete"""
    return [next(v for v in ("create", "delete", "scp", "ssh") if f"tpu-vm {v} " in call) for call in calls if "tpu-vm" in call]


def test_a_slice_that_is_taken_away_is_made_again(fake):
    status, errors, calls = start(fake, [*TPU, "--restarts", "2", *SAMPLE], "exec python", "1")
    once = ["create", "scp", "ssh", "ssh", "delete"]
    assert (status, verbs(calls)) == (0, once * 2) and "restart 1 of 2: the job ended with status 7" in errors
    assert sum("--spot" in call for call in calls) == 2


def test_what_fails_too_often_ends_with_its_status_and_deletes_the_slice(fake):
    status, errors, calls = start(fake, [*TPU, "--restarts", "1", *SAMPLE], "exec python", "1 2")
    assert status == 1 and errors.splitlines()[-1] == "error: the job ended with status 7"
    assert verbs(calls)[-1] == "delete" and verbs(calls).count("create") == 2


def test_a_slice_that_is_there_stays(fake):
    status, _, calls = start(fake, [*TPU[:-1], "--existing", *SAMPLE], "nothing fails", "")
    assert (status, verbs(calls)) == (0, ["scp", "ssh", "ssh"])


def test_a_slice_of_that_name_is_not_touched(fake, monkeypatch):
    monkeypatch.setenv("DESCRIBED", "0")
    (fake / "calls").touch()
    status, errors, calls = start(fake, [*TPU, *SAMPLE], "nothing fails", "")
    assert status == 1 and not calls and "a is there already: --existing uses it" in errors
    status, errors, calls = start(fake, [*TPU, "--existing", *SAMPLE], "nothing fails", "")
    assert status == 1 and not calls and "--spot is for a slice that is made" in errors


def test_a_slice_is_deleted_when_the_script_is_stopped(fake):
    (fake / "gcloud").write_text(FAKE + '[[ "$*" != *"exec python"* ]] || kill -TERM $PPID\n')
    status, _, calls = start(fake, [*TPU, "--restarts", "2", *SAMPLE], "nothing fails", "")
    assert status == 130 and verbs(calls) == ["create", "scp", "ssh", "ssh", "delete"]


def test_the_environment_is_that_of_the_containers(fake):
    """All of it but where Google's containers have the driver."""
    status, errors, calls = start(fake, [*TPU, *SAMPLE], "nothing fails", "")
    assert status == 0, errors
    assert f" {variables(TPU_ENVIRONMENT)} && exec python" in "\n".join(calls)
    said = " ".join(f"{name}=${name}" for name in GPU_ENVIRONMENT)
    (fake / "srun").write_text(f'#!/usr/bin/env bash\necho "{said}" >> "$CALLS"\n')
    words = ["launch/slurm.sh", "--slice", "h100:2x8", "--", "sample", "--mesh", "2x8"]
    status, errors, calls = start(fake, words, "nothing fails", "")
    assert (status, calls[-1]) == (0, variables(GPU_ENVIRONMENT)), errors


def variables(environment: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in environment.items())


def test_no_slice_is_made_of_a_checkout_that_cannot_be_packed(fake):
    (fake / "tar").write_text("#!/usr/bin/env bash\nexit 2\n")
    (fake / "tar").chmod(0o755)
    (fake / "calls").touch()
    status, errors, calls = start(fake, [*TPU, "--restarts", "2", *SAMPLE], "nothing fails", "")
    assert status == 1 and not calls and errors == "error: this checkout was not packed; no slice was made\n"


def test_deleted_files_are_left_out_of_the_archive(fake):
    """What git tracks and is not in the tree."""
    checkout = fake / "checkout"
    for path in ("launch", "qwen35_jax", "setup.py", "configs"):
        copy = shutil.copytree if (ROOT / path).is_dir() else shutil.copy
        (fake / "checkout").mkdir(exist_ok=True)
        copy(ROOT / path, checkout / path)
    (checkout / "a b\n'c").write_text("kept")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], cwd=checkout, check=True)
    (checkout / "configs" / "tiny.py").unlink()
    status, errors, calls = start(fake, [*TPU, *SAMPLE], "nothing fails", "", checkout)
    assert (status, verbs(calls)) == (0, ["create", "scp", "ssh", "ssh", "delete"]), errors
    with tarfile.open(fake / "a.tar.gz") as archive:
        names = archive.getnames()
    assert "a b\n'c" in names and "launch/tpu_vm.sh" in names and "configs/tiny.py" not in names


@pytest.mark.parametrize(
    ("words", "message"),
    [(TPU, "there is no gcloud here"), (["launch/slurm.sh", "--slice", "h100:2x8"], "there is no sbatch here")],
)
def test_an_absent_program_is_one_line(words, message, tmp_path):
    for name in ("bash", "env", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    words = [words[0], "--python", sys.executable, *words[1:], *SAMPLE]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, env={"PATH": str(tmp_path)})
    assert done.returncode == 1 and done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1, done.stderr


def test_a_prompt_of_several_lines(fake):
    """It reaches the host as it was: in the words of the ssh command, and of srun, where it is a word again."""
    prompt = "one\n\ntwo's\n"
    status, errors, calls = start(fake, [*TPU, *SAMPLE, "--prompt", prompt], "nothing fails", "")
    assert status == 0 and shlex.quote(prompt) in "\n".join(calls), (errors, calls)
    words = ["launch/slurm.sh", "--slice", "h100:2x8", "--", "sample", "--mesh", "2x8", "--prompt", prompt]
    status, errors, calls = start(fake, words, "nothing fails", "")
    assert status == 0 and f"--prompt {prompt}" in "\n".join(calls), (errors, calls)


def test_slurm_requeues_what_failed(fake):
    words = ["launch/slurm.sh", "--slice", "h100:2x8", "--restarts", "2", "--", "sample", "--mesh", "2x8"]
    status, errors, calls = start(fake, words, "qwen35_jax.sample", "1 2")
    assert status == 0, errors
    names = [call.split()[0] for call in calls]
    assert names == ["sbatch", "srun", "scontrol", "srun", "scontrol", "srun"]
    assert calls[2] == "scontrol requeue 5" and calls[1].endswith("-m qwen35_jax.sample --mesh 2x8 --coordinator auto")


@pytest.mark.parametrize("words", [TPU, ["launch/slurm.sh", "--slice", "h100:2x8"]])
def test_a_python_without_the_package(words, tmp_path):
    bare = tmp_path / "python"
    bare.write_text("#!/usr/bin/env bash\nexit 1\n")
    bare.chmod(0o755)
    words = [words[0], "--python", str(bare), "--dry_run", *words[1:], *SAMPLE]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {bare} has no qwen35_jax: install it"), done.stderr


def test_without_xmanager():
    program = "import sys; sys.modules['xmanager'] = None; import launch.xm"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith("error: launch.xm needs XManager"), done.stderr
    assert done.stderr.count("\n") == 1
