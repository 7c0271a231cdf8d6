"""A step of a Gated DeltaNet layer, convolution and gates included, in each form, against the references in float64."""

from __future__ import annotations

import contextlib
import functools

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from qwen35_jax.compat import HAS_MOSAIC_GPU
from qwen35_jax.errors import UserError
from qwen35_jax.ops.gated_delta import gpu_decode
from qwen35_jax.ops.gated_delta_net import gated_delta_net_step, reference
from tests.ops import mosaic_gpu

H, SLOTS = 128, 5
RUN = {"xla": contextlib.nullcontext, "pallas_tpu": pltpu.force_tpu_interpret_mode, "pallas_gpu": mosaic_gpu.run_or_interpreted}
on_hopper = pytest.mark.skipif(not HAS_MOSAIC_GPU, reason="Pallas Mosaic GPU kernels need JAX 0.11 or newer")
FORMS = ["xla", "pallas_tpu", pytest.param("pallas_gpu", marks=on_hopper)]
# Relative Frobenius errors of out and the recurrent state. In bfloat16 the convolution's results are rounded, 2e-3 each, as q, k
# and v; all after it is in float32.
LIMITS = {"float32": 1e-6, "bfloat16": 5e-3}


def make(batch=2, time=1, keys=2, heads=4, dtype="float32", width=H, slots=SLOTS, value_width=None):
    """x, w and state of gated_delta_net_step; every head another decay, some of them strong."""
    rng = np.random.default_rng(0)

    def low(*shape, scale=1.0):
        return (scale * rng.normal(size=shape)).astype(dtype)

    value_width = value_width or width
    parts = {"q": (keys, width), "k": (keys, width), "v": (heads, value_width)}
    x = {name: low(batch, time, *shape) for name, shape in parts.items()}
    x |= {name: low(batch, time, heads, scale=3) for name in "ab"}
    w = {f"conv_{name}": low(*shape, 4) for name, shape in parts.items()}
    w |= {"A_log": np.linspace(-3, 3, heads, dtype=np.float32), "dt_bias": low(heads)}
    state = {f"conv_{name}": low(slots, 3, *shape) for name, shape in parts.items()}
    state["recurrent"] = rng.normal(size=(slots, heads, width, value_width)).astype(np.float32)
    return x, w, state


def error(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


def exact(x, w, state, active):
    """Of rows of slots of their own, in float64 of the same inputs."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: np.asarray(a, np.float64), (x, w, state))
        return jax.tree.map(np.asarray, jax.jit(reference.gated_delta_net_step)(*wide, active=active))


def check(form, x, w, state, slots=(3, 1), active=None):
    slots, batch, time = np.array(slots, np.int32), *x["q"].shape[:2]
    active = np.ones((batch, time), bool) if active is None else active
    if mosaic_gpu.has_gpu() and form != "pallas_gpu":
        pytest.skip("interpreted on the CPU")
    with RUN[form]():
        step = jax.jit(functools.partial(gated_delta_net_step, return_states=True, implementation=form))
        out, new, states = jax.tree.map(np.asarray, step(x, w, state, slots, active=active))
    assert out.dtype == x["v"].dtype and {n: a.dtype for n, a in new.items()} == {n: a.dtype for n, a in state.items()}
    rows = {name: a[slots] for name, a in state.items()}
    want_out, want = exact(x, w, rows, active)
    limit = LIMITS[x["v"].dtype.name]
    assert error(out[active], want_out[active]) <= limit and error(new["recurrent"][slots], want["recurrent"]) <= limit
    for name in ("conv_q", "conv_k", "conv_v"):
        np.testing.assert_array_equal(new[name][slots].astype(np.float64), want[name])
    others = np.setdiff1d(np.arange(SLOTS), slots)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[others], b[others]), new, state)
    for t in range(time):
        until = jax.tree.map(lambda a, t=t: a[:, : t + 1], x)
        assert error(states[:, t], exact(until, w, rows, active[:, : t + 1])[1]["recurrent"]) <= limit
    return new, slots


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("time", [1, 3])
def test_slots_of_a_larger_state(form, time, dtype):
    check(form, *make(time=time, dtype=dtype))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("time", [1, 5])
def test_tokens_that_are_not_active_leave_their_slot_to_the_bit(form, time):
    """Rows with all, some and no real tokens."""
    x, w, state = make(batch=3, time=time)
    active = np.arange(time) < np.array([[time], [time // 2], [0]])
    new, slots = check(form, x, w, state, (3, 1, 0), active)
    for name, a in state.items():
        np.testing.assert_array_equal(new[name][slots[2]], a[slots[2]])


@pytest.mark.parametrize("heads", [(16, 32), (1, 3)])
def test_head_blocks(heads):
    check("pallas_tpu", *make(keys=heads[0], heads=heads[1], dtype="bfloat16"), (0, 4))


def test_two_blocks_of_a_batch_of_one():
    check("pallas_tpu", *make(batch=1, keys=16, heads=64, dtype="bfloat16"), (2,))


@pytest.mark.parametrize("time", [1, 2])
def test_no_races(time):
    """Two head blocks of each of two slots, states and windows in place."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    step = functools.partial(gated_delta_net_step, implementation="pallas_tpu")
    inputs, slots = make(time=time, keys=16, heads=64, slots=3), np.array([2, 1], np.int32)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        jax.block_until_ready(jax.jit(step)(*inputs, slots, active=np.ones((2, time), bool)))
    assert not interpreter.races.races_found


@on_hopper
@pytest.mark.slow
def test_no_races_on_hopper(monkeypatch):
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

    monkeypatch.setattr(gpu_decode.ring, "SMS", 1)
    step = functools.partial(gated_delta_net_step, implementation="pallas_gpu")
    with mosaic_gpu.interpreted(detect_races=True):
        jax.block_until_ready(jax.jit(step)(*make(time=2), np.array([3, 1]), active=np.ones((2, 2), bool)))
    assert not interpreter.get_races().races_found


@on_hopper
def test_wide_values_and_three_heads_a_key_head_on_hopper():
    check("pallas_gpu", *make(keys=1, heads=3, dtype="bfloat16", value_width=2 * H))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"state": {"conv_q": np.zeros((SLOTS, 2, 2, H), np.float32)}}, "state 'conv_q' has shape"),
        ({"w": {"conv_v": np.zeros((3, H, 4), np.float32)}}, "w 'conv_v' has shape"),
        ({"active": np.ones((2, 2), bool)}, "active has shape"),
        ({"slots": None}, "2 rows on 5 slots"),
        ({"implementation": "magic"}, "no 'magic' implementation"),
    ],
)
def test_wrong_calls(change, message):
    x, w, state = make()
    call = {"x": x, "w": w, "state": state, "slots": np.array([3, 1]), "active": np.ones((2, 1), bool)}
    call |= {name: call[name] | new if isinstance(new, dict) else new for name, new in change.items()}
    with pytest.raises(UserError, match=message):
        gated_delta_net_step(**call)


def test_widths_that_the_kernel_cannot_run():
    with pytest.raises(UserError, match="Hk, Hv in multiples of 128, not 64, 64"):
        gated_delta_net_step(*make(width=64, slots=2), active=np.ones((2, 1), bool), implementation="pallas_tpu")
