"""One program on two hosts, here two processes: the same answer, said once."""

from __future__ import annotations

import os
import socket
import subprocess

import jax
import pytest
from absl import flags
from absl.testing import flagsaver

from qwen35_jax import hosts
from qwen35_jax.errors import UserError
from tests.forked import FAST
from tests.test_sample import ROOT, command


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start(host: int, port: int, *arguments: str) -> subprocess.Popen:
    flags = ("--coordinator", f"localhost:{port}", "--hosts", "2", "--host", str(host))
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command(*flags, *arguments), cwd=ROOT, env=os.environ | FAST, **streams)


def test_two_hosts_say_what_one_says():
    port = free_port()
    processes = [start(i, port, "--mesh", "2x1", "--stats") for i in (0, 1)]
    (out, errors), (other_out, other_errors) = (p.communicate(timeout=400) for p in processes)
    assert [p.returncode for p in processes] == [0, 0], errors + other_errors
    assert (out, other_out) == ("37 + 58 = 95\n", "")
    assert "decode:" in errors and "decode:" not in other_errors


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
