"""Compilers that crash take their process along: a plan is made in a fork of it, and who waits says what happened."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import warnings

from qwen35_jax.errors import UserError

PR_SET_PDEATHSIG = 1


def go_on_in_a_fork(what: str) -> None:
    """Returns in a fork of this process, before JAX has started a thread. This process waits for it, passes SIGTERM on, and exits
    as it does; UserError where a signal has ended it, with `what` it was about."""
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX warns of every fork
        child = os.fork()
    if child == 0:
        with contextlib.suppress(AttributeError, OSError):  # Linux alone: it does not outlive who waits for it
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the fork too, which says so
    signal.signal(signal.SIGTERM, lambda number, _: os.kill(child, number))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status in (-signal.SIGTERM, -signal.SIGKILL):  # somebody's, or the system's for want of memory
        raise UserError(f"{what} was ended by signal {-status} ({signal.strsignal(-status)})")
    if status < 0:
        text = f"{what}: the compiler crashed with signal {-status} ({signal.strsignal(-status)})"
        raise UserError(f"{text}; another --mesh or JAX may do, and --compile 0 estimates without it")
    raise SystemExit(status)
