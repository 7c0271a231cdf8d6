"""SIGTERM and SIGINT end a run after a step, and all hosts after the same one, whichever of them the signal came to."""

from __future__ import annotations

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class StopSignal:
    """Takes the two signals while it is open (a context manager). A second one ends the process at once.

    All processes make it on the same mesh, and call `came` and `number` at the same points of the run.
    """

    def __init__(self, mesh: Mesh):
        self._told = 0
        self._alone = jax.process_count() == 1
        self._place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._asked: jax.Array | None = None  # what the hosts were told before the last step

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def came(self) -> bool:
        """Whether to stop. Several hosts learn it a call later, so that no step waits for the exchange. Once true it stays so."""
        if self._alone:
            return self._told > 0
        before, self._asked = self._asked, self._ask()
        return before is not None and int(before) > 0

    def number(self) -> int:
        """The signal that has come, the largest of all hosts'; 0: none. Waits for the other hosts."""
        return self._told if self._alone else int(self._ask())

    def _ask(self) -> jax.Array:
        told = np.full(self._place.mesh.size, self._told, np.int32)
        return self._largest(jax.make_array_from_callback(told.shape, self._place, lambda index: told[index]))

    def _note(self, number: int, frame) -> None:
        self._told = number
        signal.signal(number, self._before[number])
        name = signal.Signals(number).name
        os.write(2, f"{name}: the run saves its state and ends after this step; once more ends it at once\n".encode())
