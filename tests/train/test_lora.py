"""LoRA by merged weights: shapes and placement of the factors, the merge against the written-out sum, and who gets gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from qwen35_jax import ModelConfig
from qwen35_jax.errors import UserError
from qwen35_jax.model import Model
from qwen35_jax.sharding import Sharding, make_mesh
from qwen35_jax.train.config import default_config
from qwen35_jax.train.lora import abstract_lora, init_lora, lora_axes, merge_lora
from qwen35_jax.train.optimizer import groups, make_optimizer, state_shardings
from qwen35_jax.train.partition import flatten, logical_axes, matrix_axes


@functools.lru_cache
def small_model(mesh: str = "1x1") -> Model:
    config = ModelConfig.preset("tiny").replace(dtype="float32", num_hidden_layers=4, full_attention_interval=2)
    return Model(config, Sharding(make_mesh(mesh)))


def lora_config(*match: str, rank: int = 3, alpha: float = 6.0) -> ConfigDict:
    return ConfigDict({"rank": rank, "alpha": alpha, "match": match})


# One of each kind. "a" and "b" are also the names of projections of Gated DeltaNet.
AXES = {
    "units": {"gate": "U E D F", "out": "U N H D", "q_gate": "U D N G H", "a": "U D N", "b": "U D N", "conv": "U K H W"},
    "mtp": {"fc": "G D D", "norm": "D"},
    "embed": "V D",
}
SIZES = {"U": 2, "E": 3, "D": 6, "F": 4, "N": 2, "H": 5, "G": 2, "K": 2, "W": 4, "V": 7}
EINSUMS = {
    "units/gate": "uedr,uerf->uedf",
    "units/out": "unhr,urd->unhd",
    "units/q_gate": "udr,urngh->udngh",
    "units/a": "udr,urn->udn",
    "units/b": "udr,urn->udn",
    "mtp/fc": "gdr,gre->gde",
    "embed": "vr,rd->vd",
}


def params() -> dict:
    random = np.random.default_rng(0)
    place = jax.sharding.NamedSharding(make_mesh("1x1"), P())

    def leaf(axes):
        x = random.normal(size=[SIZES[a] for a in axes.split()])
        return jax.device_put(jnp.asarray(x, jnp.float32), place)

    return jax.tree.map(leaf, AXES)


def randomised(lora: dict) -> dict:
    random = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), lora)


def test_every_matrix_of_a_model_can_be_adapted():
    model, config = small_model(), lora_config(".")
    axes = logical_axes(model)
    factors = flatten(lora_axes(axes, config))
    assert {path.rpartition("/")[0] for path in factors} == {path for path, a in flatten(axes).items() if matrix_axes(a)}
    assert factors["units/layers/0/mlp/experts/down/a"] == "U E F R" and factors["units/layers/0/mlp/experts/down/b"] == "U E R D"
    assert factors["units/layers/0/mixer/b/a"] == "U D R" and factors["units/layers/0/mixer/out/a"] == "U N H R"


def test_default_regexes_find_matrices():
    config = default_config().lora
    config.rank = 4
    names = {path.split("/")[-2] for path in flatten(lora_axes(logical_axes(small_model()), config))}
    assert names == {"q", "k", "v", "z", "q_gate", "out", "router", "gate", "up", "down"}


def test_factors_lie_as_their_parameter():
    model, config = small_model("4x2"), lora_config("layers/1/mixer", "experts/gate", "^embed")
    axes, base = logical_axes(model), model.abstract_params()
    tree = abstract_lora(base, axes, config)
    flat = {path: (x.shape, x.sharding.spec) for path, x in flatten(tree).items()}
    assert flat["units/layers/1/mixer/q_gate/a"] == ((2, 128, 3), P(None, None, None))
    assert flat["units/layers/1/mixer/q_gate/b"] == ((2, 3, 4, 2, 32), P(None, None, "model", None, None))
    assert flat["units/layers/1/mixer/out/a"] == ((2, 4, 32, 3), P(None, "model", None, None))
    assert flat["units/layers/0/mlp/experts/gate/a"] == ((2, 8, 128, 3), P(None, ("data", "model"), None, None))
    assert flat["units/layers/0/mlp/experts/gate/b"] == ((2, 8, 3, 64), P(None, ("data", "model"), None, None))
    assert flat["embed/embedding/a"] == ((4096, 3), P("model", None))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(tree))


def test_initial_factors_depend_on_seed_and_path_alone():
    config = lora_config("layers/1/mlp/experts", "layers/1/mixer/out", rank=16)
    made = []
    for mesh in ("1x1", "4x2"):
        model = small_model(mesh)
        lora = init_lora(7, model.abstract_params(), logical_axes(model), config)
        abstract = abstract_lora(model.abstract_params(), logical_axes(model), config)
        assert jax.tree.map(lambda x: x.sharding, lora) == jax.tree.map(lambda x: x.sharding, abstract)
        made.append(flatten(lora))
    for path, x in made[0].items():
        np.testing.assert_array_equal(x, made[1][path], err_msg=path)
        assert x.dtype == jnp.float32
        if path.endswith("/b"):
            assert not np.any(x)
        else:
            inputs = {"down": 64}.get(path.split("/")[-2], 128)
            assert np.std(x) * inputs**0.5 == pytest.approx(1, rel=0.03), path
    gate, up = (made[0][f"units/layers/1/mlp/experts/{name}/a"] for name in ("gate", "up"))
    assert np.abs(gate - up).max() > 0.1
    model = small_model()
    other = flatten(init_lora(8, model.abstract_params(), logical_axes(model), config))
    assert np.abs(other["units/layers/1/mlp/experts/gate/a"] - gate).max() > 0.1


def test_initial_factors_change_nothing():
    base, config = params(), lora_config(".")
    merged = merge_lora(base, init_lora(0, base, AXES, config), config, AXES)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    jax.tree.map(np.testing.assert_array_equal, merged, base)


def test_merge_is_the_written_out_sum():
    base, config = params(), lora_config(".", rank=3, alpha=1.5)
    lora = randomised(init_lora(0, base, AXES, config))
    merged, factors = flatten(jax.jit(lambda p, x: merge_lora(p, x, config, AXES))(base, lora)), flatten(lora)
    assert {path.rpartition("/")[0] for path in factors} == set(EINSUMS)
    for path, weight in flatten(base).items():
        if path in EINSUMS:
            a, b = (np.asarray(factors[f"{path}/{name}"], np.float64) for name in "ab")
            weight = weight + 0.5 * np.einsum(EINSUMS[path], a, b)
        np.testing.assert_allclose(merged[path], weight, atol=1e-5, err_msg=path)


@settings(max_examples=10)
@given(st.integers(1, 4), st.floats(0.1, 32.0), st.integers(0, 2**31))
def test_each_matrix_gets_its_own_product(rank, alpha, seed):
    random = np.random.default_rng(seed)
    w, a, b = (random.normal(size=s).astype(np.float32) for s in ((2, 3, 4, 5), (2, 3, 4, rank), (2, 3, rank, 5)))
    merged = merge_lora({"w": w}, {"w": {"a": a, "b": b}}, lora_config("w", rank=rank, alpha=alpha), {"w": "U E D F"})["w"]
    for u in range(2):
        for e in range(3):
            np.testing.assert_allclose(merged[u, e], w[u, e] + alpha / rank * a[u, e] @ b[u, e], rtol=1e-4, atol=1e-3)


def test_merge_casts_once_and_only_what_it_changes():
    base, config = params(), lora_config("out", rank=3, alpha=3.0)
    lora = randomised(init_lora(0, base, AXES, config))
    exact = flatten(merge_lora(base, lora, config, AXES))
    merged = flatten(merge_lora(base, lora, config, AXES, jnp.bfloat16))
    np.testing.assert_array_equal(merged["units/out"], exact["units/out"].astype(jnp.bfloat16))
    assert {path for path, x in merged.items() if x.dtype == jnp.bfloat16} == {"units/out"}
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    assert flatten(merge_lora(low, lora, config, AXES))["units/out"].dtype == jnp.bfloat16


def test_gradients_reach_both_factors_and_nothing_else():
    base, config = params(), lora_config("/gate", "embed")
    lora = randomised(init_lora(0, base, AXES, config))

    def loss(lora, base):
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(merge_lora(base, lora, config, AXES)))

    gradients = flatten(jax.jit(jax.grad(loss))(lora, base))
    assert set(gradients) == {f"{path}/{name}" for path in ("units/gate", "embed") for name in "ab"}
    assert all(np.abs(x).max() > 0 for x in gradients.values())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_factors_can_be_optimised(name):
    base, config = params(), lora_config("units", "mtp")
    axes = lora_axes(AXES, config)
    assert set(flatten(groups(axes)).values()) == {"muon"}
    options = default_config().optimizer
    options.update({"name": name, "schedule": "constant", "warmup_steps": 0})
    abstract, lora = abstract_lora(base, AXES, config), init_lora(0, base, AXES, config)
    optimizer = make_optimizer(options, 10, axes, abstract)
    state = jax.jit(optimizer.init, out_shardings=state_shardings(optimizer, abstract))(lora)
    updates, _ = jax.jit(optimizer.update)(randomised(lora), state, lora)
    assert jax.tree.all(jax.tree.map(lambda x: bool(np.isfinite(x).all() and np.abs(x).max() > 0), updates))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lora_config("mixer/qq"), r"config.lora.match: 'mixer/qq' matches no parameter; parameters are .*/.*, …"),
        (lora_config("A_log|conv_q|norm"), "config.lora.match: .* matches no parameter"),
        (lora_config("mixer", "mlp/gaet"), "config.lora.match: 'mlp/gaet' matches no parameter"),
        (lora_config("(mixer"), "config.lora.match: .* is not a regular expression"),
        (lora_config(), "config.lora.match is empty"),
        (lora_config("mixer", rank=0), r"config.lora: rank \(0\)"),
        (lora_config("mixer", alpha=-1.0), r"alpha \(-1.0\)"),
    ],
)
def test_wrong_settings_are_named(config, message):
    with pytest.raises(UserError, match=message):
        lora_axes(logical_axes(small_model()), config)
