"""Runs the sample command once for each list of arguments, in forks of this process: importing JAX takes longer than they do.

Reads a JSON list of lists of arguments from stdin; prints a JSON list of [status, stdout, stderr].
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback

from qwen35_jax import command, sample


def run(arguments: list[str]) -> tuple[int, str, str]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        pid = os.fork()
        if pid == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            sys.argv[1:] = arguments
            status = 0
            try:
                command.run(sample.main, sample.USAGE)
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
    json.dump([run(arguments) for arguments in json.load(sys.stdin)], sys.stdout)
