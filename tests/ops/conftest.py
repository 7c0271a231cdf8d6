"""The forms of an op."""

from __future__ import annotations

import jax
import pytest

from tests.ops.fp8_operands import TRACED_IN


@pytest.fixture(params=["cpu", "default"])
def form(request, monkeypatch):
    """The form of one platform, run here: FP8 products are slow on the CPU, and exact."""

    def choose(*args, default, **branches):
        return branches.get(request.param, default)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", choose)
    with TRACED_IN(request.param):
        yield request.param
