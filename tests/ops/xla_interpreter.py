"""TPU kernels' bodies as XLA programs, grid and all: for many calls, where the interpreter of TPU programs takes minutes."""

from __future__ import annotations

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen35_jax.ops.gated_delta import tpu_decode


def kernels_as_xla(monkeypatch) -> None:
    """In all threads. XLA on the CPU has no memory spaces, so that nothing is pinned to any."""
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    monkeypatch.setattr(pltpu, "HBM", jax.ShapeDtypeStruct)
    monkeypatch.setattr(tpu_decode, "_in_hbm", lambda x: x)
