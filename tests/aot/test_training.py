"""A whole training step compiled for the slice that it is meant for: FP8 layers must save memory there, not only on paper."""

from __future__ import annotations

import dataclasses

import pytest

from tests.aot.devices import needs_compiler
from tests.aot.run import Case, compile_elsewhere

GIB = 2**30
STEP = Case("v5p-64", "64x1", "35b-a3b", "train", rows=64, length=4096)  # one sequence a chip, remat full, AdamW


@pytest.mark.slow
def test_fp8_takes_fewer_temporaries_than_bfloat16():
    needs_compiler("v5p-64")
    found = {}
    for fp8 in (False, True):  # one after the other: each compilation takes 11 GiB
        result = compile_elsewhere(dataclasses.replace(STEP, fp8=fp8), timeout=3000)
        found[fp8] = result["temporary_bytes"]
        print(f"fp8 {fp8}: {found[fp8] / GIB:.2f} GiB, compiled in {result['compile_seconds']} s")
    print(f"ratio {found[True] / found[False]:.3f}")
    assert found[True] < found[False]
