"""Experts by all-to-all: the exchange itself, routing of every shape, passes and their memory, FP8, the choice. A whole
model in both forms is in tests/train/test_meshes.py."""

from __future__ import annotations

import functools
import re
from types import SimpleNamespace

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from qwen35_jax import ModelConfig, UserError
from qwen35_jax.ops.forms import resolve_forms
from qwen35_jax.ops.fp8 import Fp8Operand
from qwen35_jax.ops.moe import Routing, all_to_all, moe_apply, moe_form, moe_reference, products, route
from qwen35_jax.ops.moe.exchange import exchange, padded_exchange, ragged_exchange
from qwen35_jax.planner import hlo
from qwen35_jax.sharding import Sharding, make_mesh
from tests.ops.fp8_operands import quantize_weight

B, T, D, E, F, K = 8, 6, 16, 8, 12, 3


def sharding(mesh: str = "4x2") -> Sharding:
    return Sharding(make_mesh(mesh))


def random_experts(seed: int = 1, experts: int = E, d: int = D, width: int = F) -> dict:
    shapes = {"gate": (experts, d, width), "up": (experts, d, width), "down": (experts, width, d)}
    keys = jax.random.split(jax.random.key(seed), 3)
    return {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}


def with_gradients(apply, x, weights, experts, ids):
    """(values, gradients of x, the routing weights and the experts) of a function whose output is weighed at random."""
    y, back = jax.vjp(lambda x, weights, experts: apply(x, Routing(ids, weights), experts), x, weights, experts)
    return y, back(jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype))


