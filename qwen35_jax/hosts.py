"""Several hosts that run one program: the flags of the commands, and the start. Each host is one process."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator

import jax
from absl import flags

from qwen35_jax import command
from qwen35_jax.compat import coordinator_host
from qwen35_jax.errors import UserError
from qwen35_jax.lifeline import Lifeline, end_without_waiting
from qwen35_jax.sharding import all_devices, parse_mesh

COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "several hosts: HOST:PORT of the first one, or auto where JAX finds it (TPU slices, Slurm, Kubernetes)"
)
HOSTS = flags.DEFINE_integer("hosts", None, "how many hosts there are, without auto", lower_bound=1)
HOST = flags.DEFINE_integer("host", None, "which one this is, from 0, without auto", lower_bound=0)
TIMEOUT = flags.DEFINE_integer(
    "host_timeout", 100, "seconds without a sign of life after which a host is dead", lower_bound=10, upper_bound=3600
)
_FLAGS = (COORDINATOR, HOSTS, HOST, TIMEOUT)
WAIT_SECONDS = 300.0  # for the other hosts


def declare_flags() -> None:
    """Makes --help of the calling command list the flags above."""
    for flag in _FLAGS:
        flags.declare_key_flag(flag.name)


@contextlib.contextmanager
def joined(mesh: str) -> Iterator[None]:
    """What is inside runs on the hosts that the flags name, if they do, together; to be entered before JAX is used.

    Only the first prints. Where one cannot go on, or dies, all end, each in a line that says which and why. Without
    accelerators each host that is told --hosts makes its even share of the virtual CPU devices of `mesh`. Raises
    UserError where the flags do not go together, the hosts cannot share the mesh, or nothing says who they are. Where they
    do not find one another in time the process ends, in one line.
    """
    _check()
    with contextlib.nullcontext() if COORDINATOR.value is None else _join(mesh):
        yield


def _join(mesh: str) -> contextlib.AbstractContextManager:
    """The connection to the others; nothing where there are none."""
    devices = 1
    for n in parse_mesh(mesh):
        devices *= n
    if HOSTS.value is not None:
        if devices % HOSTS.value:
            raise UserError(f"{HOSTS.value} hosts cannot share mesh {mesh} of {devices} devices evenly")
        jax.config.update("jax_num_cpu_devices", max(1, devices // HOSTS.value))
    address = None if COORDINATOR.value == "auto" else COORDINATOR.value
    waiting = threading.Timer(WAIT_SECONDS, _give_up)  # JAX itself would end the process with a stack trace, a little later
    waiting.start()
    try:
        # No local ids: a host has all its devices, also under Slurm, where JAX would give each process one.
        times = {"initialization_timeout": int(WAIT_SECONDS) + 60, "heartbeat_timeout_seconds": TIMEOUT.value}
        jax.distributed.initialize(address, HOSTS.value, HOST.value, local_device_ids=[], **times)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX notes it for who asks; a process that nobody asks would not end
        all_devices()  # which asks the other hosts for theirs
        _print_only_ours()
        host, count = jax.process_index(), jax.process_count()
        line = Lifeline(host, count, coordinator_host(), TIMEOUT.value) if count > 1 else contextlib.nullcontext()
    except (UserError, OSError):
        end_without_waiting()
        raise
    except (RuntimeError, ValueError) as error:
        if address is None and isinstance(error, ValueError):  # of a parameter that was neither given nor found
            text = "nothing here says where the hosts are, as a TPU slice, Slurm and Kubernetes do"
            raise UserError(f"--coordinator auto: {text}; give --coordinator HOST:PORT, --hosts and --host") from error
        end_without_waiting()
        raise UserError(f"the hosts did not come together at {COORDINATOR.value}: {str(error)[:200]}") from error
    finally:
        waiting.cancel()
    return line


def _print_only_ours() -> None:
    """What libraries print (Gloo does, on CPUs) goes to stderr, and what other hosts than the first print, nowhere."""
    ours = os.dup(1) if is_first() else os.open(os.devnull, os.O_WRONLY)
    os.dup2(2, 1)
    sys.stdout = open(ours, "w", encoding="utf-8", errors="backslashreplace")


def _give_up() -> None:
    command.complain(
        f"{WAIT_SECONDS:.0f} s have passed and not all hosts have come together at {COORDINATOR.value}: "
        "start the same command on every host, and let them reach that address"
    )
    os._exit(1)  # the thread that waits cannot be interrupted


def is_first() -> bool:
    """Whether this process is the one that prints."""
    return jax.process_index() == 0


def _check() -> None:
    numbers = HOSTS.value, HOST.value
    if COORDINATOR.value in (None, "auto"):
        if numbers != (None, None):
            raise UserError("--hosts and --host belong to --coordinator HOST:PORT")
        if COORDINATOR.value is None and flags.FLAGS[TIMEOUT.name].present:
            raise UserError("--host_timeout belongs to --coordinator")
    elif not re.fullmatch(r".*[^:]:[1-9]\d{0,4}", COORDINATOR.value) or int(COORDINATOR.value.rpartition(":")[2]) > 65535:
        raise UserError(f"--coordinator {COORDINATOR.value!r}: give HOST:PORT, with a port from 1 to 65535, or auto")
    elif None in numbers or HOST.value >= HOSTS.value:
        raise UserError(f"--coordinator {COORDINATOR.value} needs --hosts N and --host, 0 to N - 1")
