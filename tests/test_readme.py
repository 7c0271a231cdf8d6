"""The README's Python runs as it stands there, and its commands have the flags that it names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import ROOT

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_python_example():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["logits"].shape == (1, 4, names["lm"].config.vocab_size)
    assert len(names["completion"].token_ids) == 32 or names["completion"].finish_reason == "stop"


def test_flags_of_the_commands_exist():
    lines = [line for line in README.splitlines() if re.search(r"-m qwen35_jax\.(sample|convert|train|plan) ", line)]
    assert len(lines) >= 13
    for line in lines:
        module = re.search(r"-m qwen35_jax\.(sample|convert|train|plan)", line).group(1)
        files = ["train/__main__.py" if module == "train" else f"{module}.py"]
        files += ["hosts.py"] if module in ("sample", "train") else []
        source = "".join((Path(__file__).parents[1] / "qwen35_jax" / file).read_text(encoding="utf-8") for file in files)
        for flag in re.findall(r"--(\w+)", line.split(f"qwen35_jax.{module}", 1)[1]):
            defined = rf'DEFINE_\w+\([^"]*"{flag}"'  # the first text in it
            assert re.search(defined, source), f"README: {module} has no flag --{flag}"


@pytest.mark.slow
def test_five_minutes_on_a_laptop(tmp_path):
    """The recipe as it stands there, in an empty folder but for the config: before it the model has no idea, then it knows."""
    section = README.split("### Five minutes on a laptop")[1].split("\n## ")[0]
    data, commands = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    words = {"args": ["bash", "-c", f"set -e\n{data}\n{commands}"], "cwd": tmp_path, "env": environment}
    done = subprocess.run(**words, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    before, *_, after = done.stdout.strip().splitlines()
    assert "frog" not in before and after == "The green password is frog.", done.stdout
