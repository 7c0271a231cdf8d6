"""The kernels of cached attention, interpreted on the CPU, against the whole matrix of scores in float64."""

from __future__ import annotations

import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from qwen35_jax.compat import HAS_MOSAIC_GPU
from qwen35_jax.errors import UserError
from qwen35_jax.ops.attention import ShardedCache, cached_attention, gpu_cached, reference, tpu_cached
from qwen35_jax.ops.attention.cached import KERNELS
from tests.ops import mosaic_gpu

# Relative Frobenius error: in float32 sums of products in another order; in bfloat16 its operands' and results' 2e-3 each.
LIMITS = {"float32": 2e-6, "bfloat16": 8e-3}
WIDTH = 128
whole = jax.jit(reference.attention)
on_hopper = pytest.mark.skipif(not HAS_MOSAIC_GPU, reason="Pallas Mosaic GPU kernels need JAX 0.11 or newer")
FORMS = ["pallas_tpu", pytest.param("pallas_gpu", marks=on_hopper)]


@contextlib.contextmanager
def small_blocks(form: str):
    """A form, run or interpreted as a program of its device, with scratch that starts as NaN; blocks small enough for several of
    each kind, and keys in parts."""
    gpu = form == "pallas_gpu"
    if mosaic_gpu.has_gpu() and not gpu:
        pytest.skip("interpreted on the CPU")
    with pytest.MonkeyPatch.context() as patch, mosaic_gpu.run_or_interpreted() if gpu else pltpu.force_tpu_interpret_mode():
        patch.setattr(tpu_cached, "ROWS", 32)
        patch.setattr(tpu_cached, "KEYS", 16)
        patch.setattr(tpu_cached, "KEYS_OF_A_TOKEN", 32)
        patch.setattr(gpu_cached, "LEAST_BLOCKS", 2)
        if not mosaic_gpu.has_gpu():
            patch.setattr(gpu_cached, "KEYS", 16)
        yield


class Step:
    """`cached_attention` in one form, compiled."""

    def __init__(self, form: str):
        self.form, self.call = form, jax.jit(functools.partial(cached_attention, implementation=form))

    def __call__(self, *arguments, **options):
        return self.call(*arguments, **options)


@pytest.fixture(params=FORMS, scope="module")
def step(request):
    with small_blocks(request.param):
        yield Step(request.param)


@pytest.fixture(scope="module")
def widest(step):
    """The widest dtype of the form's caches."""
    return "bfloat16" if step.form == "pallas_gpu" else "float32"


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
        (1, 8, 2, "widest"),
        (21, 6, 1, "widest"),
        (21, 8, 2, "bfloat16"),
        pytest.param(9, 16, 1, "bfloat16", marks=pytest.mark.slow),
        pytest.param(1, 2, 2, "widest", marks=pytest.mark.slow),
        pytest.param(21, 4, 1, "widest", marks=pytest.mark.slow),
    ],
)
def test_rows_at_their_own_lengths(step, widest, time, heads, groups, dtype):
    """From an empty slot on and from others, with fewer real tokens than were passed, and one dead row."""
    dtype = widest if dtype == "widest" else dtype
    inputs, places = make((0, 40, 17, 63), time, heads, groups, dtype=dtype)
    count = np.array([time, 0, max(time - 9, 1), time], np.int32)
    out, *cache = step(*inputs, **places, count=count)
    check(inputs, places, count, out, LIMITS[dtype])
    for held, old, new in zip(cache, inputs[3:], inputs[1:3], strict=True):
        np.testing.assert_array_equal(held[1], old[1])
        np.testing.assert_array_equal(np.swapaxes(held[3, :, 63 : 63 + time], 0, 1), new[3])


@settings(max_examples=12)
@given(rows=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 12)), min_size=3, max_size=3), slots=st.permutations(range(4)))
def test_any_lengths_in_any_slots(step, widest, rows, slots):
    """The last block of keys is cut off by the cache's end."""
    inputs, places = make([begin for begin, _ in rows], 12, places=86, dtype=widest, slots=(*slots[:2], 4))
    count = np.array([n for _, n in rows], np.int32)
    check(inputs, places, count, step(*inputs, **places, count=count)[0], LIMITS[widest])


def test_large_scores_do_not_overflow(step, widest):
    inputs, places = make((30, 5), 8, dtype=widest)
    inputs = ((inputs[0] * 1e4).astype(widest), *inputs[1:])
    count = np.full(2, 8, np.int32)
    check(inputs, places, count, step(*inputs, **places, count=count)[0], LIMITS[widest])


