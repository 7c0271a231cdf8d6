"""The vision tower, compiled by the TPU compiler for chips that are not there."""

from __future__ import annotations

import importlib.util

import pytest

from tests.aot.devices import TARGETS
from tests.aot.run import Case, compile_elsewhere

MIB = 2**20


@pytest.mark.slow
def test_tower():
    """A picture of 4096 x 4096, 65,536 patches, on each of eight chips. Their number does not divide the 12 heads: every chip
    holds the tower and works on a row of its own, without a word to the others. 676 MiB of temporaries with jax 0.10.2."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install -e '.[test,aot]'")
    result = compile_elsewhere(Case("v5e", "1x8", "0.8b", "vision", length=65536), timeout=900)
    print({k: v for k, v in result.items() if k != "collectives"})
    assert result["temporary_bytes"] < 1024 * MIB and result["total_bytes"] < TARGETS["v5e"].hbm
    assert not result["collectives"]
