"""A prompt of a million tokens, its sequence and cache cut over `data`: that the steps compile for a slice and fit, with nothing
gathered of the whole sequence but what `docs/scaling.md` counts."""

from __future__ import annotations

import pytest

from tests.aot.devices import TARGETS, needs_compiler
from tests.aot.run import Case, compile_elsewhere

MIB, GIB = 2**20, 2**30
TOKENS, CHUNK = 2**20, 2**16
LONG = {"rows": 1, "length": CHUNK, "capacity": TOKENS, "context_parallel": True}
# With the GiB of weights and state, and of temporaries, per chip: about a tenth above what was measured.
CASES = [
    (Case("v5p-64", "16x4", "35b-a3b", "prefill", **LONG), 2.8, 1.1),
    (Case("v5p-64", "16x4", "35b-a3b", "decode", **LONG), 3.1, 0.028),
    (Case("v5p-64", "16x4", "397b-a17b", "prefill", fp8=True, **LONG), 10.1, 1.33),
    (Case("v5p-64", "16x4", "397b-a17b", "decode", fp8=True, **LONG), 10.6, 0.34),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "arguments", "temporaries"), [pytest.param(*case, id=f"{case[0].model}-{case[0].step}") for case in CASES]
)
def test_a_million_tokens_fit(case, arguments, temporaries):
    needs_compiler(case.target)
    result = compile_elsewhere(case, timeout=1800)
    print({name: value for name, value in result.items() if name != "collectives"})
    assert result["argument_bytes"] < arguments * GIB
    assert result["temporary_bytes"] < temporaries * GIB
    assert result["total_bytes"] < 0.95 * TARGETS[case.target].hbm
    # Rows of a pass to their experts are fewer numbers than queries to the cache [chunk, N / 4, H], the outputs' sums in float32.
    if case.step == "prefill":
        widest = max(2 * result["hidden_size"], 4 * result["query_width"] // 4)
        assert max(size for kind, size, *_ in result["collectives"]) <= 1.1 * CHUNK * widest
