"""`linear` and `grouped_linear` of activations in FP8 with weights in FP8, against float64 of the dequantised operands."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen35_jax.errors import UserError
from qwen35_jax.ops.fp8 import Fp8Activation, Fp8Weight
from qwen35_jax.ops.fp8.reference import dequantize_reference
from qwen35_jax.ops.grouped_linear import grouped_linear
from qwen35_jax.ops.linear import linear
from tests.ops.fp8_operands import GROUP_SIZES, distance, grouped_operands, normal, quantize_activation, quantize_weight
from tests.ops.test_fp8 import adversarial

SIZES = {"B": 2, "T": 3, "D": 256, "N": 4, "G": 2, "H": 128, "F": 384}
SMALL = SIZES | {"D": 200, "N": 3, "H": 32, "F": 130}  # blocks that end early, heads narrower than a block
SPECS = {"BTD,DNGH->BTNGH": (0, 3), "BTNH,NHD->BTD": (1, 2), "BTD,DF->BTF": (0, 1), "BTF,FD->BTD": (0, 1)}
# Sums of up to 512 terms in float32, scales over ten powers of ten; and one rounding to bfloat16.
BOUNDS = {"float32": 1e-6, "bfloat16": 4e-3}

OPERANDS = [
    pytest.param(sizes, make, id=f"{name}-{make.__name__}", marks=[pytest.mark.slow] * ((name, make) != ("ragged", adversarial)))
    for name, sizes in (("whole", SIZES), ("ragged", SMALL))
    for make in (normal, adversarial)
]


def exact_x(x: Fp8Activation) -> np.ndarray:
    values, scales = (np.asarray(a).astype(np.float64) for a in (x.values, x.scales))
    return values * np.repeat(scales, 128, -1)[..., : values.shape[-1]]


def operands(spec, sizes, dtype="float32", make=normal):
    x_axes, w_axes, _ = re.split(",|->", spec)
    x, w = (make([sizes[a] for a in axes], i) for i, axes in enumerate((x_axes, w_axes)))
    return quantize_activation(jnp.asarray(x, dtype)), quantize_weight(jnp.asarray(w), SPECS[spec])


def run(spec, x, w, **options):
    return jax.jit(lambda x, w: linear(x, w, spec, **options))(x, w)


@pytest.mark.parametrize(("sizes", "make"), OPERANDS)
@pytest.mark.parametrize("spec", SPECS)
def test_linear(form, spec, sizes, make):
    for dtype, bound in BOUNDS.items():
        x, w = operands(spec, sizes, dtype, make)
        want = np.einsum(spec, exact_x(x), dequantize_reference(w))
        y = run(spec, x, w)
        assert y.dtype == dtype and np.isfinite(np.asarray(y, np.float32)).all()
        assert distance(y, want) < bound
        assert distance(run(spec, x, w, out_dtype=jnp.float32), want) < BOUNDS["float32"]


def test_broken_and_large_activations(form):
    """NaN and infinity stay in their row; what is too large for e4m3 is not lost; a row of zeros gives zeros."""
    x = normal((5, 256)).at[0, 3].set(jnp.nan).at[1, 200].set(jnp.inf).at[2].set(1e30).at[3].set(0)
    w = quantize_weight(normal((256, 130), 1), (0, 1))
    x = quantize_activation(x)
    y = np.asarray(run("TD,DF->TF", x, w))
    assert np.isnan(y[:2]).all() and np.isfinite(y[2:]).all() and (y[3] == 0).all()
    assert distance(y[2:], exact_x(x)[2:] @ dequantize_reference(w)) < 1e-6


@pytest.mark.parametrize("sizes", GROUP_SIZES.values(), ids=list(GROUP_SIZES))
def test_grouped(form, sizes):
    for dtype, bound in BOUNDS.items():
        rows, experts, _ = grouped_operands(dtype)
        x, w = quantize_activation(rows), quantize_weight(experts, (1, 2))
        y = jax.jit(grouped_linear)(x, w, jnp.asarray(sizes))
        group = np.repeat(np.arange(len(sizes)), sizes)
        want = np.zeros(y.shape)
        want[: len(group)] = np.einsum("ri,rio->ro", exact_x(x)[: len(group)], dequantize_reference(w)[group])
        assert y.dtype == dtype and distance(y, want) < bound
        assert not np.asarray(y[len(group) :], np.float32).any()


def test_gradients_are_those_of_the_dequantised_product(form):
    x, w = normal((5, 256)), quantize_weight(normal((256, 130), 1), (0, 1))
    got = jax.grad(lambda x: jnp.sum(linear(quantize_activation(x), w, "TD,DF->TF") ** 2) / 2)(x)
    y = exact_x(quantize_activation(x)) @ dequantize_reference(w)
    assert distance(got, y @ dequantize_reference(w).T) < 1e-5
    rows, experts, dy = grouped_operands()
    w, sizes = quantize_weight(experts, (1, 2)), jnp.asarray(GROUP_SIZES["full"])
    pull = jax.vjp(lambda x: grouped_linear(quantize_activation(x), w, sizes), rows)[1]
    want = np.einsum("ro,rio->ri", dy, dequantize_reference(w)[np.repeat(np.arange(4), sizes)])
    assert distance(pull(dy)[0], want) < 1e-5


def test_a_weight_that_is_not_fp8_sees_x_itself():
    x, w = normal((3, 128)), normal((128, 20), 1)
    np.testing.assert_array_equal(linear(quantize_activation(x), w, "TD,DF->TF"), linear(x, w, "TD,DF->TF"))


def test_what_does_not_fit():
    x, w = quantize_activation(normal((3, 256))), quantize_weight(normal((256, 256), 1), (0, 1))
    with pytest.raises(UserError, match="last of x and first of w"):
        linear(x, w, "TD,FD->TF")
    with pytest.raises(UserError, match="scales for the same blocks of 128; x has 2 along D, w 256"):
        linear(x, Fp8Weight(w.values, jnp.ones((256, 2))), "TD,DF->TF")
    with pytest.raises(UserError, match="in FP8 pass x"):
        grouped_linear(x, w, jnp.ones(1, jnp.int32))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_stablehlo_has_fp8_products_and_no_others(platform):
    x, w = operands("BTD,DF->BTF", SIZES, "bfloat16")
    text = jax.jit(lambda x, w: linear(x, w, "BTD,DF->BTF")).trace(x, w).lower(lowering_platforms=(platform,)).as_text()
    products = re.findall(r"stablehlo\.dot_general.*: \((.*)\)", text)
    assert len(products) == 1 and products[0].count("f8E4M3FN") == 2, products
