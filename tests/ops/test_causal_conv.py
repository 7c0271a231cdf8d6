"""The causal convolution against one token at a time in float64: windows, segments, padding, gradients."""

from __future__ import annotations

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from qwen35_jax.errors import UserError
from qwen35_jax.ops.causal_conv import causal_conv1d, reference

TIME = 20


def make(batch=2, time=TIME, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"x": (batch, time, 2, 3), "w": (2, 3, 4), "state": (batch, 3, 2, 3)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@functools.partial(jax.jit, static_argnums=0)
def differentiate(conv, inputs, segment_ids, cotangents):
    values, vjp = jax.vjp(lambda inputs: conv(**inputs, segment_ids=segment_ids), inputs)
    return values, vjp(cotangents)[0]


def check(inputs, segment_ids=None):
    """Values and gradients in x, w and state. What comes out at padding is nobody's business."""
    rng = np.random.default_rng(1)
    y, window = (rng.normal(size=shape).astype(np.float32) for shape in (inputs["x"].shape, inputs["state"].shape))
    real = np.ones(inputs["x"].shape[:2]) if segment_ids is None else segment_ids != 0
    real = real.astype(np.float32)[..., None, None]
    cotangents = (y * real, window)
    (got, new), gradients = differentiate(causal_conv1d, inputs, segment_ids, cotangents)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(np.float64), (inputs, cotangents))
        (want, want_new), want_gradients = differentiate(reference.causal_conv1d, wide[0], segment_ids, wide[1])
        want, want_gradients = np.asarray(want), {name: np.asarray(x) for name, x in want_gradients.items()}
    np.testing.assert_allclose(got * real, want * real, atol=2e-6)
    np.testing.assert_array_equal(new, np.asarray(want_new, np.float32))
    for name, expected in want_gradients.items():
        np.testing.assert_allclose(gradients[name], expected, atol=2e-5, err_msg=name)


def test_whole_rows():
    check(make())


@settings(max_examples=30, deadline=None)
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
