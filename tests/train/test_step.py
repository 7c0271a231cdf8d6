"""The compiled training step: the same curve on every mesh and in every form, accumulation, and steps that go wrong."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from jax._src.core import jaxprs_in_params
from jax.extend.core import Literal

from qwen35_jax.model import Model
from qwen35_jax.ops.forms import Forms
from qwen35_jax.train.run import initial_state
from qwen35_jax.train.step import abstract_batch
from tests.train.conftest import SMALL, random_batch, small_run

STEPS = 20
# One mesh against another, fp32: sums in other orders, through twenty updates.
TOLERANCE = 1e-4


def curve(batches: int = STEPS, **changes) -> list[float]:
    """The losses of a run over the same four batches again and again."""
    run = small_run(**changes)
    parts = run.config.accumulate
    step, state, losses = run.train_step().compile(), initial_state(run), []
    shardings = jax.tree.map(lambda x: x.sharding, run.train_step().arguments[1])
    for i in range(batches):
        batch = random_batch(i % 4)
        if parts > 1:
            batch = {name: x.reshape(parts, -1, x.shape[-1]) for name, x in batch.items()}
        state, metrics = step(state, jax.device_put(batch, shardings))
        losses.append(float(metrics["loss"] + metrics.get("mtp_loss", 0.0)))
    return losses


@functools.cache
def expected() -> list[float]:
    return curve()


def test_the_loss_falls():
    assert expected()[-1] < 0.8 * expected()[0]


SLOW = (pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("8x1", "4x2", "2x4", "1x8"))


@pytest.mark.parametrize("mesh", ["2x2x2", *SLOW])
def test_every_mesh_gives_one_curve(mesh):
    np.testing.assert_allclose(curve(mesh=mesh), expected(), rtol=TOLERANCE)


@pytest.mark.slow  # test_vision.py has a quick one, of batches with pictures
def test_accumulated_parts_are_the_whole_batch():
    """But for the load-balancing loss, which is of each part: off here."""
    whole, parts = (curve(4, accumulate=n, loss__balance=0.0, loss__mtp=0.0) for n in (1, 2))
    np.testing.assert_allclose(parts, whole, rtol=TOLERANCE)


def test_an_evaluation_runs_the_parts_of_a_step_one_after_the_other():
    batch = random_batch()
    found = []
    for parts in (1, 2):
        run = small_run(accumulate=parts)
        like = run.batch(parts)
        placed = {name: jax.device_put(batch[name].reshape(x.shape), x.sharding) for name, x in like.items()}
        state = initial_state(run)
        step = run.eval_step().compile()
        sums = step(state["params"], state["frozen"], placed)
        found.append([float(sums[name]) for name in ("nll", "weight", "mtp_nll", "mtp_weight")])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6)
    placed |= {name: x.at[1].set(0) for name, x in placed.items()}  # the second part is padding, as behind the end of the data
    sums = step(state["params"], state["frozen"], placed)
    assert all(math.isfinite(x) for x in sums.values()) and sums["busiest_expert"] >= 1, sums


def test_parameters_and_moments_are_fully_sharded():
    run = small_run(mesh="2x2x2")
    for name in ("params", "opt"):
        leaves = jax.tree_util.tree_leaves_with_path(run.state[name])
        large = [(path, x) for path, x in leaves if math.prod(x.shape) >= 4096]
        assert large
        for path, x in large:
            ways = math.prod(x.shape) // math.prod(x.sharding.shard_shape(x.shape))
            assert ways >= 4, (jax.tree_util.keystr(path), x.shape, x.sharding.spec)


def test_a_step_that_is_not_finite_changes_nothing():
    run = small_run()
    step, state = run.train_step().compile(), initial_state(run)
    before = jax.tree.map(np.array, state)
    bad = random_batch() | {"loss_weights": np.full_like(random_batch()["loss_weights"], np.nan)}
    for count in (1, 2):
        state, metrics = step(state, jax.device_put(bad))
        assert metrics["skipped_in_a_row"] == metrics["skipped"] == count
    for name in ("params", "opt"):
        jax.tree.map(np.testing.assert_array_equal, state[name], before[name])
    for _ in range(2):  # the warm-up gives the first step a learning rate of 0
        state, metrics = step(state, jax.device_put(random_batch()))
    assert (metrics["skipped_in_a_row"], metrics["skipped"], int(state["step"])) == (0, 2, 4)
    assert math.isfinite(metrics["loss"])
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(state["params"]), jax.tree.leaves(before["params"]), strict=True))


def test_a_finite_loss_with_a_gradient_that_is_not_is_skipped_too():
    run = small_run(loss__z=1e25, loss__mtp=0.0)  # no number is infinite but the norm: its squares are beyond float32
    step, state = run.train_step().compile(), initial_state(run)
    before = jax.tree.map(np.array, state)
    batch = jax.device_put(random_batch())
    loss = jax.jit(lambda params: run.loss.total(run.loss.sums(params, {}, batch), run.loss.totals(batch)))
    assert math.isfinite(loss(state["params"] | state["frozen"]))
    state, metrics = step(state, batch)
    assert math.isfinite(metrics["loss"]) and metrics["gradient_norm"] == math.inf
    assert metrics["skipped"] == metrics["skipped_in_a_row"] == 1
    for name in ("params", "opt"):
        jax.tree.map(np.testing.assert_array_equal, state[name], before[name])


def test_frozen_parameters_stay():
    run = small_run(freeze=("^embed", "experts"), loss__mtp=0.0)
    step, state = run.train_step().compile(), initial_state(run)
    frozen, trained = (jax.tree.map(np.array, state[name]) for name in ("frozen", "params"))
    assert "embed" in frozen and "embed" not in state["params"]
    assert "mtp" in frozen, "no loss reaches it here: weight decay would only shrink it"
    for _ in range(2):  # the warm-up gives the first step a learning rate of 0
        state, _ = step(state, jax.device_put(random_batch()))
    jax.tree.map(np.testing.assert_array_equal, state["frozen"], frozen)
    assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(state["params"]), jax.tree.leaves(trained), strict=True))


def test_lora_trains_its_own_matrices_alone():
    run = small_run(lora__rank=4, optimizer__learning_rate=3e-2, loss__mtp=0.0)
    step, state = run.train_step().compile(), initial_state(run)
    base = jax.tree.map(np.array, run.merged(state))
    losses = []
    for _ in range(6):
        state, metrics = step(state, jax.device_put(random_batch()))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    merged = run.merged(state)
    np.testing.assert_array_equal(merged["embed"]["embedding"], base["embed"]["embedding"])
    experts = [tree["units"]["layers"]["0"]["mlp"]["experts"]["down"] for tree in (merged, base)]
    assert np.any(np.asarray(experts[0]) != experts[1])


def _used(jaxpr, primitive: str, name: str) -> int:
    """How many equations of a primitive, whose name starts so, have a result that is used: XLA drops the others."""
    reads = [*(v for eqn in jaxpr.eqns for v in eqn.invars), *jaxpr.outvars]
    read = {v for v in reads if not isinstance(v, Literal)}
    found = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == primitive and eqn.params.get("name", "").startswith(name):
            found += any(v in read for v in eqn.outvars)
        elif eqn.primitive.name != "pallas_call":
            found += sum(_used(inner, primitive, name) for inner in jaxprs_in_params(eqn.params))
    return found


@pytest.mark.parametrize(("form", "forward"), [("xla", ("scan", "")), ("pallas_tpu", ("pallas_call", "gated_delta_forward"))])
def test_a_recurrence_that_is_kept_is_not_run_again(form, forward):
    changes = SMALL | {"num_hidden_layers": 4, "full_attention_interval": 4}  # three Gated DeltaNet layers
    changes |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
    run = small_run(model__changes=changes, loss__mtp=0.0)
    model = Model(run.model.config, run.model.sharding, Forms(gated_delta_rule=form))
    weights = dataclasses.replace(run.loss.weights, model=model)

    def passes(remat: str) -> int:
        loss = dataclasses.replace(run.loss, weights=weights, remat=remat)
        gradient = jax.grad(lambda params, batch: loss.sums(params, run.state["frozen"], batch)["nll"])
        return _used(jax.make_jaxpr(gradient)(run.state["params"], abstract_batch(model, 2, 128)).jaxpr, *forward)

    assert passes("full") == passes("gated_delta") + 3
