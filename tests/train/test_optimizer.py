"""Which parameters are trained and by what: paths, freezing, schedules, AdamW and Muon, and where the optimizer's state lies."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import muon
from orbax.checkpoint import v1 as ocp

from qwen35_jax import ModelConfig
from qwen35_jax.errors import UserError
from qwen35_jax.model import Model
from qwen35_jax.planner import hlo
from qwen35_jax.sharding import Sharding, make_mesh
from qwen35_jax.train.config import default_config
from qwen35_jax.train.optimizer import decay_mask, groups, learning_rate, make_optimizer, state_shardings
from qwen35_jax.train.partition import flatten, join, logical_axes, matrix_axes, paths, split, unflatten


@functools.lru_cache
def small_model(mesh: str = "1x1") -> Model:
    """Gated DeltaNet, attention, experts and MTP; two units of two layers. Nothing is compiled."""
    config = ModelConfig.preset("tiny").replace(dtype="float32", num_hidden_layers=4, full_attention_interval=2)
    return Model(config, Sharding(make_mesh(mesh)))


def settings(**changes):
    config = default_config().optimizer
    config.update({"warmup_steps": 0, "schedule": "constant", **changes})
    return config


def last(path: str) -> str:
    return path.rpartition("/")[2]


# Paths and freezing


def test_paths_and_axes_are_those_of_the_stacked_parameters():
    model = small_model()
    params, axes = flatten(model.abstract_params()), flatten(logical_axes(model))
    assert set(params) == set(axes) == set(flatten(paths(model.abstract_params())).values())
    assert all(len(params[path].shape) == len(axes[path].split()) for path in params)
    assert axes["units/layers/0/mlp/experts/gate"] == "U E D F" and axes["mtp/fc"] == "G D D"


trees = st.recursive(st.integers(), lambda t: st.dictionaries(st.sampled_from("abcd"), t, min_size=1, max_size=3), max_leaves=8)


@given(st.dictionaries(st.sampled_from("abcd"), trees, min_size=1), st.data())
def test_split_and_join_are_inverse(tree, data):
    names = sorted(flatten(tree))
    chosen = data.draw(st.sets(st.sampled_from(names), max_size=len(names) - 1))
    trained, frozen = split(tree, [f"^{name}$" for name in chosen])
    assert set(flatten(frozen)) == chosen and set(flatten(trained)) == set(names) - chosen
    assert join(trained, frozen) == tree


def test_split_keeps_any_leaf_and_drops_empty_dicts():
    model = small_model()
    for tree in (model.abstract_params(), logical_axes(model), jax.tree.map(lambda x: x.sharding, model.abstract_params())):
        trained, frozen = split(tree, [r"^units/layers/0/", "^embed"])
        assert set(trained["units"]["layers"]) == {"1"} and set(frozen["units"]["layers"]) == {"0"}
        assert "embed" not in trained and set(frozen) == {"units", "embed"}
        assert jax.tree.leaves(join(trained, frozen)) == jax.tree.leaves(tree)


@pytest.mark.parametrize(
    ("regexes", "message"),
    [
        (("norm", "mixer/qq"), r"config.freeze: 'mixer/qq' matches no parameter; parameters are .*embed"),
        (("(",), r"config.freeze: '\(' is not a regular expression"),
        (("norm", "."), r"config.freeze: 'norm', '.' match every parameter"),
    ],
)
def test_split_refuses(regexes, message):
    with pytest.raises(UserError, match=message):
        split(logical_axes(small_model()), regexes)


@pytest.mark.parametrize(
    ("axes", "batch", "inputs"),
    [
        ("D K H", 0, 1), ("U D N G H", 1, 1), ("U N H D", 1, 2), ("E F D", 1, 1), ("U E D F", 2, 1), ("G D D", 1, 1),
        ("V D", 0, 1), ("U D X", 1, 1), ("U D N", 1, 1), ("U E D R", 2, 1), ("U N H R", 1, 2), ("U R K H", 1, 1), ("R D", 0, 1),
    ],
)  # fmt: skip
def test_matrix_axes(axes, batch, inputs):
    matrix = matrix_axes(axes)
    assert (matrix.batch, matrix.inputs) == (batch, inputs)


@pytest.mark.parametrize("axes", ["D", "U D", "U N", "H", "U H", "K H W", "U N H W"])
def test_vectors_and_convolutions_are_no_matrices(axes):
    assert matrix_axes(axes) is None


# Schedules


def test_cosine():
    rate = learning_rate(settings(schedule="cosine", learning_rate=2.0, warmup_steps=10, final_fraction=0.1), 110)
    np.testing.assert_allclose([rate(s) for s in (0, 5, 10, 60, 110, 200)], [0, 1, 2, 1.1, 0.2, 0.2], rtol=1e-6)


def test_wsd():
    config = settings(schedule="wsd", learning_rate=2.0, warmup_steps=10, decay_fraction=0.25, final_fraction=0.5)
    rate = learning_rate(config, 100)
    np.testing.assert_allclose([rate(s) for s in (0, 5, 10, 75, 80, 100, 200)], [0, 1, 2, 2, 1.8, 1, 1], rtol=1e-6)


def test_constant():
    rate = learning_rate(settings(learning_rate=2.0, warmup_steps=4), 10)
    np.testing.assert_allclose([rate(s) for s in (0, 1, 4, 10, 99)], [0, 0.5, 2, 2, 2], rtol=1e-6)
    assert learning_rate(settings(learning_rate=2.0), 10)(0) == 2.0


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_warm_up_may_take_all_steps(schedule):
    rate = learning_rate(settings(schedule=schedule, learning_rate=2.0, warmup_steps=10), 10)
    np.testing.assert_allclose([rate(5), rate(10)], [1, 2], rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "sgd"}, "optimizer.name is 'sgd'; accepted are adamw, muon"),
        ({"schedule": "step"}, "optimizer.schedule is 'step'; accepted are cosine, wsd, constant"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1; it must not be negative"),
        ({"clip_norm": -1.0}, "clip_norm is -1.0"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"eps": -1e-8}, "eps is -1e-08"),
        ({"muon_learning_rate": -1.0}, "muon_learning_rate is -1.0"),
        ({"b1": 1.0}, "b1 is 1.0; it must be at least 0 and below 1"),
        ({"b2": -0.5}, "b2 is -0.5"),
        ({"muon_b1": 1.5}, "muon_b1 is 1.5"),
        ({"decay_fraction": 1.5}, "decay_fraction is 1.5; it must be between 0 and 1"),
        ({"final_fraction": -0.5}, "final_fraction is -0.5"),
        ({"warmup_steps": 101}, r"warmup_steps \(101\) is more than all 100 steps"),
        ({"schedule": "wsd", "decay_fraction": 0.0}, r"decay_fraction \(0.0\) of 100 steps is no step"),
        ({"schedule": "wsd", "warmup_steps": 81}, r"leaves 80 of 100 steps, fewer than warmup_steps \(81\)"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(settings(**changes), 100, {"w": "D F"}, {"w": numbers(0)["mtp"]["fc"]})


# What happens to which parameter


def test_decayed_parameters_of_a_model():
    decayed = flatten(decay_mask(logical_axes(small_model())))
    assert {last(path) for path, on in decayed.items() if not on} == {
        "scale", "norm", "q_norm", "k_norm", "A_log", "dt_bias", "conv_q", "conv_k", "conv_v", "shared_gate",
    }  # fmt: skip
    assert {last(path) for path, on in decayed.items() if on} == {
        "embedding", "fc", "q", "k", "v", "z", "a", "b", "q_gate", "out", "router", "gate", "up", "down",
    }  # fmt: skip


def test_groups_of_a_model():
    labels = flatten(groups(logical_axes(small_model())))
    by_adam = {path for path, label in labels.items() if label == "adam"}
    assert {last(path) for path in by_adam} == {
        "embedding", "router", "scale", "norm", "q_norm", "k_norm", "A_log", "dt_bias", "shared_gate",
        "conv_q", "conv_k", "conv_v",
    }  # fmt: skip
    by_muon = labels.keys() - by_adam
    assert {last(path) for path in by_muon} == {"fc", "q", "k", "v", "z", "a", "b", "q_gate", "out", "gate", "up", "down"}
    assert flatten(groups({"lm_head": "V D"})) == {"lm_head": "adam"}


AXES = {
    "units": {
        "gate": "U E D F",
        "down": "U E F D",
        "out": "U N H D",
        "q_gate": "U D N G H",
        "conv": "U K H W",
        "router": "U D X",
    },
    "mtp": {"k": "D K H", "up": "E D F", "fc": "G D D", "norm": "D"},
    "embed": "V D",
}
SIZES = {"U": 2, "E": 3, "D": 6, "F": 4, "N": 2, "H": 5, "G": 2, "K": 2, "W": 4, "X": 3, "V": 7}


def numbers(seed: int) -> dict:
    random = np.random.default_rng(seed)
    place = NamedSharding(make_mesh("1x1"), P())
    return jax.tree.map(lambda a: jax.device_put(np.float32(random.normal(size=[SIZES[x] for x in a.split()])), place), AXES)


def matrices(tree: dict) -> dict[str, jax.Array]:
    """Each matrix that Muon takes, on its own and two-dimensional."""
    axes, labels = flatten(AXES), flatten(groups(AXES))
    found = {}
    for path, x in flatten(tree).items():
        if labels[path] != "adam":
            m = matrix_axes(axes[path])
            rows = int(np.prod(x.shape[m.batch : m.batch + m.inputs]))
            flat = x.reshape(-1, rows, int(np.prod(x.shape[m.batch + m.inputs :])))
            found |= {f"{path}/{i}": matrix for i, matrix in enumerate(flat)}
    return found


def run(optimizer: optax.GradientTransformation, params, gradients: list):
    """The last of the updates for a list of gradients."""

    @jax.jit
    def go(params, gradients):
        state = optimizer.init(params)
        for gradient in gradients:
            updates, state = optimizer.update(gradient, state, params)
        return updates

    return go(params, gradients)


def test_muon_of_stacked_parameters_is_muon_of_each_matrix():
    params, gradients = numbers(0), [numbers(1), numbers(2)]
    changes = {"learning_rate": 0.25, "muon_learning_rate": 0.5, "clip_norm": 0.0, "weight_decay": 0.0, "muon_b1": 0.9}
    got = run(make_optimizer(settings(name="muon", **changes), 10, AXES, params), params, gradients)
    first, second = (matrices(g) for g in gradients)
    # Nesterov: the second gradient, and beta times a momentum of both. The first update of a fresh Muon has that direction.
    momentum = jax.tree.map(lambda a, b: b + 0.9 * (b + 0.9 * a), first, second)
    want = run(muon(0.5, consistent_rms=0.2), matrices(params), [momentum])
    assert len(want) == 2 * (3 + 3 + 1 + 1) + 1 + 3 + 2
    for path, update in matrices(got).items():
        np.testing.assert_allclose(update, want[path], atol=2e-5, err_msg=path)
    adam = run(optax.adam(0.25, 0.9, 0.95), params, gradients)
    for path, label in flatten(groups(AXES)).items():
        if label == "adam":
            np.testing.assert_allclose(flatten(got)[path], flatten(adam)[path], atol=1e-6, err_msg=path)


def test_adamw():
    params, gradients = numbers(0), [numbers(1), numbers(2)]
    got = run(make_optimizer(settings(learning_rate=0.25, clip_norm=1.0, weight_decay=0.1), 10, AXES, params), params, gradients)
    mask = decay_mask(AXES)
    reference = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.25, 0.9, 0.95, weight_decay=0.1, mask=mask))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, run(reference, params, gradients))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_without_a_gradient_matrices_decay_and_vectors_stay(name):
    params = numbers(0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    changes = {"learning_rate": 0.5, "muon_learning_rate": 0.01, "weight_decay": 0.1}
    got = flatten(run(make_optimizer(settings(name=name, **changes), 10, AXES, params), params, [zeros]))
    for path, decays in flatten(decay_mask(AXES)).items():
        np.testing.assert_allclose(got[path], -0.05 * flatten(params)[path] * decays, rtol=1e-6, err_msg=path)


@pytest.mark.parametrize("axes", [{"norm": "D"}, {"units": {"q": "U D K H"}}, {"k": "D K H"}])
def test_muon_of_trees_without_some_of_the_groups(axes):
    place = NamedSharding(make_mesh("1x1"), P())
    params = jax.tree.map(lambda a: jax.device_put(np.ones([SIZES[x] for x in a.split()], np.float32), place), axes)
    updates = run(make_optimizer(settings(name="muon"), 10, axes, params), params, [params])
    assert jax.tree.all(jax.tree.map(lambda x: bool(jnp.isfinite(x).all() & (jnp.abs(x).max() > 0)), updates))


# Where the state lies


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_lie_as_their_parameters(name):
    model = small_model("4x2")
    axes, _ = split(logical_axes(model), ["^mtp/", "embed", "norm"])
    params, _ = split(model.abstract_params(), ["^mtp/", "embed", "norm"])
    optimizer = make_optimizer(settings(name=name), 10, axes, params)
    shardings = state_shardings(optimizer, params)
    state = jax.eval_shape(optimizer.init, params)
    assert jax.tree.structure(state) == jax.tree.structure(shardings)
    places = {path: (x.shape, x.sharding) for path, x in flatten(params).items()}
    moments = 0
    for (keys, x), place in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(shardings), strict=True):
        path = (
            "/".join(key.key for key in keys if isinstance(key, jax.tree_util.DictKey))
            .removeprefix("adam/")
            .removeprefix("muon/")
        )
        if path in places:
            assert (x.shape, place) == places[path] and x.dtype == jnp.float32
            moments += 1
        else:
            assert x.size == 1 and place.spec == P()
    adam = sum(label == "adam" for label in flatten(groups(axes)).values())
    assert moments == (2 * len(places) if name == "adamw" else len(places) + adam)


def test_state_survives_a_checkpoint(tmp_path):
    mesh = make_mesh("4x2")
    place = NamedSharding(mesh, P(None, "data"))
    axes = {"units": {"down": "U F D", "norm": "U D"}, "mtp": {"up": "D F"}}
    params = jax.tree.map(lambda a: jax.device_put(jnp.ones([4] * len(a.split())), place), axes)
    optimizer = make_optimizer(settings(name="muon"), 10, axes, params)
    shardings = state_shardings(optimizer, params)
    state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    state = jax.jit(lambda p, s: optimizer.update(p, s, p)[1], out_shardings=shardings)(params, state)
    ocp.save(tmp_path / "state", state)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
    loaded = ocp.load(tmp_path / "state", abstract)
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, loaded, state)
    assert jax.tree.map(lambda x: x.sharding, loaded) == shardings


def muon_collectives(axes: dict, params: dict) -> dict[str, int]:
    """The collectives of one compiled update."""
    optimizer = make_optimizer(settings(name="muon", clip_norm=0.0), 10, axes, params)
    places = state_shardings(optimizer, params)
    shapes = jax.eval_shape(optimizer.init, params)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)
    step = jax.jit(optimizer.update, out_shardings=(jax.tree.map(lambda x: x.sharding, params), places))
    return hlo.counts(step.lower(params, state, params).compile().as_text())


def test_muon_leaves_experts_on_their_devices():
    model = small_model("4x2")
    pattern = "^(?!units/layers/0/mlp/experts/)"
    axes, params = (split(tree, [pattern])[0] for tree in (logical_axes(model), model.abstract_params()))
    assert muon_collectives(axes, params) == {}


@pytest.mark.parametrize(
    ("axes", "shape", "spec", "collectives"),
    [
        # Cut over `data` too: each data shard gets some of the units and gives them back.
        ("U D F", (8, 16, 32), P(None, "data"), {"all-to-all": 2}),
        # Too few units: one gather, no more.
        ("U D F", (2, 16, 32), P(None, "data"), {"all-gather": 1}),
        ("D F", (16, 32), P("data"), {"all-gather": 1}),
    ],
)
def test_muon_gathers_matrices_once(axes, shape, spec, collectives):
    param = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(make_mesh("4x2"), spec))
    assert muon_collectives({"w": axes}, {"w": param}) == collectives


def test_sharded_muon_is_unsharded_muon():
    axes = {"units": {"up": "U D F", "down": "U F D"}, "mtp": {"k": "D K H"}}
    shapes = {"units": {"up": (4, 8, 16), "down": (2, 16, 8)}, "mtp": {"k": (8, 2, 4)}}
    specs = {"units": {"up": P(None, "data", "model"), "down": P(None, "model", "data")}, "mtp": {"k": P("data", "model")}}
    random = np.random.default_rng(0)
    host = jax.tree.map(lambda s: np.float32(random.normal(size=s)), shapes, is_leaf=lambda x: isinstance(x, tuple))
    updates = []
    for mesh in ("1x1", "4x2"):
        places = jax.tree.map(lambda s, mesh=mesh: NamedSharding(make_mesh(mesh), s), specs)
        params = jax.device_put(host, places)
        updates.append(run(make_optimizer(settings(name="muon"), 10, axes, params), params, [params]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7), *updates)


def test_unflatten_is_the_inverse_of_flatten():
    assert unflatten(flatten(AXES)) == AXES
