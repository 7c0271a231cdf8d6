"""A directory that is either complete or not there: work happens beside it, and one rename makes it appear.

Locally, `DST.partial/` holds the work and a lock; it is cleared by the next run if a run was killed, and removed by one
that failed. Object stores cannot rename: there DST itself is written, and the lock is an object that stands beside it
until it is complete (`open_source` refuses DST while it does). No store says whether the run that left a lock lives: the
one that does not find its own at the end fails and leaves a lock, so that what two wrote at once is not complete, and the
next run clears it. The lock's name also says that its directory is ours: a DST.partial that holds anything else is left
alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator

from etils import epath

from qwen35_jax.checkpoint.safetensors_file import is_local
from qwen35_jax.checkpoint.source import PARTIAL, check_directory
from qwen35_jax.errors import UserError, reachable

WORK = "checkpoint"
LOCK = "qwen35_jax.lock"
WRITTEN = re.compile(rf"{LOCK}|{WORK}(\.(partial_save|orbax-checkpoint-tmp).*)?")  # the last are Orbax's


@contextlib.contextmanager
def staging(destination: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a path (that does not exist yet) to write into; after the block its contents are at `destination`.

    After an exception nothing is at `destination`. UserError where something is there already or another run writes.
    A relative path is made absolute, and a link leads to what it names.
    """
    destination = check_destination(destination)
    stage = _local if is_local(destination) else _remote
    with stage(destination, _partial(destination)) as work:
        yield work


def check_destination(destination: epath.PathLike) -> epath.Path:
    """The path that `staging` writes to. UserError where something is there already that no killed run left."""
    destination = epath.Path(destination)
    if not destination.name or destination.name == "..":
        raise UserError(f"{destination} cannot be written: name a new directory")
    if is_local(destination):  # Orbax takes absolute paths only, and the rename is to meet no link
        destination = epath.Path(os.path.realpath(destination))
    with reachable(destination):
        there = check_directory(destination, "name a new directory") and any(destination.iterdir())
        if there and (is_local(destination) or not (_partial(destination) / LOCK).exists()):
            raise UserError(f"{destination} exists already; remove it or name another directory")
    return destination


def _partial(destination: epath.Path) -> epath.Path:
    return destination.parent / (destination.name + PARTIAL)


@contextlib.contextmanager
def _local(destination: epath.Path, partial: epath.Path) -> Iterator[epath.Path]:
    _claim(partial)
    with _locked(partial):
        try:
            _clear(partial)
            yield partial / WORK
            _flush(partial / WORK)
            os.rename(partial / WORK, destination)
            _flush_directory(destination.parent)
        except BaseException:
            _remove_for_good(partial)
            raise
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _remote(destination: epath.Path, partial: epath.Path) -> Iterator[epath.Path]:
    lock, owner = partial / LOCK, uuid.uuid4().hex
    text = f"{destination} is being written by run {owner}; it is not complete while this object exists\n"
    if lock.exists():
        for leftover in (destination, *destination.parent.glob(destination.name + ".partial_save*")):
            if leftover.exists():
                leftover.rmtree()
    _claim(partial)
    lock.write_text(text)
    yield destination  # after an exception the lock stays: what was written is not taken for a checkpoint
    if not lock.exists() or lock.read_text() != text:
        lock.write_text(text)  # so that the other run fails too
        raise UserError(f"another run wrote {destination} at the same time: end it, and run one of them again")
    partial.rmtree()


def _claim(partial: epath.Path) -> None:
    """Makes the working directory. UserError where what is there already was not made by a conversion."""
    if partial.exists() and not partial.is_dir():
        raise UserError(f"{partial} is in the way: it is a file, and a conversion works in a directory there; move it away")
    partial.mkdir(parents=True, exist_ok=True)
    names = sorted(p.name for p in partial.iterdir()) if partial.is_dir() else []  # object stores make no directories
    foreign = [name for name in names if LOCK not in names or not WRITTEN.fullmatch(name)]
    if foreign:
        raise UserError(f"{partial} is in the way: it holds {foreign[0]}, which no conversion put there; move it away")


@contextlib.contextmanager
def _locked(partial: epath.Path) -> Iterator[None]:
    """Holds the lock of a working directory; the system releases it when the process dies, however it does."""
    with open(partial / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another conversion is writing {partial}; wait for it") from None
        yield


def _remove_for_good(partial: epath.Path) -> None:
    """Removes the working directory after a failure, when writes that had begun may still make files in it."""
    absent = 0
    for _ in range(30):
        with contextlib.suppress(OSError):
            _clear(partial)  # the lock goes last: should this be killed, the next run knows the rest as ours
        shutil.rmtree(partial, ignore_errors=True)
        absent = 0 if partial.exists() else absent + 1
        if absent == 3:
            return
        time.sleep(0.1)


def _clear(partial: epath.Path) -> None:
    for leftover in partial.iterdir():
        if leftover.name != LOCK:
            leftover.rmtree() if leftover.is_dir() else leftover.unlink()


def _flush(directory: epath.Path) -> None:
    """Everything below the directory is on disk before the rename says that it is complete."""
    for root, _, files in os.walk(directory):
        for name in files:
            with open(os.path.join(root, name), "rb") as f:
                os.fsync(f.fileno())
        _flush_directory(root)


def _flush_directory(directory: epath.PathLike) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
