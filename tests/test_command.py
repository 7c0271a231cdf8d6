"""What ends a command: an error of the user's, or a device without room, is one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CODE = """
import jax.numpy as jnp
from qwen35_jax import command
command.run(lambda arguments: jnp.zeros(2**50, "uint8").block_until_ready(), "usage")
"""


def test_a_device_without_room():
    command, root = [sys.executable, "-c", CODE], Path(__file__).parents[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, timeout=300)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]  # behind the allocator's own warning
    assert last.startswith("error: out of memory on a device (Out of memory allocating 1125899906842624 bytes")
