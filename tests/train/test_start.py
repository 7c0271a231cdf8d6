"""The state that a run starts from: what the devices hold on the way to it, and that it is the same numbers however they lie."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from qwen35_jax.train.partition import flatten
from qwen35_jax.train.run import Run, find_origin, initial_state, make_run
from tests.train.conftest import SMALL, small_config

TOWER = {
    "depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": SMALL["hidden_size"],
    "in_channels": 3, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2, "num_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def made(monkeypatch) -> list[jax.Array]:
    """Every array that is put on devices from the host."""
    arrays, make = [], jax.make_array_from_callback

    def spy(*arguments):
        arrays.append(make(*arguments))
        return arrays[-1]

    monkeypatch.setattr(jax, "make_array_from_callback", spy)
    return arrays


def seeing(mesh: str) -> Run:
    """A small run of random weights, of a vision tower too."""
    config = small_config(mesh=mesh, model__vision=TOWER, data__patches=64)
    return make_run(config, find_origin(config))


def test_no_device_ever_holds_more_of_random_weights_than_it_keeps(made):
    run = seeing("2x2x2")
    state = initial_state(run)
    large = [x for x in made if x.size >= 4096]
    assert len(large) > 20
    for x in large:
        assert math.prod(x.sharding.shard_shape(x.shape)) <= x.size / 4, (x.shape, x.sharding.spec)
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, run.state)
    jax.tree.map(np.testing.assert_array_equal, state, initial_state(seeing("1x1")))


FROZEN = [{"lora__rank": 2, "lora__match": ("mixer/q$",)}, {"freeze": ("^embed", "experts")}]


@pytest.mark.parametrize("changes", FROZEN, ids=["lora", "freeze"])
def test_frozen_weights_are_read_in_the_dtype_of_the_model(made, changes):
    """What is read of a checkpoint is what stays: there is no float32 beside it, and no other number."""
    stored = {"model__changes": {}, "model__random_weights": False, "dtype": "bfloat16", "mesh": "2x2x2", "loss__mtp": 0.1}
    config = small_config(**stored, **changes)
    run = make_run(config, find_origin(config))
    state = initial_state(run)
    kept = jax.tree.leaves((state["frozen"], {} if config.lora.rank else state["params"]))
    assert sum(x.nbytes for x in made) == sum(x.nbytes for x in kept)
    assert jax.tree.map(lambda x: (x.dtype, x.sharding), state) == jax.tree.map(lambda x: (x.dtype, x.sharding), run.state)

    config = small_config(**stored)
    whole = initial_state(make_run(config, find_origin(config)))["params"]
    exact = flatten(whole)
    for path, x in flatten(state["frozen"]).items():
        np.testing.assert_array_equal(x, exact[path].astype(x.dtype), err_msg=path)
    assert any(x.dtype == "bfloat16" for x in flatten(state["frozen"]).values())
