"""The exception that stands for wrong input rather than a bug; its form on hosts that have none; file systems out of reach."""

import contextlib
import os
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
    except (ImportError, OSError, RuntimeError) as e:
        advice = "; install the extra: pip install -e '.[gcs]'" if isinstance(e, ImportError) else ""
        reason = (str(e).splitlines() or [type(e).__name__])[0][:200]
        raise UserError(f"cannot read {path}: {reason}{advice}") from None
