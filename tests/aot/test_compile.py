"""The steps of generation, compiled by the TPU and GPU compilers for devices that are not there: that they compile, fit
into the memory, need no unexpected temporaries, and exchange what they should between devices and nothing else."""

from __future__ import annotations

import collections
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests.aot.devices import TARGETS, needs_compiler
from tests.aot.run import SETTINGS, Case, compile_elsewhere, of_this_jax

MIB = 2**20

# The ceilings after each case are MiB of temporaries per device, about a tenth above what was measured: with jax 0.10.2,
# and with 0.12 where that differs: on GPUs it has our kernels. A step needs about a unit's weights and activations; the rest
# are weights that XLA copies into another tiling once per call, of which tpu7x does most.
# The README's lines, with one prompt (and the rows that fill `data` up).
README = [  # with the ceilings of decode and of prefill
    (("v5e", "1x8", "9b"), 1, (4,), (4,)),
    (("v5p-4", "1x4", "35b-a3b"), 1, (175,), (185,)),
    (("h100", "2x4", "122b-a10b"), 2, (472, 42), (550, 295)),
    (("h100-2", "2x2x4", "122b-a10b"), 4, (472, 42), (550, 295)),
]
CASES = [
    (Case("v5e", "2x4", "0.8b", "decode"), 6),
    (Case("v6e", "2x4", "0.8b", "decode"), 22),
    (Case("v5p", "2x4", "0.8b", "decode"), 125),
    (Case("tpu7x", "2x4", "0.8b", "decode"), 510),
    (Case("h100", "2x4", "0.8b", "decode"), 30, 12),
    (Case("v5e", "2x4", "0.8b", "prefill", length=128), 6),
    (Case("h100", "2x4", "0.8b", "prefill", length=128), 48, 59),
    (Case("v5e", "2x4", "35b-a3b", "decode"), 1320),
    (Case("v6e", "2x4", "35b-a3b", "decode"), 600),
    (Case("v5p", "2x4", "35b-a3b", "decode"), 630),
    (Case("tpu7x", "2x4", "35b-a3b", "decode"), 10600),
    (Case("h100", "2x4", "35b-a3b", "decode"), 190, 28),
    (Case("v5e", "2x4", "35b-a3b", "prefill", length=128), 960),
    (Case("h100", "2x4", "35b-a3b", "prefill", length=128), 420, 228),
    (Case("v5p-64", "4x16", "397b-a17b", "decode"), 880),
    (Case("h200", "2x4", "397b-a17b", "decode"), 1250, 72),
    (Case("h100-2", "4x4", "397b-a17b", "decode"), 670, 71),
    (Case("h100", "1x8", "397b-a17b", "decode", fp8=True), 950, 49),
    (Case("tpu7x", "2x4", "397b-a17b", "decode", fp8=True), 5000, 17900),
    *((Case(*line, "decode", rows=rows, capacity=512), *ceilings) for line, rows, ceilings, _ in README),
]
SLOW = [
    *((Case(*line, "prefill", rows=rows, capacity=512, length=64), *ceilings) for line, rows, _, ceilings in README),
    (Case("h200", "2x4", "0.8b", "decode"), 30, 12),
    (Case("v5p", "2x4", "0.8b", "prefill", length=128), 56),
    (Case("tpu7x", "2x4", "0.8b", "prefill", length=128), 190),
    (Case("h200", "2x4", "35b-a3b", "decode"), 190, 28),
    (Case("v6e", "2x4", "0.8b", "prefill"), 200),
    (Case("h200", "2x4", "0.8b", "prefill"), 70, 176),
    (Case("v6e", "2x4", "35b-a3b", "prefill"), 2000),
    (Case("v5p", "2x4", "35b-a3b", "prefill"), 2000),
    (Case("tpu7x", "2x4", "35b-a3b", "prefill"), 10700),
    (Case("h200", "2x4", "35b-a3b", "prefill"), 2000, 623),
]


def _name(case: Case) -> str:
    return f"{case.model}-{case.step}-{case.target}-{case.mesh}{'-fp8' if case.fp8 else ''}"


def _expected(case: Case, experts: bool, layers: int) -> dict[str, int]:
    """The most collectives of at least one activation's size that the step may have: one all-reduce after each mixer
    and each MLP of the program's layers and one after the embedding; with experts an all-gather and a reduce-scatter (or its
    all-reduce form) of each MLP's tokens over `data`."""
    if not experts:
        return {"all-reduce": 2 * layers + 1}
    return {"all-reduce": 3 * layers + 1, "all-gather": layers, "reduce-scatter": layers}


def _crashes(case: Case) -> bool:
    """Prefill of 512 tokens of 35b-a3b for tpu7x ends the compiler of libtpu 0.0.42 with signal 11; 0.0.50 compiles it."""
    old = jax.__version_info__ < (0, 12)
    return old and (case.target, case.model, case.step, case.length) == ("tpu7x", "35b-a3b", "prefill", 512)


def _parameters():
    for cases, marks in ((CASES, ()), (SLOW, pytest.mark.slow)):
        yield from (pytest.param(case, ceilings, id=_name(case), marks=marks) for case, *ceilings in cases)


@pytest.mark.parametrize(("case", "ceilings"), list(_parameters()))
def test_compiles(case, ceilings):
    target = TARGETS[case.target]
    needs_compiler(case.target)
    if _crashes(case):
        pytest.skip("the TPU compiler that comes with this JAX crashes on it: see docs/lab_notes.md")
    result = compile_elsewhere(case, timeout=900)
    summary = {k: v for k, v in result.items() if k != "collectives"}
    print(_name(case), summary)
    assert result["total_bytes"] < target.hbm * 0.95, summary
    assert result["temporary_bytes"] < of_this_jax(ceilings) * MIB, summary
    _check_collectives(case, result)


@pytest.mark.parametrize("mesh", ["1x3", "7x1"])
def test_a_mesh_that_the_chips_do_not_form(mesh):
    needs_compiler("v5e")
    program = f"from tests.aot.devices import *; from qwen35_jax.sharding import *; make_mesh({mesh!r}, target_devices('v5e'))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, env=os.environ | SETTINGS, capture_output=True, text=True)
    assert f"UserError: mesh {mesh}: " in done.stderr.splitlines()[-1], done.stderr


def _check_collectives(case: Case, result: dict):
    """Nothing as large as one activation but what is expected, and nothing of more numbers than all tokens' activations.

    Compilers may add in float32 what is bfloat16 before and after: such a sum has twice the bytes and is its own choice.
    The GPU compiler may join sums, as of the routed and of the shared experts: each part counts."""
    hidden, experts, layers = result["hidden_size"], result["experts"], result["layers"]
    *replica, data, _ = (int(n) for n in case.mesh.split("x"))
    tokens = case.rows * (case.length if case.step == "prefill" else 1)
    activation = tokens // (data * (replica[0] if replica else 1)) * hidden * 2
    large, found = [c for c in result["collectives"] if c[1] >= activation], collections.Counter()
    for kind, size, bits, joined in large:
        numbers = size // (4 if kind in ("all-reduce", "reduce-scatter") and bits == 32 else 2)
        parts = -(-numbers // (tokens * hidden)) if joined else 1
        found[kind] += parts
        assert numbers <= 1.1 * parts * tokens * hidden, large
    expected = _expected(case, experts > 0, layers)
    assert all(count <= expected.get(kind, 0) for kind, count in found.items()), (found, expected, large)
