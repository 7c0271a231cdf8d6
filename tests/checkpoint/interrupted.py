"""Runs conversions that are killed, stopped or starved at chosen moments, each in a fork of this process.

Usage: interrupted.py SRC DST TO. Prints one line for each trial: what happened, whether DST was there afterwards; if it
was, it is moved to DST and a number for the caller to compare.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable

import jax
from absl import logging
from orbax.checkpoint import v1 as ocp

from qwen35_jax.checkpoint import conversion, orbax_writer, staging
from qwen35_jax.errors import UserError


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(module, name: str, count: int, then: Callable[[], None]) -> Callable[[], None]:
    """Prepares that the count-th call of module.name does `then` first."""

    def prepare():
        original, calls = getattr(module, name), [0]

        def patched(*args, **kwargs):
            calls[0] += 1
            if calls[0] == count:
                then()
            return original(*args, **kwargs)

        setattr(module, name, patched)

    return prepare


def after_rename_to(dst: str) -> Callable[[], None]:
    def prepare():
        original = os.rename

        def patched(src, to, **kwargs):
            original(src, to, **kwargs)
            if os.fspath(to) == dst:
                die()

        os.rename = patched

    return prepare


def after(seconds: float, number: int) -> Callable[[], None]:
    def prepare():
        threading.Thread(target=lambda: (time.sleep(seconds), os.kill(os.getpid(), number)), daemon=True).start()

    return prepare


def small_files() -> None:
    """As on a full disk: writing beyond 20 kB fails."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def trial(name: str, prepare: Callable[[], None], src: str, dst: str, to: str) -> None:
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            prepare()
            conversion.convert(src, dst, to, progress=False)
            status = 0
        except UserError as error:
            print(f"error: {error}", flush=True)
            status = 1
        except KeyboardInterrupt:
            status = 130
        except BaseException as error:
            print(f"traceback: {error!r}", flush=True)
            status = 2
        os._exit(status)
    _, status = os.waitpid(pid, 0)
    there = os.path.exists(dst)
    print(f"{name}: status {os.waitstatus_to_exitcode(status)}, dst {there}", flush=True)
    if there:
        os.rename(dst, f"{dst}{time.time_ns()}")


def main() -> None:
    src, dst, to = sys.argv[1:]
    jax.config.update("jax_platforms", "cpu")
    logging.set_verbosity(logging.ERROR)
    orbax_writer.GROUP_BYTES = orbax_writer.JOINED_BYTES = 40_000  # several saves even of a small model
    saves = [at_call(ocp.partial, "save", n, die) for n in (1, 2, 4)]
    files = [at_call(conversion, "write_safetensors", n, die) for n in (1, 2, 3)]
    trials = {f"kill at write {n}": prepare for n, prepare in enumerate(saves if to == "orbax" else files)}
    if to == "orbax":
        trials["kill at finalising"] = at_call(ocp.partial, "finalize", 1, die)
        trials["kill at the record"] = at_call(conversion, "Record", 1, die)
    trials["kill before the rename"] = at_call(staging, "_flush", 1, die)
    trials["kill after the rename"] = after_rename_to(dst)
    trials["kill in the middle"] = after(0.25, signal.SIGKILL)
    trials["kill later"] = after(0.6, signal.SIGKILL)
    trials["Ctrl-C"] = at_call(staging, "_flush", 1, lambda: os.kill(os.getpid(), signal.SIGINT))
    trials["full disk"] = small_files
    for name, prepare in trials.items():
        trial(name, prepare, src, dst, to)
    print(f"partial {os.path.exists(dst + '.partial')}")
    trial("again", lambda: None, src, dst, to)


if __name__ == "__main__":
    main()
