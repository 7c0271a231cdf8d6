"""`python -m qwen35_jax.train` as a user meets it: killed, resumed, told to stop, given nonsense."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import qwen35_jax
from tests.forked import FAST, run_all

ROOT = Path(__file__).parents[2]
CONFIG = """
from tests.train.conftest import small_config

def get_config():
    data = dict(data__train=({chats!r},), data__eval=({chats!r},))
    return small_config(**data, steps=12, log_every=1, checkpoint__every=4, loss__mtp=0.0)
"""


@pytest.fixture
def start(tmp_path, chats):
    """Starts the command in a folder of the test; keyword arguments go to Popen."""
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(chats=str(chats)))

    def run(*arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "qwen35_jax.train", "--config", str(config), *arguments]
        return subprocess.Popen(
            command,
            cwd=tmp_path,
            env=os.environ | FAST | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    return out + err


def wait_for(process: subprocess.Popen, file: Path, text: str) -> None:
    deadline = time.monotonic() + 600
    while not (file.exists() and text in file.read_text()):
        assert process.poll() is None, process.stderr.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def lines(workdir: Path) -> list[dict]:
    """The metrics but for those of the clock."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in found]


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


@pytest.mark.end_to_end
def test_killed_and_stopped_runs_end_as_the_one_that_was_not(start, tmp_path):
    """SIGKILL between checkpoints, SIGTERM after that: metrics and weights are bitwise those of an undisturbed run."""
    said = finish(start("--workdir", "whole", "--export_hf", "whole_hf", "--profile", "trace"))
    assert "step 12/12" in said and "eval/loss" in said
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))

    process = start("--workdir", "cut", "--export_hf", "cut_hf")
    wait_for(process, tmp_path / "cut" / "metrics.jsonl", '"step": 6')
    process.kill()
    process.communicate()
    process = start("--workdir", "cut", "--export_hf", "cut_hf")
    wait_for(process, tmp_path / "cut" / "metrics.jsonl", '"step": 7')
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=600)
    assert "resumed from the checkpoint of step 4" in err
    if process.returncode != 0:  # it may have been done before the signal came
        assert process.returncode == 128 + signal.SIGTERM, err[-3000:]
        assert "stopped: SIGTERM after step" in err
        assert not (tmp_path / "cut_hf").exists()
        assert "resumed from the checkpoint of step" in finish(start("--workdir", "cut", "--export_hf", "cut_hf"))

    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert weights(tmp_path / "cut_hf") == weights(tmp_path / "whole_hf")
    lm = qwen35_jax.load(str(tmp_path / "whole_hf"), dtype="float32")
    assert lm.generate("Once", max_new_tokens=2, temperature=0)[0].token_ids


def test_a_run_that_diverges_stops_with_its_last_good_checkpoint(start, tmp_path):
    """Steps without a finite loss change nothing, so all checkpoints are good; between log lines, metrics have them too."""
    changes = ["--config.optimizer.learning_rate=1e30", "--config.optimizer.warmup_steps=0", "--config.log_every=100"]
    process = start("--workdir", "w", *changes, "--config.checkpoint.every=2", "--config.stop_after_skipped=3")
    _, err = process.communicate(timeout=600)
    last = err.strip().splitlines()[-1]
    assert process.returncode == 1 and last.startswith("error: 3 steps in a row had no finite loss or gradient"), err[-3000:]
    (step,) = re.findall(r"the last good checkpoint is of step (\d+)", last)
    assert (tmp_path / "w" / "checkpoints" / step).is_dir()
    skipped = {line["step"]: line["skipped"] for line in lines(tmp_path / "w")}
    assert list(skipped) == [2, 4, 5] and skipped[4] > skipped[2], skipped  # of the last steps too, behind no checkpoint


