"""One program on two hosts, here two processes: the same answer, said once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from etils import epath

from qwen35_jax import hosts
from qwen35_jax.checkpoint.safetensors_file import SafetensorsFile
from qwen35_jax.errors import UserError
from tests.forked import FAST, ROOT


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def run(module: str, arguments: list[str], hosts: int = 1) -> list[tuple[int, str, str]]:
    """[status, stdout, stderr] of each host."""
    commands = [[sys.executable, "-W", "ignore", "-m", module, *arguments] for _ in range(hosts)]
    port = free_port()
    if hosts > 1:
        commands = [[*command, *flags_of(port, host, hosts)] for host, command in enumerate(commands)]
    return run_all(commands)


def flags_of(port: int, host: int, hosts: int = 2) -> list[str]:
    return ["--coordinator", f"localhost:{port}", "--hosts", str(hosts), "--host", str(host)]


def run_all(commands: list[list[str]]) -> list[tuple[int, str, str]]:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=ROOT, env=os.environ | FAST, **streams) for command in commands]
    try:
        texts = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


@pytest.mark.end_to_end
def test_two_hosts_say_what_one_says():
    questions = ("What is 37 + 58?", "Reverse: a b c")
    arguments = ["--mesh", "1x2", "--stats", "--dtype", "float32", *(f"--prompt={question}" for question in questions)]
    (status, out, errors), (other_status, other_out, other_errors) = run("qwen35_jax.sample", arguments, hosts=2)
    assert (status, other_status) == (0, 0), errors + other_errors
    answers = zip(questions, ("37 + 58 = 95", "c b a"), strict=True)
    assert out == "".join(f"--- {i} of 2: {question}\n{answer}\n" for i, (question, answer) in enumerate(answers, 1))
    assert other_out == "" and "decode:" in errors and "decode:" not in other_errors


TRAIN = ["train", "--config", "configs/finetune_tiny.py", "--config.mesh=2x1"]


@pytest.mark.parametrize(
    ("command", "right", "wrong"),
    [
        (["sample", "--mesh", "2x1"], [], ["--checkpoint", "nowhere/at/all"]),
        (TRAIN, ["--config.data.train=('README.md',)"], ["--config.data.train=('nowhere/at/all',)"]),
    ],
)
def test_what_stops_one_host_stops_the_other(command, right, wrong, tmp_path):
    port, work = free_port(), ["--workdir", str(tmp_path / "work")] if command is TRAIN else []
    program = [sys.executable, "-m", f"qwen35_jax.{command[0]}", *command[1:], *work]
    done = run_all([[*program, *(right, wrong)[host], *flags_of(port, host)] for host in (0, 1)])
    assert [status for status, *_ in done] == [1, 1], done
    first, other = (errors.splitlines()[-1] for _, _, errors in done)
    assert first.startswith("error: host 1 of 2 (") and "cannot go on: " in first and "nowhere/at/all" in first
    assert other.startswith("error: ") and "nowhere/at/all" in other
    assert "Traceback" not in done[0][2] + done[1][2]


def test_a_bad_line_in_the_file_of_one_host_ends_both(config, tmp_path):
    """After both have begun: only one of them finds it, the other waits for it in a collective."""
    lines = (tmp_path / "chats.jsonl").read_text().splitlines(keepends=True)
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join("x" * (len(line) - 1) + "\n" for line in lines))
    port, program = free_port(), [sys.executable, "-W", "ignore", "-m", "qwen35_jax.train", "--config", config]
    work, files = ["--workdir", str(tmp_path / "work")], [[], [f"--config.data.train=('{bad}',)"]]
    done = run_all([[*program, *work, *files[host], *flags_of(port, host)] for host in (0, 1)])
    assert [status for status, *_ in done] == [1, 1], done
    first, other = (errors.splitlines()[-1] for _, _, errors in done)
    assert first.startswith("error: host 1 of 2 (") and "bad.jsonl:" in first and "bad.jsonl:" in other, done
    assert "Traceback" not in done[0][2] + done[1][2]


ALONE = (
    "import sys; from qwen35_jax import command, hosts, sample; hosts.WAIT_SECONDS = 3.0; command.run(sample.main, sample.USAGE)"
)


def test_a_host_that_waits_in_vain_says_so():
    commands = [[sys.executable, "-c", ALONE, "--mesh", "2x1", *flags_of(free_port(), host)] for host in (0, 1)]
    for status, out, errors in run_all(commands):
        assert (status, out) == (1, ""), errors
        assert errors.splitlines()[-1].startswith("error: 3 s have passed and not all hosts have come together"), errors
        assert "Traceback" not in errors


CONFIG = """
from tests.train.conftest import small_config

def get_config():
    return small_config(data__train=({chats!r},), steps=3, mesh="2x1", loss__mtp=0.0, log_every=1)
