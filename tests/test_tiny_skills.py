"""What the packaged model is said to do, it does: the benchmark on held-out cases against its targets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_packaged_model_reaches_its_targets():
    command = [sys.executable, "-m", "benchmarks.tiny_skills", "--json", "--cases", "128"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    skills = json.loads(done.stdout)["skills"]
    assert {"sum", "copy", "fact in new words", "tool call and answer", "count to five", "direction of motion"} <= set(skills)
    missed = {name: row for name, row in skills.items() if row["percent"] < row["target"]}
    assert not missed