def assert_close(ours, theirs, rtol: float = 2e-5):
    """Sums of some hundred float32 products in another order, relative to the largest number of each array."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=rtol * np.abs(b).max() + 1e-6)


# The exchange


def ragged_all_to_all_as_documented(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """From the documentation of `jax.lax.ragged_all_to_all`, with gathers: device i sends rows input_offsets[j] to
    input_offsets[j] + send_sizes[j] to device j, where they are written from output_offsets[j] on."""
    me = jax.lax.axis_index(axis_name)
    operands, starts, sizes, places = (
        jax.lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets)
    )
    row = jnp.arange(output.shape[0])
    for i in range(operands.shape[0]):
        rank = row - places[i, me]
        mine = (rank >= 0) & (rank < sizes[i, me])
        output = jnp.where(mine[:, None], operands[i][jnp.where(mine, starts[i, me] + rank, 0)], output)
    return output


def test_both_forms_of_the_exchange_are_one_function(monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all_as_documented)
    sizes = jax.random.randint(jax.random.key(0), (8, 8), 0, 6)  # [from, to]; some blocks are empty, some full
    rows = jax.random.normal(jax.random.key(1), (8, 8, 5, 4))  # what lies beyond the rows that are sent must not arrive

    def run(form, rows, sizes):
        def local(rows, sent, received):
            y, back = jax.vjp(lambda rows: form(rows[0], sent[0], received[0], axis="data")[None], rows)
            return y, back(jnp.cos(jnp.arange(y.size).reshape(y.shape)))[0]

        mapped = jax.shard_map(local, mesh=sharding("8x1").mesh, in_specs=jax.P("data"), out_specs=jax.P("data"), check_vma=False)
        return jax.jit(mapped)(rows, sizes, sizes.T)

    padded, ragged, used = (run(f, rows, sizes) for f in (padded_exchange, ragged_exchange, lambda *a, axis: exchange(*a, axis)))
    inside = np.arange(5) < np.asarray(sizes)[..., None]
    expected = np.where(inside[..., None], rows, 0).swapaxes(0, 1)
    for name, (y, gradient) in {"padded": padded, "ragged": ragged, "exchange": used}.items():
        np.testing.assert_array_equal(y, expected, err_msg=name)
        np.testing.assert_array_equal(gradient, padded[1], err_msg=name)  # autodiff of the padded form against the other two


def test_tpus_and_gpus_get_the_ragged_form():
    """Traced here and lowered for platforms that are not here."""
    mesh = sharding("8x1").mesh

    def local(rows, sizes):
        return jax.vjp(lambda rows: exchange(rows, sizes, sizes, "data"), rows)[1](rows)

    mapped = jax.shard_map(local, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"), check_vma=False)
    rows, sizes = jax.ShapeDtypeStruct((64, 4, 16), jnp.bfloat16), jax.ShapeDtypeStruct((64,), jnp.int32)
    traced = jax.jit(mapped).trace(rows, sizes)
    for platform in ("tpu", "cuda"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "ragged_all_to_all" in text and 'all_to_all"(' not in text.replace("ragged_all_to_all", ""), text
    assert "ragged" not in traced.lower(lowering_platforms=("cpu",)).as_text()


# Routing


@functools.cache
def compiled(form: str):
    return jax.jit(functools.partial(with_gradients, lambda *a: moe_apply(*a, sharding(), form)))


@settings(max_examples=12, derandomize=True)
@given(st.lists(st.integers(0, 9), min_size=E, max_size=E), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 2**16))
def test_any_group_sizes(favour, dead, seed):
    """Experts that are favoured so much that others stay empty, and a share of dead tokens, which are routed nowhere."""
    draw = np.random.default_rng(seed)
    x, logits = draw.standard_normal((B, T, D), np.float32), draw.standard_normal((B, T, E), np.float32)
    chosen = route(jnp.asarray(logits + np.array(favour, np.float32)), K, jnp.asarray(draw.random((B, T)) >= dead))[0]
    arguments = x, chosen.weights, random_experts(), chosen.experts
    ours, gather = (compiled(form)(*arguments) for form in ("all_to_all", "gather"))
    assert_close(ours[0], moe_reference(x, chosen, random_experts()))
    assert_close(ours, gather)


@pytest.mark.parametrize(("mesh", "experts"), [("2x4", 4), pytest.param("2x2x2", 6, marks=pytest.mark.slow)])
def test_features_over_model_where_experts_do_not_divide_the_mesh(mesh, experts):
    x, logits = jax.random.normal(jax.random.key(0), (B, T, D)), jax.random.normal(jax.random.key(1), (B, T, experts))
    chosen, weights = route(logits, K, jnp.ones((B, T), bool))[0], random_experts(experts=experts)
    arguments = x, chosen.weights, weights, chosen.experts
    ours = jax.jit(functools.partial(with_gradients, lambda *a: moe_apply(*a, sharding(mesh), "all_to_all")))(*arguments)
    assert_close(ours, with_gradients(moe_reference, *arguments))


def test_many_passes_give_the_same(monkeypatch):
    """Rows of one pair of devices in passes of three; all tokens of the first half of the batch ask for one device. The planner
    reads that even routing, 36 assignments of a device for eight others, would take two."""
    x, chosen = jax.random.normal(jax.random.key(0), (B, T, D)), jnp.zeros((B, T, K), jnp.int32).at[B // 2 :].set(E - 1)
    weights, experts = jax.random.uniform(jax.random.key(2), (B, T, K)), random_experts()
    expected = with_gradients(moe_reference, x, weights, experts, chosen)
    monkeypatch.setattr(all_to_all, "SMALLEST", 1)
    monkeypatch.setattr(products, "BUFFER_BYTES", 3 * 4 * ((6 * D + 3 * F) * 4 + 4 * D))
    step = jax.jit(functools.partial(with_gradients, lambda *a: moe_apply(*a, sharding(), "all_to_all")))
    program = step.lower(x, weights, experts, chosen).compile()
    assert_close(program(x, weights, experts, chosen), expected)
    runs, found = hlo.runs(program.as_text()), hlo.collectives(program.as_text())
    counts = [runs[c.computation].count for c in found if c.kind == "all-to-all"]
    # Rows there and back, again for the gradients, and these; how many rows there are is exchanged outside of the loop.
    assert counts.count(2) == 6 and counts.count(1) >= 1 and set(counts) == {1, 2}, counts


def test_memory_holds_one_pass_whatever_the_routing(monkeypatch):
    """512 tokens a device, three experts each: were all rows that may come here held at once, they would be 12,288."""
    d, width, tokens = 64, 64, 512
    experts = random_experts(d=d, width=width)
    x, ids = jnp.zeros((8, tokens, d)), jnp.zeros((8, tokens, K), jnp.int32)

    def temporaries() -> int:
        apply = functools.partial(with_gradients, lambda *a: moe_apply(*a, sharding("8x1"), "all_to_all"))
        lowered = jax.jit(apply).lower(x, jnp.zeros((8, tokens, K)), experts, ids)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    row = (6 * d + 3 * width) * 4 + 4 * d  # with the exchange's four copies: what BUFFER_BYTES counts
    assert temporaries() < 8 * tokens * K * row // 2
    whole = temporaries()
    monkeypatch.setattr(products, "BUFFER_BYTES", 8 * 16 * row)
    assert temporaries() < whole - 8 * (2 * tokens * K // 8 - 16) * row


@pytest.mark.parametrize("activations", [False, True])
def test_fp8_weights(activations):
    x, logits = jax.random.normal(jax.random.key(0), (B, T, 128)), jax.random.normal(jax.random.key(1), (B, T, E))
    chosen = route(logits, K, jnp.ones((B, T), bool))[0]
    experts = {name: quantize_weight(w, (1, 2)) for name, w in random_experts(d=128, width=128).items()}

    def run(form):
        def gradient(x, weights):
            y, back = jax.vjp(lambda *a: moe_apply(a[0], Routing(chosen.experts, a[1]), experts, sharding(), form,
                                                   fp8_activations=activations), x, weights)  # fmt: skip
            return y, back(jnp.cos(jnp.arange(y.size)).reshape(y.shape))

        return jax.jit(gradient)(x, chosen.weights)

    assert_close(run("all_to_all"), run("gather"))


def test_weights_trained_in_fp8(monkeypatch):
    """With all rows in one pass an expert's rows have one order in both forms, and so its gradient the same rounding."""
    monkeypatch.setattr(all_to_all, "HEADROOM", 10)
    x, logits = jax.random.normal(jax.random.key(0), (B, T, 128)), jax.random.normal(jax.random.key(1), (B, T, E))
    chosen = route(logits, K, jnp.ones((B, T), bool))[0]
    experts = {name: Fp8Operand(w) for name, w in random_experts(d=128, width=128).items()}

    def run(form):
        apply = functools.partial(with_gradients, lambda *a: moe_apply(*a, sharding(), form))
        return jax.jit(apply)(x, chosen.weights, experts, chosen.experts)

    ours, theirs = run("all_to_all"), run("gather")
    assert isinstance(ours[1][2]["gate"], Fp8Operand) and np.abs(ours[1][2]["gate"].value).max() > 0
    assert_close(ours, theirs)


