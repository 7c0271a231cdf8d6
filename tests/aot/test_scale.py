"""What large meshes need, compiled for chips that are not there: experts by all-to-all, and fully sharded inference."""

from __future__ import annotations

import collections

import pytest

from qwen35_jax.config import ModelConfig
from qwen35_jax.model import parameter_counts
from tests.aot.devices import TARGETS, needs_compiler
from tests.aot.run import Case, compile_elsewhere, of_this_jax

MIB = 2**20


def compiled(case: Case) -> tuple[dict, collections.Counter]:
    """What `compile_case` says, and how many collectives of more than a kilobyte of each kind there are."""
    needs_compiler(case.target)
    result = compile_elsewhere(case, timeout=900)
    print(case, {k: v for k, v in result.items() if k != "collectives"})
    assert result["total_bytes"] < 0.95 * TARGETS[case.target].hbm
    return result, collections.Counter(kind for kind, size, *_ in result["collectives"] if size > 1024)


EXPERTS = [
    # With the MiB of temporaries, about a tenth above what was measured (the second with jax 0.12.0.1, whose compiler gives
    # gathers to the sparse cores, in buffers of their own): BUFFER_BYTES and its gradients, the float32 sums of the gradients of
    # tokens and of experts.
    (Case("v5p-64", "64x1", "35b-a3b", "experts", length=8192, moe="all_to_all"), (630,)),
    pytest.param(
        Case("v5p-64", "16x4", "35b-a3b", "experts", length=32768, moe="all_to_all"), (800, 1225), marks=pytest.mark.slow
    ),
    (Case("h100", "8x1", "35b-a3b", "experts", length=8192, moe="all_to_all"), (830,)),
]


@pytest.mark.parametrize(("case", "ceiling"), EXPERTS, ids=lambda x: f"{x.target}-{x.mesh}" if isinstance(x, Case) else "")
def test_experts_by_all_to_all_with_8192_tokens_a_chip(case, ceiling):
    """Rows there and back, the same for the gradients, for which they are sent again; no array is gathered."""
    result, found = compiled(case)
    assert result["temporary_bytes"] < of_this_jax(ceiling) * MIB, result
    model = int(case.mesh.split("x")[1])
    assert found.pop("ragged-all-to-all") == 6
    assert set(found) <= ({"all-reduce"} if model > 1 else set()), found
    # All passes of the loops together: each token's rows, cut over the columns of experts, six times.
    assert result["ragged_bytes"] == pytest.approx(6 * case.length * 8 / model * result["hidden_size"] * 2, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "ceiling", "ragged"),
    [
        (Case("v5p-64", "64x1", "35b-a3b", "prefill", 64, 8192, 8192, layers=4, moe="all_to_all"), 615, 8),
        (Case("h200", "8x1", "35b-a3b", "prefill", 8, 8192, 8192, layers=4, moe="all_to_all"), 1280, 8),
        (Case("v5p-64", "64x1", "35b-a3b", "train", 64, 8192, layers=4, moe="all_to_all"), 13200, 36),
    ],
    ids=["prefill-v5p", "prefill-h200", "train-v5p"],
)
def test_models_with_experts_by_all_to_all(case, ceiling, ragged):
    """Two exchanges a layer; in training two more to make the units again, but for the last layer, four for the gradients,
    and six of the layer for multi-token prediction."""
    result, found = compiled(case)
    assert result["temporary_bytes"] < ceiling * MIB, result
    assert found["ragged-all-to-all"] == ragged, found


@pytest.mark.parametrize("step", ["decode", pytest.param("prefill", marks=pytest.mark.slow)])
def test_fully_sharded_weights_are_gathered_a_unit_at_a_time(step):
    """27b on eight chips of v5e that cut nothing but the batch: 54 GB of weights for each, were they not cut."""
    case = Case("v5e", "8x1", "27b", step, rows=8, capacity=1024, fully_sharded=True)
    result, found = compiled(case)
    config = ModelConfig.preset(case.model)
    counts = parameter_counts(config)
    table = config.vocab_size * config.hidden_size
    unit = 2 * (counts["text"] - 2 * table) / config.num_units
    parameters = 2 * (counts["text"] + counts["mtp"])
    assert result["argument_bytes"] < parameters / 8 + 500 * MIB  # and the state
    assert result["temporary_bytes"] < 1.4 * unit, (unit / MIB, result)
    assert found["all-gather"] > 40
    largest = max(size for kind, size, *_ in result["collectives"] if kind == "all-gather")
    assert largest <= 2 * table < unit
