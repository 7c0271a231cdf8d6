"""One program on two hosts, here two processes: the same answer, said once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import jax
import pytest
from absl import flags
from absl.testing import flagsaver

from qwen35_jax import hosts
from qwen35_jax.errors import UserError
from tests.forked import FAST, ROOT


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def run(module: str, arguments: list[str], hosts: int = 1) -> list[tuple[int, str, str]]:
    """[status, stdout, stderr] of each host."""
    start = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    if hosts > 1:
        start += ["--coordinator", f"localhost:{free_port()}", "--hosts", str(hosts), "--host"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    commands = [[*start, str(host)] if hosts > 1 else start for host in range(hosts)]
    processes = [subprocess.Popen(command, cwd=ROOT, env=os.environ | FAST, **streams) for command in commands]
    texts = [process.communicate(timeout=400) for process in processes]
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def test_two_hosts_say_what_one_says():
    (status, out, errors), (other_status, other_out, other_errors) = run(
        "qwen35_jax.sample", ["--mesh", "2x1", "--stats"], hosts=2
    )
    assert (status, other_status) == (0, 0), errors + other_errors
    assert (out, other_out) == ("37 + 58 = 95\n", "")
    assert "decode:" in errors and "decode:" not in other_errors


CONFIG = """
from tests.train.conftest import small_config

def get_config():
    return small_config(data__train=({chats!r},), steps=3, mesh="2x1", loss__mtp=0.0)
"""


@pytest.mark.slow
def test_two_hosts_train_as_one_does(tmp_path):
    """To the bit, data and checkpoint included."""
    chats, config = tmp_path / "chats.jsonl", tmp_path / "config.py"
    chat = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One, two, three."}]
    chats.write_text("".join(json.dumps({"messages": chat[: 2 - i % 2] + chat}) + "\n" for i in range(40)))
    config.write_text(CONFIG.format(chats=str(chats)))
    weights = []
    for count in (1, 2):
        work, export = tmp_path / f"work{count}", tmp_path / f"export{count}"
        arguments = ["--config", str(config), "--workdir", str(work), "--export_hf", str(export)]
        done = run("qwen35_jax.train", arguments, count)
        assert [status for status, *_ in done] == [0] * count, done
        assert all(not out for _, out, _ in done[1:]) and "step 3/3" in done[0][1]
        weights.append((export / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("given", "mesh", "message"),
    [
        ({"hosts": 2}, "2x1", "belong to --coordinator"),
        ({"coordinator": "auto", "host": 0}, "2x1", "belong to --coordinator"),
        ({"coordinator": "here:1234", "hosts": 2}, "2x1", "needs --hosts N and --host"),
        ({"coordinator": "here:1234", "hosts": 2, "host": 2}, "2x1", "needs --hosts N and --host"),
        ({"coordinator": "here", "hosts": 2, "host": 0}, "2x1", "give HOST:PORT"),
        ({"coordinator": "here:1234", "hosts": 2, "host": 0}, "3x1", "2 hosts cannot share mesh 3x1"),
    ],
)
def test_flags_that_do_not_go_together(given, mesh, message):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"], known_only=True)
    with flagsaver.flagsaver(**given), pytest.raises(UserError, match=message):
        hosts.join(mesh)
    assert not jax.distributed.is_initialized()
