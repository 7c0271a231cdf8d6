"""The causal convolution against one token at a time in float64: windows, segments, padding, gradients."""

from __future__ import annotations

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.experimental.pallas import tpu as pltpu

from qwen35_jax.errors import UserError
from qwen35_jax.ops.causal_conv import causal_conv1d, reference

TIME = 20
kernel = functools.partial(causal_conv1d, implementation="pallas_tpu")


def make(batch=2, time=TIME, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"x": (batch, time, 2, 3), "w": (2, 3, 4), "state": (batch, 3, 2, 3)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@functools.partial(jax.jit, static_argnums=0)
def differentiate(conv, inputs, segment_ids, cotangents):
    values, vjp = jax.vjp(lambda inputs: conv(**inputs, segment_ids=segment_ids), inputs)
    return values, vjp(cotangents)[0]


def check(inputs, segment_ids=None, conv=causal_conv1d, scale=1.0):
    """Values and gradients in x, w and state. What comes out at padding is nobody's business. scale: of the error of dw, a sum
    over tokens."""
    rng = np.random.default_rng(1)
    y, window = (rng.normal(size=shape).astype(np.float32) for shape in (inputs["x"].shape, inputs["state"].shape))
    real = np.ones(inputs["x"].shape[:2]) if segment_ids is None else segment_ids != 0
    real = real.astype(np.float32)[..., None, None]
    cotangents = (y * real, window)
    (got, new), gradients = differentiate(conv, inputs, segment_ids, cotangents)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(np.float64), (inputs, cotangents))
        (want, want_new), want_gradients = differentiate(reference.causal_conv1d, wide[0], segment_ids, wide[1])
        want, want_gradients = np.asarray(want), {name: np.asarray(x) for name, x in want_gradients.items()}
    np.testing.assert_allclose(got * real, want * real, atol=2e-6)
    np.testing.assert_array_equal(new, np.asarray(want_new, np.float32))
    for name, expected in want_gradients.items():
        np.testing.assert_allclose(gradients[name], expected, atol=2e-5 * (scale if name == "w" else 1), err_msg=name)


def test_whole_rows():
    check(make())


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(1, 9), max_size=5), min_size=2, max_size=2))
def test_any_segments(rows):
    """Documents of any length, padding at the end, a row of padding alone."""
    ids = [np.pad(np.repeat(np.arange(1, len(row) + 1), row), (0, TIME))[:TIME] for row in rows]
    check(make(), np.stack(ids).astype(np.int32))


def test_split_equals_whole_to_the_last_token():
    inputs = make()
    x, w, state = inputs["x"], inputs["w"], inputs["state"]
    want, want_state = causal_conv1d(x, w, state=state)
    outs = []
    for begin, end in ((0, 2), (2, 13), *((t, t + 1) for t in range(13, TIME))):
        one, state = causal_conv1d(x[:, begin:end], w, state=state)
        outs.append(one)
    np.testing.assert_array_equal(jnp.concatenate(outs, axis=1), want)
    np.testing.assert_array_equal(state, want_state)


def test_one_token_of_padding_keeps_the_window():
    inputs = make(time=1)
    ids = np.array([[1], [0]], np.int32)
    _, state = causal_conv1d(**inputs, segment_ids=ids)
    np.testing.assert_array_equal(state[1], inputs["state"][1])
    np.testing.assert_array_equal(state[0], np.concatenate([inputs["state"][0, 1:], inputs["x"][0]]))


def test_without_state_or_activation():
    inputs = make()
    x, w = inputs["x"], inputs["w"]
    y, state = causal_conv1d(x, w, activation=None)
    want, want_state = causal_conv1d(x, w, state=np.zeros_like(inputs["state"]), activation=None)
    np.testing.assert_array_equal(y, want)
    np.testing.assert_array_equal(state, want_state)
    np.testing.assert_allclose(y[:, 0], x[:, 0] * w[..., 3], rtol=1e-6)


