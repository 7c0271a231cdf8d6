"""A step of training with the TPU kernels, interpreted as XLA programs on the CPU, beside the same step in XLA's forms."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest
from jax.experimental import pallas as pl

from qwen35_jax.model import Model
from qwen35_jax.ops.forms import Forms
from qwen35_jax.train.run import Run, initial_state
from tests.ops.xla_interpreter import kernels_as_xla
from tests.train.conftest import SMALL, random_batch, small_run

RULE = {"gated_delta_rule": "pallas_tpu", "causal_conv1d": "pallas_tpu"}
RULE_KERNELS = {"gated_delta_forward_kernel", "gated_delta_backward_kernel", "causal_conv", "causal_conv_gradient"}
HEADS = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128}


def with_forms(run: Run, **forms: str) -> Run:
    model = Model(run.model.config, run.model.sharding, Forms(**forms))
    weights = dataclasses.replace(run.loss.weights, model=model)
    return dataclasses.replace(run, loss=dataclasses.replace(run.loss, weights=weights))


def take_step(run: Run) -> tuple[dict, dict]:
    """The metrics of the first step, and by path what it leaves of the gradient: Adam's first moment, a tenth of it, clipped."""
    step, state = run.train_step().compile(), initial_state(run)
    state, metrics = step(state, jax.device_put(random_batch(rows=2)))
    assert int(state["step"]) == 1 and int(state["skipped"]) == 0
    moments = jax.tree_util.tree_leaves_with_path(optax.tree_utils.tree_get(state["opt"], "mu"))
    return metrics, {jax.tree_util.keystr(path): np.asarray(x, np.float64) for path, x in moments}


@pytest.fixture
def called(monkeypatch) -> set[str]:
    """The kernels run as XLA programs; the names of those that were traced."""
    kernels_as_xla(monkeypatch)
    call, names = pl.pallas_call, set()

    def noted(*arguments, name, **options):
        names.add(name)
        return call(*arguments, name=name, **options)

    monkeypatch.setattr(pl, "pallas_call", noted)
    return names


def check(bounds: tuple[float, float], *, fp8: bool) -> None:
    """bounds: relative, of the loss and its gradient's norm, and of each parameter's gradient (Frobenius)."""
    run = small_run(model__changes=SMALL | HEADS, mesh="1x1", data__batch_size=2, optimizer__name="adamw", fp8__enabled=fp8)
    forms = RULE | ({"fp8_training_linear": "pallas_tpu"} if fp8 else {})
    (want, wanted), (got, found) = (take_step(with_forms(run, **f)) for f in ({}, forms))
    errors = {path: np.linalg.norm(found[path] - x) / np.linalg.norm(x) for path, x in wanted.items() if x.any()}
    loss, norm = (abs(float(got[name] / want[name]) - 1) for name in ("loss", "gradient_norm"))
    print(f"loss {loss:.1e}, norm {norm:.1e}", {path: f"{error:.1e}" for path, error in errors.items()})
    assert len(errors) > 30 and max(loss, norm) < bounds[0] and max(errors.values()) < bounds[1]


@pytest.mark.slow
def test_float32(called):
    """The forms add float32 in other orders: 1.5e-6 was seen in gradients, with one layer of each kind, experts and MTP."""
    check((1e-6, 1e-5), fp8=False)
    assert RULE_KERNELS <= called


@pytest.mark.slow
def test_fp8(called):
    """The dense products and their gradients too. A sum in another order can round a number to the other e4m3 neighbour:
    presumably so one gradient differed by 1.1e-4, all others by less than 1e-6. The bound is a fifth of what e4m3 rounds away
    itself, 2.6e-2."""
    check((1e-4, 5e-3), fp8=True)
    assert called >= RULE_KERNELS | {"fp8_linear_activations", "fp8_linear_gradients"}
