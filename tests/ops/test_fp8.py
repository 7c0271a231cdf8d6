"""Block-scaled FP8 against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen35_jax.errors import UserError
from qwen35_jax.ops.fp8 import FP8_MAX, Fp8Weight, dequantize, quantize, quantize_weight, scale_shape
from qwen35_jax.ops.fp8.reference import dequantize_reference

# Names of the model's weights: shape, blocked axes.
WEIGHTS = {
    "q_gate": ((256, 3, 2, 192), (0, 3)),
    "out": ((3, 128, 300), (1, 2)),
    "gate": ((130, 257), (0, 1)),
    "experts gate_up": ((5, 128, 2, 200), (1, 3)),
    "narrow": ((64, 1, 16), (0, 2)),
}


def adversarial(shape, seed=0):
    """Neighbouring blocks of very different size, one of zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float32)
    for axis, size in enumerate(shape):
        scale = 10.0 ** rng.integers(-6, 5, -(-size // 128))
        x *= np.repeat(scale, 128)[:size].reshape([-1 if a == axis else 1 for a in range(len(shape))]).astype(np.float32)
    x[tuple(slice(0, 128) for _ in shape)] = 0
    return x


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("scale_dtype", [jnp.bfloat16, jnp.float32])
def test_weight_round_trip(name, scale_dtype):
    shape, blocked = WEIGHTS[name]
    x = adversarial(shape)
    w = quantize_weight(x, blocked, scale_dtype)
    assert w.values.dtype == jnp.float8_e4m3fn and w.values.shape == shape
    assert w.scales.dtype == scale_dtype and w.scales.shape == scale_shape(shape, blocked)
    exact = dequantize_reference(w)
    assert np.isfinite(exact).all()
    np.testing.assert_array_equal(np.asarray(dequantize(w)), exact.astype(np.float32))
    # 4 significant bits: half a unit in the last place is 1/16 of the value; for subnormals, 2^-10 of a scale.
    scales = np.asarray(w.scales).astype(np.float64)
    for axis, (size, count) in enumerate(zip(shape, scales.shape, strict=True)):
        scales = scales if size == count else np.repeat(scales, 128, axis)[(slice(None),) * axis + (slice(size),)]
    assert (np.abs(exact - x) <= np.maximum(np.abs(x) / 16 * 1.0001, scales * 2.0**-10 * 1.0001)).all()


def test_every_value_is_exact():
    codes = jax.lax.bitcast_convert_type(jnp.arange(256, dtype=jnp.uint8), jnp.float8_e4m3fn).reshape(2, 128)
    w = Fp8Weight(codes, jnp.asarray([[3.0], [2.0**-20]], jnp.bfloat16))
    expected = np.asarray(codes).astype(np.float64) * np.asarray([[3.0], [2.0**-20]])
    np.testing.assert_array_equal(np.asarray(dequantize(w)), expected.astype(np.float32))
    once = np.asarray(jnp.asarray(expected, jnp.float32).astype(jnp.bfloat16)).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(dequantize(w, jnp.bfloat16)).astype(np.float32), once)


@pytest.mark.parametrize("width", [128, 384, 300, 16])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_activations(width, dtype):
    x = jnp.asarray(adversarial((3, 4, width), 1), dtype)
    values, scales = quantize(x)
    assert values.shape == x.shape and scales.shape == (3, 4, -(-width // 128)) and scales.dtype == jnp.float32
    x = np.asarray(x).astype(np.float64)
    per_value = np.repeat(np.asarray(scales).astype(np.float64), 128, -1)[..., :width]
    error = np.abs(np.asarray(values).astype(np.float64) * per_value - x)
    assert (error <= np.maximum(np.abs(x) / 16, per_value * 2.0**-10) * 1.0001).all()


def test_large_zero_and_broken_activations():
    x = jnp.zeros((5, 128)).at[1].set(1e30).at[2, 0].set(449.0).at[3, 7].set(jnp.nan).at[4, 9].set(jnp.inf)
    values, scales = quantize(x)
    values = np.asarray(values).astype(np.float32)
    assert (values[0] == 0).all() and float(scales[0, 0]) == 1
    assert (values[1] == FP8_MAX).all() and values[2, 0] == FP8_MAX
    assert np.isnan(values[3, 7]) and np.isnan(values[4, 9])


def test_scales_that_do_not_fit():
    with pytest.raises(UserError, match="do not fit"):
        dequantize(Fp8Weight(jnp.zeros((256, 4), jnp.float8_e4m3fn), jnp.ones((3, 4))))


def test_is_a_pytree():
    w = quantize_weight(jnp.ones((2, 128, 128)), (1, 2))
    last = jax.tree.map(lambda a: a[1], w)
    assert last.values.shape == (128, 128) and last.scales.shape == (1, 1)
    assert dequantize(jax.jit(lambda w: w)(last)).dtype == jnp.float32
