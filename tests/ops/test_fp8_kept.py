"""FP8 training of `linear` and `grouped_linear`: what is saved, what is recorded, and what is lowered."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen35_jax.ops.fp8 import Fp8Operand, share_activation
from qwen35_jax.ops.fp8.reference import round_reference
from qwen35_jax.ops.fp8.statistics import ratios
from qwen35_jax.ops.grouped_linear import grouped_linear
from qwen35_jax.ops.linear import linear
from tests.ops.fp8_operands import GROUP_SIZES, GROUPS, ROWS, SIZES, distance, grouped_operands, products, spec_operands

# --- what is saved


def residual_bytes(f, x, *weights):
    """Bytes of the arrays that the backward pass of f(x, *weights) keeps, weights excluded."""
    back = jax.eval_shape(lambda x, *w: jax.vjp(f, x, *w)[1], x, *weights)
    kept = [(a.shape, a.dtype) for a in jax.tree.leaves(back)]
    for w in weights:
        if (w.shape, w.dtype) in kept:
            kept.remove((w.shape, w.dtype))
    return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in kept if dtype != jnp.int32)


@pytest.mark.parametrize("spec", ["BTD,DNGH->BTNGH", "BTNH,NHD->BTD", "BTF,FD->BTD"])
@pytest.mark.parametrize("sizes", [{"D": 2048, "H": 256, "F": 512}, {"D": 192, "N": 8, "H": 32, "F": 96}])
def test_residuals_of_linear(spec, sizes):
    x, w, _ = spec_operands(spec, jnp.bfloat16, SIZES | {"T": 16} | sizes)
    w = w.astype(jnp.float32)
    plain = residual_bytes(lambda x, w: linear(x, w.astype(x.dtype), spec), x, w)
    plain -= 2 * w.size  # the cast weight
    fp8 = residual_bytes(lambda x, w: linear(x, Fp8Operand(w), spec), x, w)
    assert plain == x.nbytes and 0.5 * plain < fp8 <= 0.55 * plain, (plain, fp8)


def test_residuals_of_shared_activations():
    """Several products of one activation keep it once."""
    x, w, _ = spec_operands("BTD,DF->BTF", jnp.bfloat16, SIZES | {"D": 256})

    def f(x, *weights):
        x = share_activation(x, *weights)
        return [linear(x, w, "BTD,DF->BTF") for w in weights]

    def g(x, *weights):
        x = share_activation(x, *weights)
        return [grouped_linear(x, w, jnp.ones(GROUPS, jnp.int32)) for w in weights]

    def in_fp8(f):
        return lambda x, *weights: f(x, *map(Fp8Operand, weights))

    plain = residual_bytes(f, x, w, w + 1, w + 2)
    assert plain == x.nbytes and residual_bytes(in_fp8(f), x, w, w + 1, w + 2) <= 0.55 * plain
    rows, experts, _ = grouped_operands(jnp.bfloat16)
    plain = residual_bytes(g, rows, experts, experts + 1)
    assert plain == rows.nbytes and residual_bytes(in_fp8(g), rows, experts, experts + 1) <= 0.55 * plain


def test_shared_activation_changes_no_number(form):
    x, w, dy = spec_operands("BTD,DF->BTF")
    alone = products(lambda x, w: linear(x, w, "BTD,DF->BTF"), x, w, dy)
    shared = products(lambda x, w: linear(share_activation(x, w), w, "BTD,DF->BTF"), x, w, dy)
    for a, b in zip(shared, alone, strict=True):
        np.testing.assert_array_equal(a, b)
    rows, experts, dy = grouped_operands()
    sizes = jnp.asarray(GROUP_SIZES["ragged"])
    alone = products(lambda x, w: grouped_linear(x, w, sizes), rows, experts, dy)
    shared = products(lambda x, w: grouped_linear(share_activation(x, w), w, sizes), rows, experts, dy)
    for a, b in zip(shared, alone, strict=True):
        np.testing.assert_array_equal(a, b)
    # A weight that is held in bfloat16 sees x itself.
    mixed = linear(share_activation(x, w, Fp8Operand(w)), w, "BTD,DF->BTF")
    np.testing.assert_array_equal(mixed, linear(x, w, "BTD,DF->BTF"))
    assert share_activation(x, w) is x


# --- statistics


def test_statistics_in_place_of_the_gradient():
    spec = "BTD,DF->BTF"
    x, w, dy = spec_operands(spec)
    x, w = x.at[:, :, 0].set(1e6), w.at[0].multiply(1e-5)  # small neighbours of a large number become zero
    y, dx, _ = products(lambda x, w: linear(x, w, spec), x, w, dy)
    got = products(lambda x, w: linear(x, w, spec), x, w, dy, statistics_axis=-2)
    np.testing.assert_allclose(got[0], y, rtol=1e-6), np.testing.assert_allclose(got[1], dx, rtol=1e-6)
    check_ratios(ratios(got[2].sum(1)[:14]), x.reshape(-1, SIZES["D"]), w, dy.reshape(-1, SIZES["F"]), y.reshape(-1, SIZES["F"]))
    rows, experts, dy = grouped_operands()
    sizes = jnp.asarray([ROWS, 0, 0, 0])
    y = products(lambda x, w: grouped_linear(x, w, sizes), rows, experts, dy)[0]
    for axis in (-2, -1):
        got = products(lambda x, w: grouped_linear(x, w, sizes), rows, experts, dy, statistics_axis=axis)[2]
        found = ratios(got.sum(tuple({0, 1, 2} - {3 + axis}))[:14])
        assert abs(float(found["product_error"]) - distance(y, rows @ experts[0])) < 1e-5
        assert abs(float(found["gradient_error"]) - distance(round_reference(dy, (1,)), dy)) < 1e-5


def check_ratios(found, x, w, dy, y):
    assert abs(float(found["product_error"]) - distance(y, x @ w)) < 1e-5
    for name, a, axes in (("activation", x, (1,)), ("weight", w, (0, 1)), ("gradient", dy, (1,))):
        rounded = round_reference(a, axes)
        assert abs(float(found[f"{name}_error"]) - distance(rounded, a)) < 1e-5, name
        lost = ((rounded == 0) & (np.asarray(a) != 0)).sum() / (np.asarray(a) != 0).sum()
        assert abs(float(found[f"{name}_underflow"]) - lost) < 1e-6, name
    assert found["activation_underflow"] > 0.1


# --- what is lowered


def lowered(f, platform, *args):
    def run(x, w):
        y, back = jax.vjp(f, x, Fp8Operand(w))
        return back(jnp.ones_like(y))

    return jax.jit(run).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def fp8_products(text, kind="dot_general"):
    return re.findall(rf'"?(?:stablehlo|chlo)\.{kind}"?.*: \(tensor<[\dx]*xf8E4M3FN>, tensor<[\dx]*xf8E4M3FN>', text)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_stablehlo_has_fp8_products_and_no_others(platform):
    spec = "BTD,DF->BTF"
    x, w, _ = spec_operands(spec, jnp.bfloat16)
    text = lowered(lambda x, w: linear(x, w, spec), platform, x, w)
    assert len(fp8_products(text)) == text.count("stablehlo.dot_general") == 2  # the unused forward product is dropped
    forward = jax.jit(lambda x, w: linear(x, Fp8Operand(w), spec)).trace(x, w).lower(lowering_platforms=(platform,)).as_text()
    assert len(fp8_products(forward)) == forward.count("stablehlo.dot_general") == 1


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_stablehlo_of_grouped(platform):
    x, w, _ = grouped_operands(jnp.bfloat16)
    text = lowered(lambda x, w: grouped_linear(x, w, jnp.ones(GROUPS, jnp.int32)), platform, x, w)
    ragged = fp8_products(text, "ragged_dot")
    assert text.count('chlo.ragged_dot"') == len(ragged) == (1 if platform == "tpu" else 0)
    assert len(fp8_products(text)) == text.count("stablehlo.dot_general") > 0
