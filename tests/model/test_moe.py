"""The mixture of experts against every expert on every token: meshes, skewed routing, dead tokens, chunks, gradients, FP8."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen35_jax import UserError
from qwen35_jax.ops.fp8 import dequantize
from qwen35_jax.ops.moe import EXPERT_AXES, Routing, moe_apply, moe_reference, products, route
from qwen35_jax.sharding import Sharding, make_mesh
from tests.ops.fp8_operands import quantize_weight

B, T, D, E, F, K = 8, 6, 16, 8, 12, 3


def example(routing: str, experts: int = E, width: int = F):
    keys = jax.random.split(jax.random.key(0), 6)
    x = jax.random.normal(keys[0], (B, T, D))
    weights = {
        "gate": jax.random.normal(keys[1], (experts, D, width)),
        "up": jax.random.normal(keys[2], (experts, D, width)),
        "down": jax.random.normal(keys[3], (experts, width, D)),
    }
    logits = jax.random.normal(keys[4], (B, T, experts))
    if routing == "skewed":  # the same three experts for every token, the others stay empty
        logits = logits * 0.01 + jnp.where(jnp.arange(experts) < K, 9.0, 0.0)
    alive = jnp.ones((B, T), bool) if routing != "dead" else jax.random.bernoulli(keys[5], 0.4, (B, T))
    return x, route(logits, K, alive)[0], weights


MESHES = [
    *((mesh, "gather") for mesh in ("1x1", "8x1", "1x8", "4x2", "2x2x2")),
    *((mesh, "all_to_all") for mesh in ("8x1", "4x2", "2x4", "1x8", "2x2x2")),
]
EASIER = [("1x1", "gather"), ("4x2", "gather"), ("2x2x2", "all_to_all")]  # on other meshes these routings are slow tests


@pytest.mark.parametrize(
    ("mesh", "form", "routing"),
    [
        *((*case, "skewed") for case in MESHES),
        *(
            pytest.param(*case, routing, marks=[pytest.mark.slow] * (case not in EASIER))
            for case in MESHES
            for routing in ("even", "dead")
        ),
    ],
)
def test_equals_the_reference_with_gradients(mesh, form, routing):
    sharding = Sharding(make_mesh(mesh))
    x, chosen, experts = example(routing)

    def loss(apply, x, weights, experts):
        y = apply(x, Routing(chosen.experts, weights), experts)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape))), y

    ours = jax.jit(
        jax.value_and_grad(functools.partial(loss, lambda x, r, e: moe_apply(x, r, e, sharding, form)), (0, 1, 2), has_aux=True)
    )
    reference = jax.value_and_grad(functools.partial(loss, moe_reference), (0, 1, 2), has_aux=True)
    (_, y), gradients = ours(x, chosen.weights, experts)
    (_, expected), expected_gradients = reference(x, chosen.weights, experts)
    np.testing.assert_allclose(y, expected, atol=2e-4)  # sums of some hundred products of size one in float32
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max() + 1e-6)


def test_experts_that_do_not_divide_the_mesh_go_over_data_and_features_over_model():
    sharding = Sharding(make_mesh("4x2"))
    x, chosen, experts = example("even", experts=4)
    y = jax.jit(lambda *a: moe_apply(*a, sharding))(x, chosen, experts)
    np.testing.assert_allclose(y, moe_reference(x, chosen, experts), atol=2e-4)


def test_chunks_give_the_same(monkeypatch):
    sharding = Sharding(make_mesh("2x1"))
    x, chosen, experts = example("dead")

    def run(x, experts):
        y, back = jax.vjp(lambda x, experts: moe_apply(x, chosen, experts, sharding), x, experts)
        return y, back(jnp.cos(jnp.arange(y.size).reshape(y.shape)))

    whole = jax.jit(run)(x, experts)
    monkeypatch.setattr(products, "BUFFER_BYTES", 2000)
    chunked = jax.jit(lambda *a: run(*a))(x, experts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max()), chunked, whole)


def test_the_backward_pass_holds_the_rows_of_one_chunk(monkeypatch):
    """512 tokens times three experts, D and F 64: all rows with what the products keep of them would be 2 MiB."""
    keys = jax.random.split(jax.random.key(0), 5)
    x, logits = jax.random.normal(keys[0], (1, 512, 64)), jax.random.normal(keys[1], (1, 512, 8))
    chosen = route(logits, 3, jnp.ones((1, 512), bool))[0]
    experts = {n: jax.random.normal(k, (8, 64, 64)) for n, k in zip(("gate", "up", "down"), keys[2:], strict=True)}

    def temporaries():
        gradient = jax.grad(lambda x, experts: jnp.sum(moe_apply(x, chosen, experts, Sharding(make_mesh("1x1")))), (0, 1))
        return jax.jit(gradient).lower(x, experts).compile().memory_analysis().temp_size_in_bytes

    whole = temporaries()
    monkeypatch.setattr(products, "BUFFER_BYTES", 100_000)
    assert temporaries() < whole - 2**20


@pytest.mark.parametrize("mesh", ["1x1", "1x4"])
def test_fp8_experts_equal_their_dequantised_weights(mesh):
    # 384 is three blocks: they do not go on four shards, so F stays whole and nothing may be added up twice.
    sharding = Sharding(make_mesh(mesh))
    x, chosen, experts = example("even", experts=6, width=384)
    experts = {name: quantize_weight(w, (1, 2)) for name, w in experts.items()}
    plain = {name: dequantize(w, jnp.float32) for name, w in experts.items()}
    y = jax.jit(lambda *a: moe_apply(*a, sharding))(x, chosen, experts)
    expected = moe_reference(x, chosen, plain)
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())


def test_routing_is_renormalised_and_dead_tokens_go_nowhere():
    logits = jax.random.normal(jax.random.key(1), (2, 3, E))
    alive = jnp.array([[True, False, True], [True, True, False]])
    chosen, _ = route(logits, K, alive)
    np.testing.assert_allclose(chosen.weights.sum(-1), alive.astype(float), atol=1e-6)
    assert (chosen.experts[~alive] == E).all() and (chosen.experts[alive] < E).all()


def test_unknown_form():
    x, chosen, experts = example("even")
    with pytest.raises(UserError, match="choose from auto, gather, all_to_all"):
        moe_apply(x, chosen, experts, Sharding(make_mesh("1x1")), "a2a")
    assert set(experts) == set(EXPERT_AXES)
