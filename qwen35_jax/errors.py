"""The exception that stands for wrong input rather than a bug; its form on hosts that have none; file systems out of reach."""

import contextlib
import os
import re
from collections.abc import Iterator


class UserError(ValueError):
    """Wrong input: the message is one line that says what was wrong, where, and what to do about it.

    Command lines print it as `error: …` and exit with status 1; a traceback is left for our own mistakes.
    """


class OtherHostError(UserError):
    """Another host has wrong input, and says what it is."""


@contextlib.contextmanager
def reachable(path: str | os.PathLike) -> Iterator[None]:
    """UserError where what is inside fails because the file system of the path cannot be reached, or lacks its package."""
    try:
        yield
    except UserError:
        raise
    except _kinds(path, ImportError, OSError, RuntimeError) as e:
        advice = "; install the extra: pip install -e '.[gcs]'" if isinstance(e, ImportError) else ""
        reason = (str(e).splitlines() or [type(e).__name__])[0][:200]
        raise UserError(f"cannot read {path}: {reason}{advice}") from None


@contextlib.contextmanager
def writable(path: str | os.PathLike, *more: type[Exception]) -> Iterator[None]:
    """UserError where what is inside fails because the path cannot be written. `more`: what says so there besides OSError."""
    try:
        yield
    except UserError:
        raise
    except _kinds(path, OSError, *more) as e:
        raise UserError(f"could not write {path}: {_reason(e)}") from e


def _kinds(path: str | os.PathLike, *local: type[Exception]) -> tuple[type[Exception], ...]:
    """What file systems raise: behind gs:// are clients with exceptions of their own, such as gcsfs's HttpError."""
    return (Exception,) if "://" in os.fspath(path) else local


def _reason(error: Exception) -> str:
    code = re.search(r"os_error_code='(\d+)'", str(error))  # as TensorStore has it
    number = int(code[1]) if code else error.errno if isinstance(error, OSError) else None
    text = os.strerror(number) if number else str(error)
    return " ".join(text.split())[:300] or type(error).__name__