"""


@pytest.fixture
def config(tmp_path):
    """A small run on 40 chats."""
    chats, path = tmp_path / "chats.jsonl", tmp_path / "config.py"
    chat = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One, two, three."}]
    chats.write_text("".join(json.dumps({"messages": chat[: 2 - i % 2] + chat}) + "\n" for i in range(40)))
    path.write_text(CONFIG.format(chats=str(chats)))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "hosts"), [("2x1", 2), ("1x2", 2), ("4x1", 4), ("2x2", 4)])
def test_several_hosts_train_as_one_does(config, mesh, hosts, tmp_path):
    """Whether each host has some of the rows or a part of the model, data and checkpoint included.

    Two hosts to the bit. Four add their parts of a sum in another order than one process does, so that a float32 weight
    differs in its last digits, and few of the exported bfloat16 numbers are rounded to the other side.
    """
    exports = []
    for count in (1, hosts):
        work, export = tmp_path / f"work{count}", tmp_path / f"export{count}"
        arguments = ["--config", config, f"--config.mesh={mesh}", "--workdir", str(work), "--export_hf", str(export)]
        done = run("qwen35_jax.train", arguments, count)
        assert [status for status, *_ in done] == [0] * count, done
        assert all(not out for _, out, _ in done[1:]) and "step 3/3" in done[0][1]
        exports.append(SafetensorsFile(epath.Path(export) / "model.safetensors"))
    one, several = (np.concatenate([file.read(name).ravel() for name in file.tensors]) for file in exports)
    differences = np.abs(one.astype(np.float32) - several.astype(np.float32))
    if hosts == 2:
        assert not differences.any()
    else:  # three steps move a weight by 1e-2
        assert np.mean(differences > 0) < 1e-4 and differences.max() < 1e-3, (np.mean(differences > 0), differences.max())


def start(arguments: list[str]) -> list[subprocess.Popen]:
    """Training on two hosts."""
    port, streams = free_port(), {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    program = [sys.executable, "-W", "ignore", "-m", "qwen35_jax.train", *arguments]
    return [subprocess.Popen([*program, *flags_of(port, h)], cwd=ROOT, env=os.environ | FAST, **streams) for h in (0, 1)]


def wait_for(path, text: str, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 400
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.02)


def metrics(workdir) -> list[dict]:
    """All but those of the clock."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "second" not in name} for line in found]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_host_ends_the_other_and_the_run_goes_on_bit_for_bit(config, killed, tmp_path):
    """SIGKILL to one of two hosts, between two checkpoints: the other says so in one line. Both again end as one host does."""
    arguments = ["--config", config, "--config.steps=16", "--config.checkpoint.every=4"]
    work = tmp_path / "work"
    processes = start([*arguments, "--workdir", str(work)])
    try:
        wait_for(work / "metrics.jsonl", '"step": 6,', processes)
        processes[killed].kill()
        errors = processes[1 - killed].communicate(timeout=60)[1]
    finally:
        for process in processes:
            process.kill()
    assert processes[1 - killed].returncode == 1, errors
    dead = "host 1 of 2 (" if killed else "the first host (localhost)"
    (line,) = (line for line in errors.splitlines() if line.startswith("error:"))
    assert line.startswith(f"error: {dead}") and "has gone without a word" in line and "Traceback" not in errors, errors
    exports = [tmp_path / name for name in ("resumed", "whole")]
    for directory, export, count in zip((work, tmp_path / "other"), exports, (2, 1), strict=True):
        done = run("qwen35_jax.train", [*arguments, "--workdir", str(directory), "--export_hf", str(export)], count)
        assert [status for status, *_ in done] == [0] * count, done
        assert ("resumed from the checkpoint of step" in done[0][2]) == (directory is work)
    weights = [(export / "model.safetensors").read_bytes() for export in exports]
    assert weights[0] == weights[1]
    # The losses of all steps too: the export is in bfloat16, and they follow from float32 weights and moments.
    curves = [metrics(directory) for directory in (work, tmp_path / "other")]
    assert [line["step"] for line in curves[0]] == list(range(1, 17)) and curves[0] == curves[1]


@pytest.mark.slow
def test_a_signal_to_one_host_stops_both_after_one_step(config, tmp_path):
    """Most likely in an evaluation, which both leave at the same batch."""
    work, files = tmp_path / "work", (str(tmp_path / "chats.jsonl"),) * 20
    evaluation = [f"--config.data.eval={files}", "--config.eval_every=1"]
    processes = start(["--config", config, *evaluation, "--config.steps=100000", "--workdir", str(work)])
    try:
        wait_for(work / "metrics.jsonl", '"step": 3,', processes)
        processes[1].send_signal(signal.SIGTERM)
        errors = [process.communicate(timeout=100)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2, errors
    last = [error.strip().splitlines()[-1] for error in errors]
    assert last[0] == last[1] and last[0].startswith("stopped: SIGTERM after step"), errors
    (saved,) = (path.name for path in (work / "checkpoints").iterdir() if path.name.isdigit())
    assert f"after step {saved};" in last[0]


@pytest.mark.parametrize(
    ("given", "mesh", "message"),
    [
        ({"hosts": 2}, "2x1", "belong to --coordinator"),
        ({"coordinator": "auto", "host": 0}, "2x1", "belong to --coordinator"),
        ({"coordinator": "here:1234", "hosts": 2}, "2x1", "needs --hosts N and --host"),
        ({"coordinator": "here:1234", "hosts": 2, "host": 2}, "2x1", "needs --hosts N and --host"),
        *(
            ({"coordinator": c, "hosts": 2, "host": 0}, "2x1", "give HOST:PORT")
            for c in ("here", "here:a", ":9", "a:0", "a:70000")
        ),
        ({"coordinator": "here:1234", "hosts": 2, "host": 0}, "3x1", "2 hosts cannot share mesh 3x1"),
    ],
)
def test_flags_that_do_not_go_together(given, mesh, message):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"], known_only=True)
    with flagsaver.flagsaver(**given), pytest.raises(UserError, match=message), hosts.joined(mesh):
        pass
    assert not jax.distributed.is_initialized()
