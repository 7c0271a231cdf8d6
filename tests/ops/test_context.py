"""Ops on sequences cut over a mesh axis against the same ops on whole ones in float64: recurrence, convolution, attention."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qwen35_jax.errors import UserError
from qwen35_jax.ops import attention as attention_ops
from qwen35_jax.ops.attention import ShardedCache, attention, cached_attention, xla
from qwen35_jax.ops.attention.reference import attention as attention_reference
from qwen35_jax.ops.causal_conv import causal_conv1d
from qwen35_jax.ops.causal_conv.reference import causal_conv1d as conv_reference
from qwen35_jax.ops.gated_delta import gated_delta_rule
from qwen35_jax.ops.gated_delta.reference import gated_delta_rule as rule_reference

TIME = 48
CUTS = [2, 4, 8]
# Documents of each row, one after the other; the rest is padding. At 2, 4 and 8 cuts shards end at multiples of 24, 12, 6.
ROWS = {
    "one document": [[48], [48]],
    "straddling": [[5, 9, 20, 14], [1, 46, 1]],
    "ending at cuts": [[6, 18, 24], [12, 12, 12, 12]],
    "padding": [[10, 14], [3]],
    "a row of padding": [[24, 7], []],
}


def segments(name: str) -> np.ndarray:
    rows = [np.repeat(np.arange(1, len(row) + 1), row) for row in ROWS[name]]
    return np.stack([np.pad(row, (0, TIME - len(row))) for row in rows]).astype(np.int32)


CUT, WHOLE = P(None, "data"), P()


def cut(op, shards: int, arguments: dict, whole: tuple[str, ...] = (), outputs=(CUT, WHOLE)):
    """`op` on sequences cut over `shards` devices; arguments named in `whole` are on all of them."""
    mesh = jax.make_mesh((shards,), ("data",), devices=jax.devices()[:shards], axis_types=(jax.sharding.AxisType.Auto,))
    specs = {name: WHOLE if name in whole else CUT for name in arguments}
    return jax.shard_map(lambda a: op(**a), mesh=mesh, in_specs=(specs,), out_specs=outputs, check_vma=False)(arguments)


@functools.partial(jax.jit, static_argnums=0)
def differentiate(op, inputs, segment_ids, cotangents):
    values, vjp = jax.vjp(lambda inputs: op(inputs, segment_ids), inputs)
    return values, vjp(cotangents)[0]


def check(cut_op, reference, inputs, segment_ids, outputs, real=None):
    """Values within 2e-5 and gradients within 2e-4 of float64, of the largest number where that is above 1.

    outputs: shapes. real: [B, T] bool, the tokens whose output counts."""
    rng = np.random.default_rng(1)
    cotangents = [rng.normal(size=shape).astype(np.float32) for shape in outputs]
    masks = [np.float32(1) if real is None or i else real[..., None, None].astype(np.float32) for i in range(len(outputs))]
    cotangents = tuple(x * m for x, m in zip(cotangents, masks, strict=True))
    got, gradients = differentiate(cut_op, inputs, segment_ids, cotangents)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(np.float64), (inputs, cotangents))
        want, want_gradients = jax.tree.map(np.asarray, differentiate(reference, wide[0], segment_ids, wide[1]))
    for x, y, mask in zip(got, want, masks, strict=True):
        np.testing.assert_allclose(x * mask, y * mask, atol=2e-5 * max(1, np.abs(y * mask).max()), rtol=0)
    for name, y in want_gradients.items():
        np.testing.assert_allclose(gradients[name], y, atol=2e-4 * max(1, np.abs(y).max()), rtol=0, err_msg=name)


def rule_inputs(decay: str) -> dict:
    rng = np.random.default_rng(0)
    shapes = {"q": (2, TIME, 1, 8), "k": (2, TIME, 1, 8), "v": (2, TIME, 2, 4), "initial_state": (2, 2, 8, 4)}
    shapes["beta"] = (2, TIME, 2)
    inputs = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    gates = {"weak": -1e-3 * np.ones((2, TIME, 2)), "mixed": -np.exp(2 * rng.normal(size=(2, TIME, 2)) - 2)}
    gates["strong"] = rng.choice([-1e-3, -40.0, -200.0], size=(2, TIME, 2))
    return jax.tree.map(np.float32, inputs | {"beta": 1 / (1 + np.exp(-inputs["beta"])), "g": gates[decay]})


@functools.cache
def rule_on(shards: int):
    def op(inputs, segment_ids):
        arguments = inputs | ({} if segment_ids is None else {"segment_ids": segment_ids})
        return cut(functools.partial(gated_delta_rule, context_axis="data"), shards, arguments, ("initial_state",))

    return op


def whole_rule(inputs, segment_ids):
    return rule_reference(**inputs, segment_ids=segment_ids)


@pytest.mark.parametrize("shards", CUTS)
@pytest.mark.parametrize("decay", ["weak", "mixed", "strong"])
def test_the_recurrence(shards, decay):
    inputs = rule_inputs(decay)
    check(rule_on(shards), whole_rule, inputs, None, (inputs["v"].shape, inputs["initial_state"].shape))


@pytest.mark.parametrize("shards", CUTS)
def test_the_recurrence_of_documents(shards):
    inputs = rule_inputs("mixed")
    for name in ROWS:
        ids = segments(name)
        check(rule_on(shards), whole_rule, inputs, ids, (inputs["v"].shape, inputs["initial_state"].shape), ids > 0)


@functools.cache
def conv_on(shards: int):
    def op(inputs, segment_ids):
        arguments = inputs | ({} if segment_ids is None else {"segment_ids": segment_ids})
        return cut(functools.partial(causal_conv1d, context_axis="data"), shards, arguments, ("w", "state"))

    return op


def whole_conv(inputs, segment_ids):
    return conv_reference(**inputs, segment_ids=segment_ids)


@pytest.mark.parametrize("shards", CUTS)
def test_the_convolution(shards):
    rng = np.random.default_rng(0)
    shapes = {"x": (2, TIME, 2, 3), "w": (2, 3, 4), "state": (2, 3, 2, 3)}
    inputs = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    outputs = inputs["x"].shape, inputs["state"].shape
    check(conv_on(shards), whole_conv, inputs, None, outputs)
    for name in ROWS:
        check(conv_on(shards), whole_conv, inputs, segments(name), outputs, segments(name) > 0)


def test_too_few_tokens_a_shard():
    with pytest.raises(UserError, match="2 tokens a shard of 'data'; pass at least 3"):
        conv_on(8)({"x": np.zeros((1, 16, 2, 3), np.float32), "w": np.zeros((2, 3, 4), np.float32)}, None)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks a shard, whose sizes divide nothing."""
    monkeypatch.setattr(xla, "BLOCK_Q", 4)
    monkeypatch.setattr(xla, "BLOCK_K", 5)