WRONG = [
    (["--config.step=3", "--workdir", "w"], "step"),
    (["--config.steps=0", "--workdir", "w"], "config.steps is 0; it must be at least 1"),
    ([], "--workdir is missing"),
    (["--workdir", ""], "--workdir is empty"),
    (["--workdir", "w", "--export_hf", ""], "--export_hf is empty"),
    (["--workdir", "config.py"], "config.py is a file; give a directory for the run"),
    (["--workdir", "s3://bucket/w"], "cannot read s3://bucket/w"),
    (["--config.data.train=('s3://bucket/*.jsonl',)", "--workdir", "w"], "cannot read s3://bucket/*.jsonl"),
    (["--config.data.train=(3,)", "--workdir", "w"], "config.data names 3"),
    (["--config.freeze=(3,)", "--workdir", "w"], "config.freeze: 3 is not a regular expression"),
    (["--config.loss.z=nan", "--workdir", "w"], "config.loss.z is nan"),
    (["--config.loss.balance=nan", "--workdir", "w"], "config.loss.balance is nan"),
    (["--config.seed=4294967296", "--workdir", "w"], "config.seed is 4294967296"),
    (["--config.fp8.hold=('mixer',)", "--workdir", "w"], "config.fp8.hold is about FP8 layers"),
    (["--config.checkpoint.keep_best=1", "--config.checkpoint.best_metric=mtp_loss", "--workdir", "w"], "has no such loss"),
    (["--config.steps=3", "--workdir", "w", "--profile", "trace"], "but 3 are left"),
    (["--config.lora.alpha=8", "--workdir", "w"], "set config.lora.rank"),
    (["--workdir", "w", "--export_step", "4"], "it needs --export_hf"),
    (["--workdir", "absent", "--export_step", "4", "--export_hf", "out"], "there is no directory absent"),
    (["--config.data.train=('nowhere.jsonl',)", "--workdir", "w"], "nowhere.jsonl"),
    (["--config.model.random_weights=false", "--workdir", "w"], "config.model.changes"),
    (["--config.freeze=('nothing_like_it',)", "--workdir", "w"], "nothing_like_it"),
    (["--config.mesh=3x1", "--workdir", "w"], "mesh"),
    (["--config", "nowhere.py", "--workdir", "w"], "no such file: nowhere.py"),
    (["--config", "syntax.py", "--workdir", "w"], "syntax.py line 1: invalid syntax"),
    (["--config", "field.py", "--workdir", "w"], '"stepz" does not exist'),
    (["--config.checkpoint.best_metric=accuracy", "--workdir", "w"], "config.checkpoint.best_metric is 'accuracy'"),
    (["--config.data.train=('bad.jsonl',)", "--workdir", "w"], "bad.jsonl:1: the line is not valid JSON"),
    (["--workdir", "w", "--export_hf", "."], "name a new directory"),
    (["--workdir", "w", "--hosts", "2"], "--hosts and --host belong to --coordinator"),
]


def test_wrong_input_is_one_line(tmp_path, chats):
    (tmp_path / "config.py").write_text(CONFIG.format(chats=str(chats)))
    (tmp_path / "syntax.py").write_text("def get_config(:")
    (tmp_path / "field.py").write_text(
        "from tests.train.conftest import small_config\n\ndef get_config():\n    return small_config(stepz=3)\n"
    )
    (tmp_path / "bad.jsonl").write_text("{\n")
    cases = [["--config", "config.py", *arguments] for arguments, _ in WRONG] + [["--workdir", "w"]]
    results = run_all("qwen35_jax.train.__main__", cases, tmp_path, **FAST)
    for done, (arguments, message) in zip(results, [*WRONG, (cases[-1], "--config is missing")], strict=True):
        assert done.returncode == 1, (arguments, done.stderr[-3000:])
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ") and message in last, (arguments, done.stderr)
        assert "compil" not in done.stderr, (arguments, done.stderr)  # it is said at once
        assert "Traceback" not in done.stderr and not done.stdout, (arguments, done.stderr)
