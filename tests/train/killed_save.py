"""Saves checkpoints 1 and 2 of a state of many arrays; the caller kills this process in the middle of the second.

Usage: killed_save.py WORKDIR. Prints "complete" after the first and "saving" once the second has begun.
"""

from __future__ import annotations

import sys

import jax

from qwen35_jax.train.checkpoints import Checkpoints
from tests.train.test_checkpoints import many_arrays


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    checkpoints = Checkpoints(sys.argv[1], every=1, keep_last=1)
    checkpoints.save(1, many_arrays(1), {"line": 1}, {})
    checkpoints.wait()
    print("complete", flush=True)
    checkpoints.save(2, many_arrays(2), {"line": 2}, {})
    print("saving", flush=True)
    checkpoints.wait()
    print("finished", flush=True)


if __name__ == "__main__":
    main()
