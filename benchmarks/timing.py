"""Times of functions that take turns, so that whatever slows the machine slows all."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import jax
from jax import lax

STEPS = 16  # of a program of `step_medians`


def calls_at_once() -> int:
    """Calls that one sample begins before it waits: on an accelerator so many that starting one hides behind the others."""
    return 1 if jax.default_backend() == "cpu" else 20


def medians(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of a call of each function over `rounds` samples, after two that are not counted."""
    calls = calls_at_once()
    seconds = {name: [] for name in functions}
    for _ in range(rounds + 2):
        for name, function in functions.items():
            begin = time.perf_counter()
            for _ in range(calls):
                last = function()
            jax.block_until_ready(last)
            seconds[name].append((time.perf_counter() - begin) / calls)
    return {name: statistics.median(times[2:]) for name, times in seconds.items()}


def step_medians(steps: dict[str, Callable], states: dict[str, object], rounds: int) -> dict[str, float]:
    """Median seconds of a step of each function from state to state, in place; `states` holds what each begins with.

    STEPS of them in one program, as layers and tokens follow each other: starting a program takes longer than a small step.
    """
    states = dict(states)
    programs = {
        name: jax.jit(lambda state, step=step: lax.fori_loop(0, STEPS, lambda _, s: step(s), state), donate_argnums=0)
        for name, step in steps.items()
    }

    def advance(name):
        states[name] = programs[name](states[name])
        return states[name]

    times = medians({name: functools.partial(advance, name) for name in programs}, rounds)
    return {name: seconds / STEPS for name, seconds in times.items()}