def attention_inputs(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(2, TIME, n, 16)).astype(np.float32) for name, n in (("q", 6), ("k", 2), ("v", 2))}


@functools.cache
def attention_on(shards: int):
    def op(inputs, segment_ids):
        arguments = inputs | ({} if segment_ids is None else {"segment_ids": segment_ids})
        return (cut(functools.partial(attention, context_axis="data"), shards, arguments, outputs=CUT),)

    return op


def whole_attention(inputs, segment_ids):
    return (attention_reference(**inputs, segment_ids=segment_ids),)


@pytest.mark.parametrize("shards", CUTS)
def test_attention(shards, small_blocks):
    inputs = attention_inputs()
    check(attention_on(shards), whole_attention, inputs, None, (inputs["q"].shape,))
    for name in ROWS:
        ids = segments(name)
        check(attention_on(shards), whole_attention, inputs, ids, (inputs["q"].shape,), ids > 0)


def test_attention_keeps_no_scores():
    """Of 8 x 2,048 tokens the scores of one head would be 1 GiB, those of a shard with another 16 MiB."""
    shapes = {name: jax.ShapeDtypeStruct((1, 16384, n, 16), jnp.float32) for name, n in (("q", 2), ("k", 1), ("v", 1))}
    step = jax.jit(jax.grad(lambda inputs: jnp.sum(attention_on(8)(inputs, None)[0])))
    assert step.lower(shapes).compile().memory_analysis().temp_size_in_bytes < 8 * 4 * 2**20


def test_wrong_calls():
    inputs = attention_inputs()
    for change in ({"implementation": "pallas_tpu"}, {"q_positions": np.zeros((2, TIME), np.int32)}):
        with pytest.raises(UserError, match="with a context_axis pass"):
            attention_ops.attention(**inputs, context_axis="data", **change)


@pytest.mark.parametrize("shards", CUTS)
@pytest.mark.parametrize("slots", [None, (2, 0)])
def test_a_cache_that_is_cut(shards, slots, small_blocks):
    """Prefills of 16 tokens, the last of fewer in one row, then token by token: as on the whole sequence."""
    inputs, chunk, prompt = attention_inputs(), 16, np.array([41, 32], np.int32)
    want = attention_reference(**inputs)
    places = None if slots is None else np.array(slots, np.int32)
    rng = np.random.default_rng(3)
    cache = {name: rng.normal(size=(2 if slots is None else 4, 2, TIME + 16, 16)).astype(np.float32) for name in ("k", "v")}
    got = np.zeros_like(want)

    @functools.partial(jax.jit, static_argnums=0)
    def step(tokens_cut, new, cache, start, count):
        layout = ShardedCache("data", chunk // shards, tokens_cut)
        spec, held = CUT if tokens_cut else WHOLE, P(None, None, "data")
        mesh = jax.make_mesh((shards,), ("data",), devices=jax.devices()[:shards], axis_types=(jax.sharding.AxisType.Auto,))

        def local(new, cache, slots, start, count):
            options = {"slots": slots, "start": start, "count": count, "layout": layout}
            out, k, v = cached_attention(new["q"], new["k"], new["v"], cache["k"], cache["v"], **options)
            return out, {"k": k, "v": v}

        specs = {"in_specs": (spec, held, WHOLE, WHOLE, WHOLE), "out_specs": (spec, held)}
        return jax.shard_map(local, mesh=mesh, **specs, check_vma=False)(new, cache, places, start, count)

    for begin in range(0, TIME, chunk):
        new = {name: x[:, begin : begin + chunk] for name, x in inputs.items()}
        start, count = np.full(2, begin, np.int32), np.clip(prompt - begin, 0, chunk).astype(np.int32)
        out, cache = step(True, new, cache, start, count)
        for row in range(2):
            got[row, begin : begin + count[row]] = out[row, : count[row]]
    for i in range(7):
        start = prompt + i
        new = {name: np.stack([x[row, start[row]] for row in range(2)])[:, None] for name, x in inputs.items()}
        out, cache = step(False, new, cache, start, np.array([1, i < 5], np.int32))
        for row in range(2 if i < 5 else 1):
            got[row, start[row]] = out[row, 0]
    np.testing.assert_allclose(got[0], want[0], atol=2e-6)
    np.testing.assert_allclose(got[1, :37], want[1, :37], atol=2e-6)
    if slots is not None:
        others = np.random.default_rng(3).normal(size=(4, 2, TIME + 16, 16)).astype(np.float32)[[1, 3]]
        np.testing.assert_array_equal(np.asarray(cache["k"])[[1, 3]], others)
