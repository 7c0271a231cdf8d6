"""The compiled steps as programs: size against depth, what decoding holds in memory, which collectives a mesh costs."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

from qwen35_jax import ModelConfig
from qwen35_jax.generate import steps
from qwen35_jax.generate.sampling import CANDIDATES
from qwen35_jax.model import Model, abstract_state, zero_slots
from qwen35_jax.planner.hlo import collectives
from qwen35_jax.sharding import Sharding, make_mesh

SMALL = ModelConfig.preset("tiny").replace(
    dtype="float32", num_hidden_layers=8, hidden_size=64, moe_intermediate_size=32, shared_expert_intermediate_size=32
)
DENSE = SMALL.replace(num_experts=0, num_experts_per_tok=0, intermediate_size=64, shared_expert_intermediate_size=0)


def model(config: ModelConfig, mesh: str = "1x1") -> Model:
    return Model(config, Sharding(make_mesh(mesh)))


def test_the_program_does_not_grow_with_depth():
    whole = ModelConfig.preset("397b-a17b")

    def lines(config) -> int:
        return steps.make_decode(model(config), 1, 1024, config.vocab_size).lower().as_text().count("\n")

    assert lines(whole) == lines(whole.replace(num_hidden_layers=8))


def test_decode_copies_no_more_than_one_units_cache():
    capacity, slots = 4096, 4
    config = DENSE.replace(num_hidden_layers=16)
    program = steps.make_decode(model(config), slots, capacity, config.vocab_size, stacked=False)
    state = abstract_state(config, program_sharding(), slots, capacity, stacked=False)
    unit = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in (state["k"][0], state["v"][0]))
    assert program.compile().memory_analysis().temp_size_in_bytes < unit


def program_sharding() -> Sharding:
    return Sharding(make_mesh("1x1"))


def test_slots_are_emptied_for_reuse():
    for stacked in (True, False):
        shapes = abstract_state(SMALL, program_sharding(), 4, 64, stacked=stacked)
        state = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
        cleared = zero_slots(state, np.array([True, False, True, False]))
        for name in ("recurrent", "conv_q", "conv_k", "conv_v"):
            axis = 2 if stacked else 0
            for leaf in jax.tree.leaves(cleared[name]):
                kept = np.moveaxis(np.asarray(leaf, np.float32), axis, 0)
                assert not kept[[0, 2]].any() and kept[[1, 3]].all()
        assert cleared["length"].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("stacked", [True, False])
def test_weights_do_not_depend_on_mesh_or_form(stacked):
    expected = jax.tree.map(np.asarray, model(SMALL).init_params(3, stacked=False))
    params = jax.tree.map(np.asarray, model(SMALL, "2x4").init_params(3, stacked))
    if stacked:
        params["units"] = tuple(jax.tree.map(lambda x, u=u: x[u], params["units"]) for u in range(SMALL.num_units))
    jax.tree.map(np.testing.assert_array_equal, params, expected)


ROWS, LENGTH, CAPACITY = 8, 2, 64
STEPS = {  # the program, and its tokens
    "decode": (lambda m, v: steps.make_decode(m, ROWS, CAPACITY, v), ROWS),
    "first": (lambda m, v: steps.make_first(m, ROWS, CAPACITY, v), ROWS),
    "prefill": (lambda m, v: steps.make_prefill(m, ROWS, ROWS, LENGTH, CAPACITY), ROWS * LENGTH),
    "logits": (lambda m, v: steps.make_logits(m, ROWS, LENGTH), ROWS * LENGTH),
}


MESHES = {  # the model, and the collectives that it may have
    "8x1": (DENSE, set()),
    "1x8": (DENSE, {"all-reduce"}),  # sums of partial products
    "8x1, experts": (SMALL, {"all-gather", "reduce-scatter"}),  # tokens to experts and back
    "2x4, experts": (SMALL, {"all-gather", "reduce-scatter", "all-reduce"}),
}


QUICK = [("2x4, experts", "prefill"), *((name, "decode") for name in MESHES)]
SLOW = [case for case in itertools.product(("1x8", "2x4, experts"), STEPS) if case not in QUICK]


@pytest.mark.parametrize(("name", "step"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_collectives(name, step):
    """Tokens' activations and the sampler's candidates are exchanged, and no weight: each is larger than the activations."""
    (config, allowed), mesh = MESHES[name], name.partition(",")[0]
    make, tokens = STEPS[step]
    text = make(model(config, mesh), config.vocab_size).compile().as_text()
    data, shards = (int(n) for n in mesh.split("x"))
    candidates = ("all-gather", ROWS // data * shards * CANDIDATES * 4)
    found = [(c.kind, c.bytes) for c in collectives(text) if c.group > 1]
    if shards > 1 and step in ("decode", "first"):
        assert found.count(candidates) == 2  # values and ids
        found = [c for c in found if c != candidates and c != ("all-gather", candidates[1] // CANDIDATES)]
    found = [c for c in found if c != ("all-reduce", 1)]  # "have all rows ended?"
    assert {kind for kind, _ in found} <= allowed, found
    assert all(size <= tokens * config.hidden_size * 4 for _, size in found), found
