"""Cached attention's TPU kernel, interpreted on the CPU, against the whole matrix of scores in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from qwen35_jax.errors import UserError
from qwen35_jax.ops.attention import ShardedCache, cached_attention, reference, tpu_cached

# Relative Frobenius error: in float32 sums of products in another order; in bfloat16 its operands' and results' 2e-3 each.
LIMITS = {"float32": 2e-6, "bfloat16": 8e-3}
WIDTH = 128
whole = jax.jit(reference.attention)
step = jax.jit(functools.partial(cached_attention, implementation="pallas_tpu"))


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    """Interpreted as a TPU program, with scratch that starts as NaN; blocks small enough for several of each kind."""
    with pytest.MonkeyPatch.context() as patch, pltpu.force_tpu_interpret_mode():
        patch.setattr(tpu_cached, "ROWS", 32)
        patch.setattr(tpu_cached, "KEYS", 16)
        patch.setattr(tpu_cached, "KEYS_OF_A_TOKEN", 32)
        yield


def make(start, time, heads=4, groups=2, places=96, dtype="float32", slots=None):
    """New q, k, v, and a cache that holds `start` tokens of each row and, behind them, numbers that nobody may see."""
    rng = np.random.default_rng(0)
    start = np.array(start, np.int32)
    count = len(start) if slots is None else max(slots) + 1
    q, k, v = (rng.normal(size=(len(start), time, n, WIDTH)).astype(jnp.dtype(dtype)) for n in (heads, groups, groups))
    cache = [rng.normal(size=(count, groups, places, WIDTH)).astype(jnp.dtype(dtype)) for _ in range(2)]
    for row, begin in enumerate(start):
        for held in cache:
            held[row if slots is None else slots[row], :, begin:] = 1e4
    return (q, k, v, *cache), {"slots": None if slots is None else np.array(slots, np.int32), "start": start}


def check(inputs, places, count, out, limit):
    """`out` is attention to the row's cache and its real new tokens; each row has to be right, and what is no row finite."""
    q, k, v, *cache = (np.array(x, np.float64) for x in inputs)
    start, slots = places["start"], np.arange(len(q)) if places["slots"] is None else places["slots"]
    for held, new in zip(cache, (k, v), strict=True):
        for row, slot in enumerate(slots):
            held[slot, :, start[row] : start[row] + count[row]] = np.swapaxes(new[row, : count[row]], 0, 1)
    keys, values = (np.swapaxes(held[slots], 1, 2) for held in cache)
    with jax.enable_x64(True):
        want = np.asarray(whole(q, keys, values, q_positions=start[:, None] + np.arange(q.shape[1])))
    assert np.isfinite(np.asarray(out, np.float32)).all() and out.dtype == inputs[0].dtype
    for got, right, n in zip(np.asarray(out, np.float64), want, count, strict=True):
        assert np.linalg.norm((got - right)[:n]) <= limit * np.linalg.norm(right[:n])


@pytest.mark.parametrize(
    ("time", "heads", "groups", "dtype"),
    [
        (1, 6, 1, "bfloat16"),
        (1, 8, 2, "float32"),
        (21, 6, 1, "float32"),
        (21, 8, 2, "bfloat16"),
        pytest.param(1, 2, 2, "float32", marks=pytest.mark.slow),
        pytest.param(21, 4, 1, "float32", marks=pytest.mark.slow),
    ],
)
def test_rows_at_their_own_lengths(time, heads, groups, dtype):
    """From an empty slot on and from others, with fewer real tokens than were passed, and one dead row."""
    inputs, places = make((0, 40, 17, 63), time, heads, groups, dtype=dtype)
    count = np.array([time, 0, max(time - 9, 1), time], np.int32)
    out, *cache = step(*inputs, **places, count=count)
    check(inputs, places, count, out, LIMITS[dtype])
    for held, old, new in zip(cache, inputs[3:], inputs[1:3], strict=True):
        np.testing.assert_array_equal(held[1], old[1])
        np.testing.assert_array_equal(np.swapaxes(held[3, :, 63 : 63 + time], 0, 1), new[3])


@settings(max_examples=12)
@given(st.lists(st.tuples(st.integers(0, 70), st.integers(0, 12)), min_size=3, max_size=3), st.permutations(range(4)))
def test_any_lengths_in_any_slots(rows, slots):
    """The last block of keys is cut off by the cache's end."""
    inputs, places = make([begin for begin, _ in rows], 12, places=90, slots=(*slots[:2], 4))
    count = np.array([n for _, n in rows], np.int32)
    check(inputs, places, count, step(*inputs, **places, count=count)[0], LIMITS["float32"])


def test_large_scores_do_not_overflow():
    inputs, places = make((30, 5), 8)
    inputs = (inputs[0] * 1e4, *inputs[1:])
    count = np.full(2, 8, np.int32)
    check(inputs, places, count, step(*inputs, **places, count=count)[0], LIMITS["float32"])


@pytest.mark.parametrize("shards", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_a_cache_cut_over_devices(shards):
    """Two prefills, the second one with padding and a row that has ended, and a token of each: as with XLA's form."""
    mesh, (one, two) = jax.make_mesh((shards,), ("c",), axis_types=(jax.sharding.AxisType.Auto,)), (jax.P(), jax.P(None, "c"))
    (q, k, v, *_), _ = make((0, 0), 25)
    cut, results = 12 // shards, {}
    for form in ("xla", "pallas_tpu"):
        cache, outs = [np.zeros((2, 2, 48, WIDTH), np.float32) for _ in range(2)], []
        for begin, time, count in ((0, 12, (12, 12)), (12, 12, (12, 3)), (24, 1, (1, 0))):
            layout = ShardedCache("c", cut, time > 1)
            call = functools.partial(cached_attention, implementation=form, layout=layout)
            tokens, places = (two if time > 1 else one), jax.P(None, None, "c")
            specs = {"in_specs": (*(tokens,) * 3, *(places,) * 2, one, one), "out_specs": (tokens, places, places)}
            local = functools.partial(lambda call, *x: call(*x[:5], start=x[5], count=x[6]), call)
            mapped = jax.shard_map(local, mesh=mesh, **specs, check_vma=False)
            new = [x[:, begin : begin + time] for x in (q, k, v)]
            out, *cache = jax.jit(mapped)(*new, *cache, np.full(2, begin, np.int32), np.array(count, np.int32))
            outs += [np.asarray(out)[row, :n] for row, n in enumerate(count)]
        results[form] = np.concatenate(outs)
    np.testing.assert_allclose(results["pallas_tpu"], results["xla"], rtol=0, atol=2e-6)


def test_no_races():
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    inputs, places = make((30, 5), 9)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        watched = jax.jit(functools.partial(cached_attention, implementation="pallas_tpu"))  # `step` is compiled without
        jax.block_until_ready(watched(*inputs, **places, count=np.full(2, 9, np.int32)))
    assert not interpreter.races.races_found


def test_other_widths_are_refused():
    (q, k, v, *cache), places = make((0,), 1)
    with pytest.raises(UserError, match="needs H in multiples of 128, not 64"):
        step(*(x[..., :64] for x in (q, k, v, *cache)), **places, count=np.ones(1, np.int32))
