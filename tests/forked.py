"""Runs a command once for each list of arguments, in forks of one process: importing JAX takes longer than they do.

`python -m tests.forked qwen35_jax.sample` reads a JSON list of lists of arguments from stdin and prints a JSON list of
[status, stdout, stderr].
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import jax

from qwen35_jax import command

ROOT = Path(__file__).parents[1]
# As in conftest.py, for commands that compile more than they run.
FAST = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.01",
    "JAX_PLATFORMS": "cpu",
}
if jax.__version_info__ < (0, 11):
    FAST["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def run_all(module: str, cases: list[list[str]], cwd: Path, **env: str) -> list[subprocess.CompletedProcess]:
    """`python -m module` with the arguments of each case."""
    program = [sys.executable, "-W", "ignore", "-m", "tests.forked", module]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | env
    done = subprocess.run(program, input=json.dumps(cases), capture_output=True, text=True, timeout=400, cwd=cwd, env=env)
    assert done.returncode == 0, done.stderr
    results = zip(cases, json.loads(done.stdout), strict=True)
    return [subprocess.CompletedProcess(case, *result) for case, result in results]


def run(module, arguments: list[str]) -> tuple[int, str, str]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        pid = os.fork()
        if pid == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            sys.argv[1:] = arguments
            status = 0
            try:
                command.run(module.main, module.USAGE)
            except SystemExit as stop:
                status = stop.code
            except BaseException:
                traceback.print_exc()
                status = 3
            sys.stdout.flush()
            os._exit(status)
        _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status), *(_text(file) for file in (out, errors))


def _text(file) -> str:
    file.seek(0)
    return file.read().decode()


if __name__ == "__main__":
    imported = importlib.import_module(sys.argv[1])
    json.dump([run(imported, arguments) for arguments in json.load(sys.stdin)], sys.stdout)
