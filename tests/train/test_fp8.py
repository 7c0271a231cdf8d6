"""Which weights of the model train in FP8, and what the monitor says about them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.fp8_residuals import kept, linear_layers, size
from qwen35_jax.config import ModelConfig
from qwen35_jax.errors import UserError
from qwen35_jax.model import Model
from qwen35_jax.ops.fp8 import Fp8Operand
from qwen35_jax.ops.fp8.reference import round_reference
from qwen35_jax.sharding import Sharding, make_mesh
from qwen35_jax.train.fp8 import fp8_layers, scalars
from qwen35_jax.train.partition import flatten

LINEAR = {f"units/layers/0/mixer/{name}" for name in ("q", "k", "v", "z", "out")}
ATTENTION = {f"mixer/{name}" for name in ("q_gate", "k", "v", "out")}
MLP = {f"mlp/{part}/{name}" for part in ("experts", "shared") for name in ("gate", "up", "down")}


def small_model(mesh="1x1"):
    """One layer of each kind, with experts and MTP."""
    changes = {"num_hidden_layers": 2, "full_attention_interval": 2, "num_experts": 8, "dtype": "float32"}
    config = ModelConfig.preset("tiny").replace(**changes)
    return Model(config, Sharding(make_mesh(mesh)))


def test_the_weights_that_fp8_checkpoints_quantise():
    layers = fp8_layers(small_model("2x4"))
    expected = LINEAR | {f"units/layers/1/{name}" for name in ATTENTION} | {f"mtp/layer/{name}" for name in ATTENTION | MLP}
    expected |= {f"units/layers/{i}/{name}" for i in range(2) for name in MLP}
    assert {path for path, _ in layers.weights} == expected
    assert dict(layers.cuts) == {"B": 2, "N": 4, "K": 4, "F": 4}


def test_weights_held_in_bfloat16():
    every = {path for path, _ in fp8_layers(small_model()).weights}
    layers = fp8_layers(small_model(), ["mtp/", r"layers/0/mixer/out"])
    assert {path for path, _ in layers.weights} == {p for p in every if "mtp/" not in p} - {"units/layers/0/mixer/out"}
    with pytest.raises(UserError, match="config.fp8.hold: 'embed' matches no"):
        fp8_layers(small_model(), ["embed"])


def test_wrap():
    model = small_model("2x4")
    layers, params = fp8_layers(model), model.abstract_params()
    wrapped = flatten(layers.wrap(params))
    assert {path for path, leaf in wrapped.items() if isinstance(leaf, Fp8Operand)} == {path for path, _ in layers.weights}
    unit = flatten(layers.wrap(params["units"], "units/"))
    assert (
        unit["layers/1/mixer/out"]
        == wrapped["units/layers/1/mixer/out"]
        == Fp8Operand(params["units"]["layers"]["1"]["mixer"]["out"], layers.cuts)
    )
    assert wrapped["embed/embedding"] is params["embed"]["embedding"]


@functools.cache
def gradients():
    """Parameters, their gradients in FP8 and in float32, and what comes in place of them with statistics."""
    model = small_model()
    layers, params = fp8_layers(model), model.init_params()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 4096, (2, 48)), jnp.int32)
    inputs = model.inputs(jnp.broadcast_to(jnp.arange(48), (2, 48)), jnp.ones_like(tokens))
    goal = jnp.asarray(np.random.default_rng(1).standard_normal((2, 48, model.config.hidden_size)), jnp.float32)

    def loss(params, wrap):
        return jnp.mean(model.hidden(wrap(params), tokens, inputs)[0] * goal)

    wraps = (layers.wrap, lambda params: params, functools.partial(layers.wrap, statistics=True))
    return layers, params, *(jax.jit(jax.grad(functools.partial(loss, wrap=wrap)))(params) for wrap in wraps)


def test_gradients_follow_those_of_float32():
    layers, _, fp8, exact, _ = gradients()
    fp8, exact = flatten(fp8), flatten(exact)
    for path, axes in layers.weights:
        if not path.startswith("mtp/"):
            a, b = np.asarray(fp8[path]), np.asarray(exact[path])
            assert a.dtype == b.dtype and a.any() and np.linalg.norm(a - b) < 0.25 * np.linalg.norm(b), path
            assert len(axes.split()) == a.ndim - 1


def test_the_layers_inputs_are_kept_in_8_bits():
    """Half of bfloat16's bytes and the scales, of one unit of a published shape; all layers of the unit are among them."""
    bfloat16, fp8 = (kept("35b-a3b", 240, fp8) for fp8 in (False, True))
    plain, narrow = linear_layers(bfloat16, fp8)
    assert plain == 2 * 240 * 4 * (2 * 2048 + 4096 + 512 + 8 * (2048 + 512)) and narrow <= 0.55 * plain
    # And not beside copies in 16 bits, but for those of layers that are not in FP8 (routers, gates of the recurrence).
    assert size(bfloat16) - size(fp8) >= 0.75 * (plain - narrow)


def test_monitor():
    layers, params, fp8, _, instead = gradients()
    report = layers.report({"units": instead["units"]})
    assert set(report) == {path for path, _ in layers.weights if path.startswith("units/")}
    params, fp8, instead = flatten(params), flatten(fp8), flatten(instead)
    np.testing.assert_allclose(instead["embed/embedding"], fp8["embed/embedding"], rtol=1e-4, atol=1e-9)
    for path, values in report.items():
        assert all(v.shape == (1,) for v in values.values())
        for name in ("product", "activation", "weight", "gradient"):
            assert 0.01 < float(values[f"{name}_error"][0]) < 0.06, (path, name, values)
        assert all(0 <= float(values[f"{name}_underflow"][0]) < 0.01 for name in ("activation", "weight", "gradient"))
    w = np.asarray(params["units/layers/1/mixer/out"][0]).reshape(-1, 128)
    error = np.linalg.norm(round_reference(w, (0, 1)) - w) / np.linalg.norm(w)
    assert abs(float(report["units/layers/1/mixer/out"]["weight_error"][0]) - error) < 1e-4
    assert scalars(report)["fp8/units/0/layers/1/mixer/out/weight_error"] == report["units/layers/1/mixer/out"]["weight_error"][0]


def test_the_monitor_writes_each_unit_apart():
    report = {
        "units/layers/1/mixer/q": {"weight_error": np.array([0.25, 0.5])},
        "mtp/layer/mlp/up": {"weight_error": np.array(0.125)},
    }
    assert scalars(report) == {
        "fp8/units/0/layers/1/mixer/q/weight_error": 0.25,
        "fp8/units/1/layers/1/mixer/q/weight_error": 0.5,
        "fp8/mtp/layer/mlp/up/weight_error": 0.125,
    }
