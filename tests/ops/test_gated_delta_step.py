"""The kernels of one or a few tokens of the gated delta rule, interpreted on the CPU, against the recurrence in float64."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from qwen35_jax.compat import HAS_MOSAIC_GPU
from qwen35_jax.errors import UserError
from qwen35_jax.ops.gated_delta import gated_delta_step, gpu_decode, reference
from tests.ops import mosaic_gpu

H, SLOTS = 128, 5
GATES = [0.0, -1e-3, -5.0, -40.0, -200.0]
# Relative Frobenius errors. All is computed in float32; out comes in the dtype of v, whose rounding is 2e-3.
LIMITS = {"float32": (1e-6, 1e-6), "bfloat16": (3e-3, 1e-6)}

on_hopper = pytest.mark.skipif(not HAS_MOSAIC_GPU, reason="Pallas Mosaic GPU kernels need JAX 0.11 or newer")


@pytest.fixture(params=["pallas_tpu", pytest.param("pallas_gpu", marks=on_hopper)])
def kernel(request):
    """A form, run or interpreted as a program of its device, with scratch that starts as NaN."""
    step = functools.partial(gated_delta_step, implementation=request.param)
    gpu = request.param == "pallas_gpu"
    if mosaic_gpu.has_gpu() and not gpu:
        pytest.skip("interpreted on the CPU")
    with mosaic_gpu.run_or_interpreted() if gpu else pltpu.force_tpu_interpret_mode():
        yield step


def make(batch=2, time=1, keys=2, heads=4, gate=GATES, repeated=False, dtype="float32", value_width=H, slots=SLOTS):
    """(q, k, v, g, beta, state of `slots` slots); repeated: one same key for all tokens."""
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, batch, time, keys, H))
    k = np.broadcast_to(k[:, :1], k.shape) if repeated else k
    v, beta = rng.normal(size=(batch, time, heads, value_width)), rng.uniform(size=(batch, time, heads))
    g = rng.choice(np.atleast_1d(gate), size=beta.shape)
    state = rng.normal(size=(slots, heads, H, value_width))
    return *(x.astype(dtype) for x in (q, k, v)), *(x.astype(np.float32) for x in (g, beta, state))


def error(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / max(np.linalg.norm(want), 1e-30)


def exact(inputs, slots, active=None, **options):
    """out, the rows' states after all tokens and after each, by the recurrence in float64 of the same inputs."""
    *tokens, state = inputs
    ids = None if active is None else active.astype(np.int32)
    with jax.enable_x64(True):
        wide = [np.asarray(x, np.float64) for x in tokens]
        row = np.asarray(state, np.float64)[slots]
        rule = jax.jit(functools.partial(reference.gated_delta_rule, **options))

        def until(t):
            return rule(*(x[:, :t] for x in wide), initial_state=row, segment_ids=None if ids is None else ids[:, :t])

        each = [until(t) for t in range(1, wide[0].shape[1] + 1)]
    return np.asarray(each[-1][0]), np.asarray(each[-1][1]), np.stack([s for _, s in each], axis=1)


def check(kernel, inputs, slots=(3, 1), active=None, **options):
    slots = np.array(slots, np.int32)
    got = jax.jit(functools.partial(kernel, return_states=True, **options))(*inputs, slots, active=active)
    want = exact(inputs, slots, active, **options)
    out, new, states = (np.asarray(x) for x in got)
    assert out.dtype == inputs[2].dtype and new.dtype == np.float32
    errors = [error(out, want[0]), error(new[slots], want[1]), error(states, want[2])]
    print([f"{x:.1e}" for x in errors])
    limits = LIMITS[inputs[2].dtype.name]
    assert errors[0] <= limits[0] and max(errors[1:]) <= limits[1], errors
    others = np.setdiff1d(np.arange(len(inputs[5])), slots)
    np.testing.assert_array_equal(new[others], inputs[5][others])
    np.testing.assert_array_equal(states[:, -1], new[slots])
    return states


