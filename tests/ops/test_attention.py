"""Blockwise and cached attention against the whole matrix of scores in float64; memory; what a cache row keeps."""

from __future__ import annotations

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from qwen35_jax.errors import UserError
from qwen35_jax.ops.attention import attention, cached_attention, reference, xla

TIME = 70


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks, whose sizes divide nothing, at lengths that compile fast."""
    monkeypatch.setattr(xla, "BLOCK_Q", 16)
    monkeypatch.setattr(xla, "BLOCK_K", 24)


def make(heads=6, groups=2, time=TIME, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=(batch, time, n, 16)).astype(np.float32) for n in (heads, groups, groups))


@functools.partial(jax.jit, static_argnums=0)
def differentiate(op, inputs, q_positions, segment_ids, cotangent):
    out, vjp = jax.vjp(lambda *x: op(*x, q_positions=q_positions, segment_ids=segment_ids), *inputs)
    return out, vjp(cotangent)


def check(inputs, q_positions=None, segment_ids=None, tolerance=2e-6):
    """Values, relative to the largest, within `tolerance` of float64; gradients within ten times that."""
    cotangent = np.random.default_rng(1).normal(size=inputs[0].shape).astype(np.float32)
    got = differentiate(attention, inputs, q_positions, segment_ids, cotangent)
    with jax.enable_x64(True):
        wide, cotangent = jax.tree.map(lambda x: x.astype(np.float64), (inputs, cotangent))
        want = differentiate(reference.attention, wide, q_positions, segment_ids, cotangent)
        want = jax.tree.map(np.asarray, want)
    np.testing.assert_allclose(got[0], want[0], atol=tolerance * np.abs(want[0]).max(), rtol=0)
    for name, x, y in zip("qkv", got[1], want[1], strict=True):
        np.testing.assert_allclose(x, y, atol=10 * tolerance * max(np.abs(y).max(), 1), rtol=0, err_msg=name)


@pytest.mark.parametrize("heads, groups", [(2, 2), (4, 2), (3, 1)])
def test_head_ratios(heads, groups):
    check(make(heads, groups))


def test_one_token():
    check(make(time=1))


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), min_size=1, max_size=6), st.integers(0, 2**16))
def test_any_segments_and_positions(runs, seed):
    """Documents of any length, padding anywhere, and queries at any positions in any order."""
    ids = np.concatenate([np.full(n, 0 if step == 0 else i + 1) for i, (step, n) in enumerate(runs)])
    ids = np.pad(ids, (0, TIME))[:TIME].astype(np.int32)
    q, k, v = make(seed=seed)
    positions = np.random.default_rng(seed).integers(0, TIME, (2, 40)).astype(np.int32)
    check((q[:, :40], k, v), positions, np.stack([ids, np.ones_like(ids)]))


def test_packed_equals_separate():
    q, k, v = make(batch=1)
    ids = np.repeat([1, 2, 3], [20, 33, 17]).astype(np.int32)[None]
    packed = jax.jit(attention)(q, k, v, segment_ids=ids)
    for begin, end in ((0, 20), (20, 53), (53, 70)):
        alone = jax.jit(attention)(*(x[:, begin:end] for x in (q, k, v)))
        np.testing.assert_allclose(packed[:, begin:end], alone, atol=2e-6)


def test_large_scores_do_not_overflow():
    q, k, v = make()
    check((100 * q, k, v), tolerance=3e-5)  # scores of 1000 have errors of 6e-5 before the exponential


def test_bfloat16_stays_close():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in make())
    out = jax.jit(attention)(q, k, v)
    want = jax.jit(reference.attention)(q, k, v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(np.float32), want, atol=2e-2)


def test_memory_grows_with_length_not_with_its_square(monkeypatch):
    """At 16,384 tokens the scores of one head would be 1 GiB; a forward and backward pass has blocks of them."""
    monkeypatch.undo()
    shapes = [jax.ShapeDtypeStruct((1, 16384, n, 16), jnp.float32) for n in (2, 1, 1)]
    step = jax.jit(jax.grad(lambda *x: jnp.sum(attention(*x)), argnums=(0, 1, 2)))
    assert step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes < 64 * 2**20


def make_cache(slots, keys=90, groups=2, seed=3):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(slots, groups, keys, 16)).astype(np.float32) for _ in range(2)]


@pytest.mark.parametrize("slots", [None, (2, 0)])
@pytest.mark.parametrize("parts", [(70,), (30, 39, 1)])
def test_cache_in_parts_equals_whole(slots, parts):
    inputs = make()
    want = jax.jit(reference.attention)(*inputs)
    before = make_cache(2 if slots is None else 4)
    cache, outs, start = before, [], 0
    step = jax.jit(cached_attention)
    places = None if slots is None else np.array(slots)
    for count in parts:
        new = [x[:, start : start + count] for x in inputs]
        lengths = {"start": np.full(2, start, np.int32), "count": np.full(2, count, np.int32)}
        out, *cache = step(*new, *cache, slots=places, **lengths)
        outs.append(out)
        start += count
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), want, atol=2e-6)
    rows = [0, 1] if slots is None else list(slots)
    for i, (held, old) in enumerate(zip(cache, before, strict=True), start=1):
        np.testing.assert_array_equal(np.swapaxes(np.asarray(held)[rows, :, :TIME], 1, 2), inputs[i])
        others = [s for s in range(len(old)) if s not in rows]
        np.testing.assert_array_equal(np.asarray(held)[others], old[others])


@pytest.mark.parametrize("time", [1, 40])
def test_rows_at_their_own_lengths(time):
    """Rows that start at different lengths, with fewer real tokens than were passed, and one dead row."""
    start, count = np.array([17, 50, 3], np.int32), np.array([time, 0, max(time - 9, 1)], np.int32)
    q, k, v = make(batch=3, time=time)
    before = make_cache(3)
    out, *cache = jax.jit(cached_attention)(q, k, v, *before, start=start, count=count)
    for row in (0, 2):
        begin, n = start[row], count[row]
        keys, values = (
            np.concatenate([np.swapaxes(old[row, :, :begin], 0, 1), new[row, :n]])[None]
            for old, new in zip(before, (k, v), strict=True)
        )
        want = reference.attention(q[row : row + 1, :n], keys, values, q_positions=begin + np.arange(n)[None])
        np.testing.assert_allclose(out[row, :n], want[0], atol=2e-6)
    for held, old in zip(cache, before, strict=True):
        np.testing.assert_array_equal(held[1], old[1])
    assert np.isfinite(out).all()


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("time", [1, 16])
def test_a_donated_cache_is_updated_in_place(time, batch):
    shapes = [jax.ShapeDtypeStruct((batch, time, n, 64), jnp.float32) for n in (8, 2, 2)]
    cache = [jax.ShapeDtypeStruct((batch, 2, 4096, 64), jnp.float32)] * 2
    numbers = {name: jax.ShapeDtypeStruct((batch,), jnp.int32) for name in ("start", "count")}
    step = jax.jit(cached_attention, donate_argnums=(3, 4))
    memory = step.lower(*shapes, *cache, **numbers).compile().memory_analysis()
    one = batch * 2 * 4096 * 64 * 4
    assert memory.alias_size_in_bytes == 2 * one
    assert memory.temp_size_in_bytes < one / 4


def test_under_shard_map():
    inputs = make(8, 4)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.P("data", None, "model")
    sharded = jax.shard_map(attention, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    np.testing.assert_allclose(jax.jit(sharded)(*inputs), attention(*inputs), atol=2e-6)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda q, k, v: attention(q, k, v[:, 1:]), "q is"),
        (lambda q, k, v: attention(q[:, :, :5], k, v), "5 query heads on 2 key heads"),
        (lambda q, k, v: attention(q, k[:, :9], v[:, :9]), "70 queries on 9 keys"),
        (lambda q, k, v: attention(q, k, v, q_positions=np.zeros((2, 3), np.int32)), "q_positions has shape"),
        (lambda q, k, v: attention(q, k, v, segment_ids=np.zeros((2, 3), np.int32)), "segment_ids has shape"),
        (lambda q, k, v: attention(q, k, v, implementation="flash"), "no 'flash' implementation"),
        (lambda q, k, v: cached(q, k, v, slots=3), "2 rows on 3 slots"),
        (lambda q, k, v: cached(q, k, v, keys=60), "do not fit a cache of 60"),
        (lambda q, k, v: cached(q, k, v, groups=1), "caches are"),
        (lambda q, k, v: cached(q, k, v, start=(0, 0, 0)), "start has shape"),
    ],
)
def test_wrong_calls(call, message):
    with pytest.raises(UserError, match=message):
        call(*make())


def cached(q, k, v, slots=2, keys=90, groups=2, start=(0, 0)):
    cache = make_cache(slots, keys, groups)
    return cached_attention(q, k, v, *cache, start=np.array(start), count=np.zeros(2, np.int32))
