"""The README's Python runs as it stands there, and its commands have the flags that it names."""

from __future__ import annotations

import re
from pathlib import Path

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
