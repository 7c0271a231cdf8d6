"""The steps of generation, compiled by the TPU and GPU compilers for devices that are not there: that they compile, fit
into the memory, need no unexpected temporaries, and exchange what they should between devices and nothing else."""

from __future__ import annotations

import collections
import importlib.util

import pytest

from tests.aot.devices import TARGETS
from tests.aot.run import Case, compile_elsewhere

MIB = 2**20
NEEDS = {"tpu": "libtpu", "cuda": "jax_cuda13_plugin"}

EIGHT_DEVICES = ("v5e", "v6e", "v5p", "tpu7x", "h100", "h200")
CASES = [
    *(Case(target, "2x4", "0.8b", step, length=128) for target in EIGHT_DEVICES for step in ("decode", "prefill")),
    *(Case(target, "2x4", "35b-a3b", "decode") for target in EIGHT_DEVICES),
    *(Case(target, "2x4", "35b-a3b", "prefill", length=128) for target in ("v5e", "v5p", "h100")),
    Case("v5p-64", "4x16", "397b-a17b", "decode"),
    Case("h200", "2x4", "397b-a17b", "decode"),
    Case("h100-2", "4x4", "397b-a17b", "decode"),
    Case("h100", "1x8", "397b-a17b", "decode", fp8=True),
]

# MiB of temporaries per device. A decode step needs about one unit's weights and cache; what tpu7x needs on top are the
# weights in its own tiling, copied once per call of 64 tokens.
TEMPORARIES = {
    ("0.8b", "decode"): 40,
    ("0.8b", "prefill"): 80,
    ("35b-a3b", "decode"): 1900,
    ("35b-a3b", "prefill"): 1900,
    ("397b-a17b", "decode"): 1300,
}
TPU7X_TEMPORARIES = {("0.8b", "decode"): 520, ("0.8b", "prefill"): 220, ("35b-a3b", "decode"): 5200}


def _name(case: Case) -> str:
    return f"{case.model}-{case.step}-{case.target}-{case.mesh}{'-fp8' if case.fp8 else ''}"


def _expected(case: Case, experts: bool, layers: int) -> dict[str, int]:
    """The most collectives of at least one activation's size that the step may have: one all-reduce after each mixer
    and each MLP of a unit and one after the embedding; with experts an all-gather and a reduce-scatter (or its
    all-reduce form) of each MLP's tokens over `data`."""
    if not experts:
        return {"all-reduce": 2 * layers + 1}
    return {"all-reduce": 3 * layers + 1, "all-gather": layers, "reduce-scatter": layers}


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_compiles(case):
    target = TARGETS[case.target]
    if importlib.util.find_spec(NEEDS[target.platform]) is None:
        pytest.skip(f"{NEEDS[target.platform]} is not installed: pip install -e '.[test,aot]'")
    result = compile_elsewhere(case, timeout=900)
    summary = {k: v for k, v in result.items() if k != "collectives"}
    print(_name(case), summary)
    assert result["total_bytes"] < target.hbm * 0.95, summary
    ceilings = TPU7X_TEMPORARIES if case.target == "tpu7x" else TEMPORARIES
    assert result["temporary_bytes"] < ceilings[case.model, case.step] * MIB, summary
    _check_collectives(case, result)


def _check_collectives(case: Case, result: dict):
    """Nothing as large as one activation but what is expected, and nothing larger than all tokens' activations."""
    hidden, experts, layers = result["hidden_size"], result["experts"], result["unit_layers"]
    *replica, data, _ = (int(n) for n in case.mesh.split("x"))
    tokens = case.rows * (case.length if case.step == "prefill" else 1)
    activation = tokens // (data * (replica[0] if replica else 1)) * hidden * 2
    large = [c for c in result["collectives"] if c[1] >= activation]
    found = collections.Counter(kind for kind, *_ in large)
    expected = _expected(case, experts > 0, layers)
    assert all(count <= expected.get(kind, 0) for kind, count in found.items()), (found, expected, large)
    assert max(size for _, size, *_ in large) <= 1.1 * tokens * hidden * 2, large