@pytest.mark.parametrize("cut", [(0, 9), (3, 3), (6, 3)])
def test_one_part_of_a_softmax(step, widest, cut):
    """As a device with the cache's next keys, or `limit` of a step's new ones, has it; the first row is still empty."""
    inputs, _ = make((30, 30), 9, heads=6, groups=2, dtype=widest)
    q, keys, values = (np.array(x, np.float64) for x in (inputs[0], *inputs[3:]))
    base, count = np.array([0, 17], np.int32), np.array([9, 7], np.int32)
    attend = jax.jit(functools.partial(KERNELS[step.form], partial=True))
    out, log_sum = (np.asarray(x, np.float64) for x in attend(inputs[0], *inputs[3:], None, base, count, cut))
    assert out.shape == q.shape and log_sum.shape == q.shape[:3]
    for row, t, head in itertools.product(range(2), range(9), range(6)):
        number = base[row] + np.clip(t + 1 - cut[0], 0, cut[1])
        if t >= count[row]:
            continue
        if number == 0:
            assert log_sum[row, t, head] == -np.inf and not out[row, t, head].any()
            continue
        scores = keys[row, head // 3, :number] @ q[row, t, head] / np.sqrt(WIDTH)
        total = np.log(np.sum(np.exp(scores - scores.max()))) + scores.max()
        want = np.exp(scores - total) @ values[row, head // 3, :number]
        np.testing.assert_allclose(log_sum[row, t, head], total, rtol=0, atol=1e-5)
        assert np.linalg.norm(out[row, t, head] - want) <= LIMITS[widest] * np.linalg.norm(want)


@pytest.mark.parametrize(
    ("step", "shards"),
    # JAX's interpreter runs GPU kernels on one device at a time.
    [("pallas_tpu", 4), pytest.param("pallas_tpu", 2, marks=pytest.mark.slow), pytest.param("pallas_gpu", 1, marks=on_hopper)],
    indirect=["step"],
)
def test_a_cache_cut_over_devices(step, widest, shards):
    """Two prefills, the second one with padding and a row that has ended, and a token of each: as with XLA's form."""
    mesh, (one, two) = jax.make_mesh((shards,), ("c",), axis_types=(jax.sharding.AxisType.Auto,)), (jax.P(), jax.P(None, "c"))
    (q, k, v, *_), _ = make((0, 0), 25, dtype=widest)
    cut, results = 12 // shards, {}
    for form in ("xla", step.form):
        cache, outs = [np.zeros((2, 2, 48, WIDTH), jnp.dtype(widest)) for _ in range(2)], []
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
        results[form] = np.concatenate(outs).astype(np.float64)
    got, want = results[step.form], results["xla"]
    assert np.linalg.norm(got - want) <= LIMITS[widest] * np.linalg.norm(want)


def test_no_races_on_tpu():
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    inputs, places = make((30, 5), 9)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        jax.block_until_ready(Step("pallas_tpu")(*inputs, **places, count=np.full(2, 9, np.int32)))
    assert not interpreter.races.races_found


@on_hopper
@pytest.mark.slow
def test_no_races_on_hopper():
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

    inputs, places = make((30, 5), 9, heads=16, groups=1, dtype="bfloat16")
    with pytest.MonkeyPatch.context() as patch, mosaic_gpu.interpreted(detect_races=True):
        patch.setattr(gpu_cached, "KEYS", 16)
        jax.block_until_ready(Step("pallas_gpu")(*inputs, **places, count=np.full(2, 9, np.int32)))
    assert not interpreter.get_races().races_found


@on_hopper
def test_an_older_jax_has_no_hopper_kernel(monkeypatch):
    monkeypatch.setattr(gpu_cached, "HAS_MOSAIC_GPU", False)
    inputs, places = make((0,), 1, dtype="bfloat16")
    with pytest.raises(UserError, match="pallas_gpu needs jax 0.11 or newer"):
        cached_attention(*inputs, **places, count=np.ones(1, np.int32), implementation="pallas_gpu")


@pytest.mark.parametrize(
    ("form", "message"),
    [("pallas_tpu", "in multiples of 128, not 64"), pytest.param("pallas_gpu", "not 64, 2 and", marks=on_hopper)],
)
def test_other_widths_are_refused(form, message):
    (q, k, v, *cache), places = make((0,), 1)
    with pytest.raises(UserError, match=message):
        Step(form)(*(x[..., :64] for x in (q, k, v, *cache)), **places, count=np.ones(1, np.int32))
