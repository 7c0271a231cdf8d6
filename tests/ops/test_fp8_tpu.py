"""The TPU kernels of FP8 products, interpreted on the CPU, against float64 of the dequantised operands."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from qwen35_jax.config import ModelConfig
from qwen35_jax.errors import UserError
from qwen35_jax.ops.forms import resolve_forms
from qwen35_jax.ops.fp8 import Fp8Activation, Fp8Operand, Fp8Weight, tpu
from qwen35_jax.ops.fp8.reference import dequantize_reference
from qwen35_jax.ops.grouped_linear import grouped_linear
from qwen35_jax.ops.grouped_linear.fp8 import ragged_blocks
from qwen35_jax.ops.grouped_linear.tpu import visits
from qwen35_jax.ops.linear import linear
from tests.ops.fp8_operands import (
    GROUP_SIZES,
    TRACED_IN,
    distance,
    expected_products,
    grouped_operands,
    normal,
    products,
    quantize_activation,
    quantize_weight,
    spec_operands,
)
from tests.ops.test_fp8 import adversarial
from tests.ops.test_fp8_activations import SIZES, SMALL, SPECS, exact_x
from tests.ops.test_gated_delta_tpu import mesh_of

# Sums of up to 512 terms in float32; in bfloat16 one rounding of the result, and of the weight where it is dequantised.
BOUNDS = {"float32": 1e-6, "bfloat16": 4e-3}
KINDS = ["few rows", "many rows", "x in FP8"]


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    """Interpreted as TPU programs, with scratch that starts as NaN."""
    with pltpu.force_tpu_interpret_mode():
        yield


def small_tiles(monkeypatch, rows=128):
    """Several along every axis."""
    for name, size in (("ROWS", rows), ("COLUMNS", 128), ("TERMS", 256)):
        monkeypatch.setattr(tpu, name, size)


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    small_tiles(monkeypatch, rows=32)
    monkeypatch.setattr(tpu, "MANY_ROWS", 1 if request.param == "many rows" else 10**9)
    with TRACED_IN(request.param):
        yield request.param


def operands(kind, x, w, blocked):
    """The operands of the op and of the product in float64."""
    w = quantize_weight(jnp.asarray(w), blocked)
    x = quantize_activation(x) if kind == "x in FP8" else x
    exact = exact_x(x) if kind == "x in FP8" else np.asarray(x).astype(np.float64)
    return x, w, exact, dequantize_reference(w)


@functools.partial(jax.jit, static_argnums=2, static_argnames="out_dtype")
def run(x, w, spec, out_dtype=None):
    return linear(x, w, spec, out_dtype=out_dtype, implementation="pallas_tpu")


SLOW = pytest.mark.slow


@pytest.mark.parametrize("spec", [pytest.param("BTD,DF->BTF", marks=SLOW), "BTNH,NHD->BTD"])
def test_linear(kind, spec):
    """Whole blocks, neighbours of very different size and blocks of zeros; 66 rows in tiles of 32."""
    x_axes, w_axes = spec.split("->")[0].split(",")
    x, w = (adversarial([(SIZES | {"T": 33})[a] for a in axes], i) for i, axes in enumerate((x_axes, w_axes)))
    for dtype, bound in BOUNDS.items():
        x_in, w_in, exact, exact_w = operands(kind, jnp.asarray(x, dtype), w, SPECS[spec])
        y = run(x_in, w_in, spec)
        assert y.dtype == dtype and distance(y, np.einsum(spec, exact, exact_w)) < bound
    wide = run(x_in, w_in, spec, out_dtype=jnp.float32)
    assert wide.dtype == jnp.float32 and distance(wide, np.einsum(spec, exact, exact_w)) < (2e-3 if kind == "many rows" else 1e-6)


@pytest.mark.parametrize("spec", ["BTD,DNGH->BTNGH", pytest.param("BTNH,NHD->BTD", marks=SLOW)])
def test_blocks_that_end_early(kind, spec):
    x_axes, w_axes = spec.split("->")[0].split(",")
    x, w = (normal([SMALL[a] for a in axes], i) for i, axes in enumerate((x_axes, w_axes)))
    x, w, exact, exact_w = operands(kind, x, w, SPECS[spec])
    assert distance(run(x, w, spec), np.einsum(spec, exact, exact_w)) < 1e-6


def test_broken_rows_and_no_rows(kind):
    """NaN and infinity stay in their row, large numbers are not lost; rows beside a tile's end are nobody's."""
    x = normal((5, 256)).at[0, 3].set(jnp.nan).at[1, 200].set(jnp.inf).at[2].set(1e30).at[3].set(0)
    x, w, exact, exact_w = operands(kind, x, normal((256, 130), 1), (0, 1))
    y = np.asarray(run(x, w, "TD,DF->TF"))
    assert not np.isfinite(y[:2]).any() and np.isfinite(y[2:]).all() and (y[3] == 0).all()
    assert distance(y[2:], exact[2:] @ exact_w) < 1e-6
    assert run(jax.tree.map(lambda a: a[:0], x), w, "TD,DF->TF").shape == (0, 130)


@jax.jit
def run_grouped(x, w, group_sizes):
    return grouped_linear(x, w, group_sizes, implementation="pallas_tpu")


def expected_grouped(x, w, sizes):
    group = np.repeat(np.arange(len(sizes)), sizes)
    want = np.zeros((x.shape[0], w.shape[2]))
    want[: len(group)] = np.einsum("ri,rio->ro", x[: len(group)], w[group])
    return want, len(group)


def test_grouped(kind):
    """Empty, one-row, all-in-one, full and no groups; tiles that several groups share; rows beyond the groups."""
    rows, experts, _ = grouped_operands()
    x, w, exact, exact_w = operands(kind, rows, experts, (1, 2))
    for sizes in GROUP_SIZES.values():
        want, used = expected_grouped(exact, exact_w, sizes)
        y = run_grouped(x, w, jnp.asarray(sizes))
        assert distance(y, want) < 1e-6 and not np.asarray(y[used:]).any()
    x, w, exact, exact_w = operands(kind, rows.astype(jnp.bfloat16), experts, (1, 2))
    want, _ = expected_grouped(exact, exact_w, GROUP_SIZES["full"])
    y = run_grouped(x, w, jnp.asarray(GROUP_SIZES["full"]))
    assert y.dtype == jnp.bfloat16 and distance(y, want) < BOUNDS["bfloat16"]


@pytest.mark.slow
def test_a_broken_row_stays_in_its_group(kind):
    rows, experts, _ = grouped_operands()
    x, w, exact, exact_w = operands(kind, rows[:40].at[3].set(jnp.nan), experts, (1, 2))
    y = np.asarray(run_grouped(x, w, jnp.asarray([4, 0, 30, 2])))
    assert np.isnan(y[3]).all() and np.isfinite(np.delete(y, 3, 0)).all()
    assert distance(y[4:], expected_grouped(exact, exact_w, (4, 0, 30, 2))[0][4:]) < 1e-6


def alike(op, *arguments, **options):
    """What the kernel and the XLA form give, if nearly all of it is the same to the bit: to XLA on the CPU these are products of
    matrices of other shapes, and of some it adds the terms in another order. Scales that are multiplied in another order, or
    blocks added in another, change one number in two."""
    forms = (functools.partial(op, implementation=form, **options) for form in ("pallas_tpu", "xla"))
    kernel, xla = (np.asarray(jax.jit(form)(*arguments)) for form in forms)
    assert (kernel == xla).mean() > 0.95 and distance(kernel, xla) < 2e-8
    return kernel, xla


@pytest.mark.parametrize("rows", [1, 48, 64, pytest.param(1024, marks=SLOW)])
def test_the_xla_form_is_the_same_arithmetic(form, rows):
    x, w = quantize_activation(normal((rows, 384))), quantize_weight(normal((384, 256), 1), (0, 1), jnp.float32)
    kernel, xla = alike(linear, x, w, spec="TD,DF->TF")
    if rows == 64:  # the tile is the whole product, so XLA multiplies the same matrices in both
        np.testing.assert_array_equal(kernel, xla)


@pytest.mark.parametrize("sizes", ["full", pytest.param("ragged", marks=SLOW), pytest.param("one row each", marks=SLOW)])
def test_the_grouped_xla_form_is_the_same_arithmetic(form, sizes):
    x, w = quantize_activation(normal((300, 384))), quantize_weight(normal((4, 384, 256), 1), (1, 2), jnp.float32)
    sizes = jnp.asarray(GROUP_SIZES[sizes])
    kernel, _ = alike(grouped_linear, x, w, sizes)
    ragged = jax.jit(ragged_blocks)((x.values, x.scales), (w.values, w.scales), sizes)  # XLA's on TPU
    assert (kernel == ragged).mean() > 0.95 and distance(kernel, ragged) < 2e-8


def check_races(function, *arguments):
    """What one step writes no copy into or out of VMEM touches meanwhile."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        jax.block_until_ready(jax.jit(lambda *a: function(*a))(*arguments))
    assert not interpreter.races.races_found


