"""The state that a run starts from: what the devices hold on the way to it, and that it is the same numbers however they lie."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

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
