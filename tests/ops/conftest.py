"""The forms of an op."""

from __future__ import annotations

import jax
import pytest

_traced_in = []  # the form of the test before, "" where it had none


@pytest.fixture(params=["cpu", "default"])
def form(request, monkeypatch):
    """The form of one platform, run here: FP8 products are slow on the CPU, and exact."""

    def choose(*args, default, **branches):
        return branches.get(request.param, default)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", choose)
    return request.param


@pytest.fixture(autouse=True)
def forms_apart(request):
    """What was traced in one form would be used again in another for the same shapes."""
    now = request.getfixturevalue("form") if "form" in request.fixturenames else ""
    if _traced_in != [now]:
        jax.clear_caches()
        _traced_in[:] = [now]