def test_no_races(kind):
    """The weight's panel and the sums stay in VMEM from step to step; several tiles along every axis."""
    x, w = normal((66, 512)), normal((2, 512, 256), 1)
    multiply = functools.partial(linear, spec="TD,DF->TF", implementation="pallas_tpu")
    check_races(multiply, *operands(kind, x, w[0], (0, 1))[:2])
    grouped = functools.partial(grouped_linear, implementation="pallas_tpu")
    check_races(grouped, *operands(kind, x, w, (1, 2))[:2], jnp.asarray([20, 30]))


@pytest.mark.parametrize("sizes", [(3, 0, 200, 17), (0, 300, 0, 0), (0, 0, 0, 0), (75, 150, 11, 64)])
def test_visits(sizes):
    """Every tile is visited; each group exactly in the tiles that hold rows of it."""
    count, tiles, groups, starts = (np.asarray(a) for a in visits(jnp.asarray(sizes, jnp.int32), 300, 32))
    wanted = []
    for e, (begin, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        wanted += [(t, e) for t in range(10) if max(begin, 32 * t) < min(end, 32 * t + 32)]
    assert list(zip(tiles[:count], groups[:count], strict=True)) == wanted
    assert set(tiles[:count]) == set(range(10)) and count <= len(tiles)


def test_gradients():
    w = quantize_weight(normal((256, 130), 1), (0, 1))
    for make in (quantize_activation, lambda x: x):
        x, dy = normal((5, 256)), normal((5, 130), 2)
        got = jax.vjp(lambda x, make=make: linear(make(x), w, "TD,DF->TF", implementation="pallas_tpu"), x)[1](dy)[0]
        assert distance(got, np.asarray(dy) @ dequantize_reference(w).T) < 1e-5
    rows, experts, dy = grouped_operands()
    w, sizes = quantize_weight(experts, (1, 2)), jnp.asarray(GROUP_SIZES["full"])
    got = jax.vjp(lambda x: grouped_linear(x, w, sizes, implementation="pallas_tpu"), rows)[1](dy)[0]
    want = np.einsum("ro,rio->ri", dy, dequantize_reference(w)[np.repeat(np.arange(4), sizes)])
    assert distance(got, want) < 1e-5


@pytest.mark.parametrize("spec", ["BTD,DNH->BTNH", pytest.param("BTNH,NHD->BTD", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_training(spec, dtype, monkeypatch):
    """The product and both gradients in FP8: sides that are no whole blocks, several tiles along every axis."""
    small_tiles(monkeypatch)
    x, w, dy = spec_operands(spec, dtype, sizes={"B": 3, "T": 100, "D": 200, "N": 3, "H": 96})
    got = products(functools.partial(linear, spec=spec, implementation="pallas_tpu"), x, w, dy)
    for a, b, like in zip(got, expected_products(spec, x, w, dy), (dy, x, w), strict=True):
        assert a.dtype == like.dtype and distance(a, b) < BOUNDS[dtype]


def test_training_has_no_races(monkeypatch):
    small_tiles(monkeypatch)
    multiply = functools.partial(linear, spec="TD,DF->TF", implementation="pallas_tpu")
    check_races(functools.partial(products, multiply), normal((200, 512)), normal((512, 256), 1), normal((200, 256), 2))


def test_products_with_arrays_are_left_to_xla():
    x, w = normal((3, 200)), normal((200, 130), 1)
    got, want = (linear(x, w, "TD,DF->TF", implementation=form) for form in ("pallas_tpu", "xla"))
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_what_it_refuses():
    x, w = normal((3, 256)), quantize_weight(normal((256, 256), 1), (0, 1))
    with pytest.raises(UserError, match="linear: pallas_tpu multiplies bfloat16 or float32 by weights in FP8, not float16"):
        linear(x.astype(jnp.float16), w, "TD,DF->TF", implementation="pallas_tpu")
    with pytest.raises(UserError, match="needs scales for blocks of 128 along the last summed axis"):
        linear(x, Fp8Weight(w.values, jnp.ones((2, 256))), "TD,DF->TF", implementation="pallas_tpu")
    with pytest.raises(UserError, match="one device's shard"):
        linear(x, Fp8Operand(normal((256, 256)), (("F", 2),)), "TD,DF->TF", implementation="pallas_tpu")
    with pytest.raises(UserError, match="last of x and first of w"):
        linear(x, w, "TD,FD->TF", implementation="pallas_tpu")
    with pytest.raises(UserError, match="grouped_linear: pallas_tpu multiplies"):
        grouped_linear(x, normal((2, 256, 8)), jnp.ones(2, jnp.int32), implementation="pallas_tpu")
    with pytest.raises(UserError, match="has scales"):
        bad = Fp8Activation(x, quantize_activation(x).values, jnp.ones((3, 1)))
        grouped_linear(bad, quantize_weight(normal((2, 256, 8)), (1, 2)), jnp.ones(2, jnp.int32), implementation="pallas_tpu")


def test_choice_of_forms():
    """Kernels where weights are kept in FP8 and all their sides are whole blocks."""

    def chosen(preset, **changes):
        forms = resolve_forms(mesh_of("tpu"), ModelConfig.preset(preset).replace(**changes))
        assert forms.fp8_training_linear == "pallas_tpu"  # of weights trained in FP8, which are filled up
        return forms.fp8_linear, forms.fp8_grouped_linear

    assert chosen("35b-a3b", fp8_weights=True) == ("pallas_tpu", "pallas_tpu")
    assert chosen("0.8b", fp8_weights=True) == ("pallas_tpu", "xla")  # which has no experts
    assert chosen("tiny", fp8_weights=True) == chosen("35b-a3b") == ("xla", "xla")