@pytest.mark.parametrize(("time", "dtype"), [(1, "bfloat16"), (3, "float32"), (3, "bfloat16")])
def test_slots_of_a_larger_state(kernel, time, dtype):
    check(kernel, make(time=time, dtype=dtype))


def test_repeated_keys(kernel):
    check(kernel, make(time=4, repeated=True, gate=-1e-3))


def test_tokens_that_are_not_active_leave_the_state_to_the_bit(kernel):
    inputs = make(time=3)
    active = np.array([[True, True, False], [False, False, False]])
    states = check(kernel, inputs, active=active)
    np.testing.assert_array_equal(states[0, 2], states[0, 1])
    np.testing.assert_array_equal(states[1], np.broadcast_to(inputs[5][1], states[1].shape))


@pytest.mark.parametrize("kernel", ["pallas_tpu"], indirect=True)
def test_several_head_blocks(kernel):
    check(kernel, make(keys=16, heads=64), (0, 4))


def test_three_value_heads_per_key_head_wide_values_no_normalisation(kernel):
    q, k, *rest = make(time=2, keys=1, heads=3, value_width=2 * H)
    check(kernel, (q, k / np.linalg.norm(k, axis=-1, keepdims=True), *rest), normalize_qk=False)


def test_zero_keys_and_queries(kernel):
    q, k, *rest = make(keys=1, heads=1)
    check(kernel, (np.zeros_like(q), np.zeros_like(k), *rest))


@pytest.mark.parametrize("kernel", [pytest.param("pallas_gpu", marks=on_hopper)], indirect=True)
@pytest.mark.parametrize(("time", "stages"), [(1, 4), (3, 4), (1, 2)])
def test_blocks_of_many_strips(kernel, monkeypatch, time, stages):
    """Three thread blocks for 16 strips, more than each holds at once, not the same number for each."""
    monkeypatch.setattr(gpu_decode.ring, "SMS", 3)
    monkeypatch.setattr(gpu_decode, "BLOCKS_PER_SM", 1)
    monkeypatch.setattr(gpu_decode, "STAGES", stages)
    check(kernel, make(time=time))


@on_hopper
def test_as_many_tokens_as_there_is_room_for():
    assert gpu_decode._room(1, 4) == (2, 3) and gpu_decode._room(4, 4) == (2, 2) and gpu_decode._room(39, 4) == (1, 2)
    with pytest.raises(UserError, match="no room for 40 tokens"):
        gated_delta_step(*make(time=40, slots=2), implementation="pallas_gpu")


def test_no_races():
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    step = functools.partial(gated_delta_step, implementation="pallas_tpu")
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        jax.block_until_ready(jax.jit(step)(*make(time=2), np.array([3, 1])))
    assert not interpreter.races.races_found


@on_hopper
@pytest.mark.slow
def test_no_races_on_hopper(monkeypatch):
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

    monkeypatch.setattr(gpu_decode.ring, "SMS", 1)
    step = functools.partial(gated_delta_step, implementation="pallas_gpu", return_states=True)
    with mosaic_gpu.interpreted(detect_races=True):
        jax.block_until_ready(jax.jit(step)(*make(time=2), np.array([3, 1])))
    assert not interpreter.get_races().races_found


WIDTHS = {"pallas_tpu": (64, "Hk, Hv in multiples of 128, not 128, 64"), "pallas_gpu": (48, "Hv in multiples of 64, not 128, 48")}


def test_widths_that_it_cannot_run(kernel):
    width, message = WIDTHS[kernel.keywords["implementation"]]
    with pytest.raises(UserError, match=message):
        kernel(*make(value_width=width, slots=2))


def test_an_older_jax_has_no_hopper_kernel(monkeypatch):
    monkeypatch.setattr(gpu_decode, "HAS_MOSAIC_GPU", False)
    with pytest.raises(UserError, match="pallas_gpu needs jax 0.11 or newer"):
        gated_delta_step(*make(slots=2), implementation="pallas_gpu")