def test_bfloat16_is_rounded_once():
    inputs = {name: jnp.asarray(x, jnp.bfloat16) for name, x in make().items()}
    y, state = causal_conv1d(**inputs)
    want, _ = causal_conv1d(**{name: x.astype(jnp.float32) for name, x in inputs.items()})
    assert y.dtype == state.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(np.float32), want, rtol=2**-8)


# --- the TPU kernels, interpreted: 128 channels a head, several pieces of a block and several blocks

ROWS_OF_DOCUMENTS = {
    "one document": None,
    "packed": [[5, 40, 1, 2, 90, 300], [260, 170]],
    "boundaries at blocks": [[16, 112, 128, 256], [500, 3, 9]],
    "padding alone": [[], [100]],
}


def wide(time, dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = {"x": (2, time, 2, 128), "w": (2, 128, 4), "state": (2, 3, 2, 128)}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def documents(rows, time):
    ids = [np.pad(np.repeat(np.arange(1, len(row) + 1), row), (0, time))[:time] for row in rows]
    return np.stack(ids).astype(np.int32)


@pytest.fixture
def interpreted():
    """As TPU programs, with memory that starts as NaN."""
    with pltpu.force_tpu_interpret_mode():
        yield


@pytest.mark.parametrize("time", [520, pytest.param(1025, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ROWS_OF_DOCUMENTS)
def test_kernel(interpreted, name, time):
    rows = ROWS_OF_DOCUMENTS[name]
    check(wide(time), None if rows is None else documents(rows, time), kernel, scale=time**0.5)


@pytest.mark.parametrize("time", [1, 129, *(pytest.param(time, marks=pytest.mark.slow) for time in (3, 17))])
def test_kernel_of_few_tokens(interpreted, time):
    check(wide(time), documents([[1, time - 1], [time]], time), kernel)


def test_kernel_without_state_or_activation(interpreted):
    x, w = (wide(40)[name] for name in "xw")
    got, want = (jax.jit(functools.partial(form, activation=None))(x, w) for form in (kernel, causal_conv1d))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_kernel_in_bfloat16(interpreted):
    """Computed in float32 and rounded once; dw is summed in float32 over tokens and rounded once too."""
    inputs = {name: jnp.asarray(x, jnp.bfloat16) for name, x in wide(150).items()}
    exact = {name: x.astype(jnp.float32) for name, x in inputs.items()}

    def both(form, inputs):
        values, back = jax.vjp(lambda inputs: form(**inputs), inputs)
        return values[0], back(jax.tree.map(jnp.ones_like, values))[0]

    got, want = jax.jit(functools.partial(both, kernel))(inputs), jax.jit(functools.partial(both, causal_conv1d))(exact)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == jnp.bfloat16
        assert np.linalg.norm(a.astype(np.float32) - b) < 2e-3 * np.linalg.norm(b)  # the rounding of bfloat16 itself


def test_kernels_have_no_races():
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    inputs = wide(520)
    segment_ids = documents([[300, 200], [520]], 520)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        gradient = jax.jit(jax.grad(lambda inputs: jnp.sum(kernel(**inputs, segment_ids=segment_ids)[0])))
        jax.block_until_ready(gradient(inputs))
    assert not interpreter.races.races_found


def test_kernel_wants_whole_registers_of_channels():
    with pytest.raises(UserError, match="channels in multiples of 128, at most 8 taps, not 6 channels, 4 taps"):
        kernel(**make())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"w": np.zeros((2, 4, 4), np.float32)}, "x is"),
        ({"state": np.zeros((2, 4, 2, 3), np.float32)}, "state has shape"),
        ({"segment_ids": np.zeros((2, 3), np.int32)}, "segment_ids has shape"),
        ({"segment_ids": np.zeros((2, TIME), np.float32)}, "segment_ids has dtype"),
        ({"activation": "gelu"}, "no activation 'gelu'"),
        ({"implementation": "pallas_gpu"}, "no 'pallas_gpu' implementation"),
    ],
)
def test_wrong_calls(change, message):
    with pytest.raises(UserError, match=message):
        causal_conv1d(**(make() | change))
