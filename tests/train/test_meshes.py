"""Sharded equals unsharded: logits, losses and the gradient of every parameter on meshes of eight devices, packed, in float32.

`data` and `replica` cut the batch and the parameters (FSDP), `model` heads, features and vocabulary (tensor parallelism), both
the experts, in each form of their exchange.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from qwen35_jax.ops.segments import segment_positions
from qwen35_jax.train.partition import flatten
from qwen35_jax.train.run import initial_state
from tests.train.conftest import SMALL, random_batch, small_run

DENSE = SMALL | {"num_experts": 0, "num_experts_per_tok": 0, "intermediate_size": 64, "shared_expert_intermediate_size": 0}


@functools.cache
def numbers(mesh: str, form: str, experts: bool = True) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
    """Logits, the loss of a batch with all its terms, and the gradients with respect to the parameters as training keeps them."""
    run = small_run(mesh=mesh, moe=form, model__changes=SMALL if experts else DENSE)
    batch, loss = random_batch(), run.loss

    def step(params):
        totals = loss.totals(batch)
        value, gradients = jax.value_and_grad(lambda p: loss.total(loss.sums(p, {}, batch), totals))(params)
        whole = loss.weights.top(params)
        inputs = run.model.inputs(segment_positions(batch["segment_ids"]), batch["segment_ids"])
        whole |= {"units": (loss.weights.unit(jax.tree.map(lambda x: x[0], whole["units"])),)}  # the only one
        hidden, _ = run.model.hidden(whole, batch["tokens"], inputs)
        return run.model.logits(whole, hidden), value, gradients

    logits, value, gradients = jax.jit(step)(initial_state(run)["params"])
    return np.asarray(logits), float(value), {path: np.asarray(g) for path, g in flatten(gradients).items()}


SLOW = [("4x2", "gather"), *((mesh, form) for mesh in ("8x1", "2x4", "1x8", "2x2x2") for form in ("gather", "all_to_all"))]


@pytest.mark.parametrize(
    ("mesh", "form"),
    [("4x2", "all_to_all"), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_experts(mesh, form):
    compare(numbers(mesh, form), numbers("1x1", "gather"))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["8x1", "2x4", "1x8", "2x2x2"])
def test_dense(mesh):
    compare(numbers(mesh, "auto", experts=False), numbers("1x1", "auto", experts=False))


def compare(ours, theirs):
    """Sums in float32 in another order; of each parameter's gradient relative to its largest number."""
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-4 * np.abs(theirs[0]).max())
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-5)
    assert set(ours[2]) == set(theirs[2])
    for path, expected in theirs[2].items():
        assert np.abs(expected).max() > 0, path
        np.testing.assert_allclose(ours[2][path], expected, atol=2e-4 * np.abs(expected).max(), err_msg=path)