def test_activations_travel_in_fp8():
    x, ids = jnp.zeros((B, T, 128), jnp.bfloat16), jnp.zeros((B, T, K), jnp.int32)
    experts = {name: quantize_weight(w, (1, 2)) for name, w in random_experts(d=128, width=128).items()}

    def bits(activations):
        apply = jax.jit(
            lambda *a: moe_apply(a[0], Routing(*a[1:]), experts, sharding(), "all_to_all", fp8_activations=activations)
        )
        text = apply.trace(x, ids, jnp.zeros((B, T, K))).lower(lowering_platforms=("tpu",)).as_text()
        return sorted(re.findall(r"ragged_all_to_all.*-> tensor<\d+x\d+x(\w+)>", text))

    assert bits(False) == ["bf16", "bf16"]  # there and back
    assert bits(True) == ["bf16", "f32", "f8E4M3FN"]  # values and scales there


# Collectives and choice


@pytest.mark.parametrize("mesh", ["8x1", "2x4"])
def test_collectives_of_each_form(mesh):
    """Gather: tokens, ids and weights; sums back. All-to-all: counts, rows there and back, the number of passes."""
    x, ids, peers = jnp.zeros((B, T, D)), jnp.zeros((B, T, K), jnp.int32), int(mesh[0])
    summed = [("all-reduce", T * B // peers * D * 4)] if mesh != "8x1" else []

    def found(form):
        apply = jax.jit(lambda *a: moe_apply(a[0], Routing(a[1], a[2]), a[3], sharding(mesh), form))
        text = apply.lower(x, ids, jnp.zeros((B, T, K)), random_experts()).compile().as_text()
        return [(c.kind, c.bytes) for c in hlo.collectives(text) if c.group > 1]

    assert sorted(c for c in found("gather") if c not in summed) == sorted(
        [("all-gather", T * B * D * 4), ("all-gather", T * B * K * 4), ("all-gather", T * B * K * 4)]
        + [("reduce-scatter", T * B * D * 4)]
    )
    # XLA:CPU writes an all-to-all as one array for each device. Rows: twice those of even routing, at most what there can be.
    rows = ("all-to-all", {"8x1": T, "2x4": 2 * T * B // peers * K // 8}[mesh] * D * 4)
    counts = ("all-to-all", E // 8 * 4)
    assert sorted(c for c in found("all_to_all") if c not in summed) == sorted([rows, rows, counts, ("all-reduce", 4)])


def tpu(data: int, model: int) -> Sharding:
    mesh = SimpleNamespace(
        devices=np.array([SimpleNamespace(platform="tpu")]), shape={"replica": 1, "data": data, "model": model}
    )
    return Sharding(mesh)


def test_the_rule():
    c = ModelConfig.preset("35b-a3b")
    sizes = c.num_experts, c.num_experts_per_tok, c.hidden_size, 2
    assert moe_form("auto", tpu(64, 1), 64 * 8192, *sizes) == "all_to_all"
    assert moe_form("auto", tpu(16, 4), 16 * 8192, *sizes) == "all_to_all"
    assert moe_form("auto", tpu(64, 1), 64, *sizes) == "gather"  # decode of a token a device: nothing to save
    assert moe_form("auto", tpu(1, 8), 8192, *sizes) == "gather"  # there is nobody to exchange with
    assert moe_form("auto", tpu(4, 1), 4 * 8192, *sizes) == "gather"  # every token has eight experts on four devices
    assert moe_form("auto", tpu(8, 6), 8 * 8192, *sizes) == "gather"  # F over `model`: every column needs all rows
    assert moe_form("auto", sharding("8x1"), 8 * 8192, *sizes) == "gather"  # CPU
    # 397b-a17b: ten rows a token there and back, or all tokens of eight: less only if rows go there in FP8, as they then do.
    large = 512, 10, 4096, 2
    assert [moe_form("auto", tpu(8, 1), 8 * 8192, *large, fp8) for fp8 in (False, True)] == ["gather", "all_to_all"]
    assert moe_form("all_to_all", sharding("8x1"), 8, *sizes) == "all_to_all"


def test_a_form_for_a_model_without_experts_is_an_error():
    with pytest.raises(UserError, match="this model has no experts"):
        resolve_forms(sharding().mesh, ModelConfig.preset("0.8b"), moe="all_to_all")
    with pytest.raises(UserError, match="'a2a' does not exist; choose from auto, gather, all_to_all"):
        resolve_forms(sharding().mesh, ModelConfig.preset("tiny"), moe="a2a")
