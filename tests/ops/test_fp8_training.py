"""FP8 training of `linear` and `grouped_linear`: all forms against float64."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen35_jax.errors import UserError
from qwen35_jax.ops.fp8 import Fp8Operand, blocks, training
from qwen35_jax.ops.fp8.reference import products_reference, round_reference
from qwen35_jax.ops.grouped_linear import grouped_linear
from qwen35_jax.ops.linear import linear
from qwen35_jax.planner.hlo import collectives
from tests.ops.fp8_operands import (
    GROUP_SIZES,
    GROUPS,
    IN,
    OUT,
    ROWS,
    SIZES,
    distance,
    expected_products,
    grouped_operands,
    normal,
    products,
    spec_operands,
)

SPECS = ["BTD,DNGH->BTNGH", "BTNH,NHD->BTD", "BTF,FD->BTD"]
round_blocks, quantize_blocks, requantize_blocks = (
    jax.jit(function, static_argnames="blocked_axes")
    for function in (blocks.round_blocks, blocks.quantize_blocks, blocks.requantize_blocks)
)
dequantize_blocks = jax.jit(training.dequantize_blocks)
all_forms = pytest.mark.parametrize("form", ["cpu", "default", "tpu"], indirect=True)


# --- rounding


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)])
def test_rounding_is_exact(axes):
    x = np.asarray(normal((150, 260))) * np.repeat([1e-30, 1e-3, 1.0, 3e37], 65)[None].astype(np.float32)
    x[:128, :128] = 0
    expected = round_reference(x, axes).astype(np.float32)
    np.testing.assert_array_equal(round_blocks(x, axes), expected)
    np.testing.assert_array_equal(dequantize_blocks(*quantize_blocks(jnp.asarray(x), axes)), expected)


def test_cpu_cast_is_the_cast():
    """Of every bfloat16 number within range, and of what lies just below and between them."""
    x = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    x = x[np.abs(x) <= 448]
    x = np.concatenate([x, np.nextafter(x, np.float32(0)), x * np.float32(0.998)])
    # Blocks that all hold 448 have the scale 1, so that the values are the cast alone.
    rows = np.pad(x, (0, -x.size % 127)).reshape(-1, 127)
    rows = np.concatenate([rows, np.full((len(rows), 1), 448, np.float32)], 1)
    values, scales = quantize_blocks(jnp.asarray(rows), (1,))
    assert (np.asarray(scales) == 1).all()
    np.testing.assert_array_equal(np.asarray(values).view(np.uint8), rows.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


# --- linear


@pytest.mark.parametrize("spec", SPECS)
def test_linear(form, spec):
    x, w, dy = spec_operands(spec)
    got = products(lambda x, w: linear(x, w, spec), x, w, dy)
    for a, b, like in zip(got, expected_products(spec, x, w, dy), (dy, x, w), strict=True):
        assert a.dtype == like.dtype and a.shape == like.shape
        assert distance(a, b) < 1e-6  # the order of summation in float32, and nothing else


def test_linear_in_bfloat16_with_a_float32_weight(form):
    spec = "BTD,DF->BTF"
    x, _, dy = spec_operands(spec, jnp.bfloat16)
    w = spec_operands(spec)[1]
    got = products(lambda x, w: linear(x, w, spec, out_dtype=jnp.float32), x, w, dy.astype(jnp.float32))
    assert [a.dtype for a in got] == [jnp.float32, jnp.bfloat16, jnp.float32]
    for a, b, bound in zip(got, expected_products(spec, x, w, dy), (1e-6, 3e-3, 1e-6), strict=True):
        assert distance(a, b) < bound


def test_error_of_the_products():
    """Beside the products of floats: e4m3 has three bits behind the first, so that one operand is off by about 2.6 %,
    and a product of two by about 3.7 % (of three roundings, as in the weight's gradient, by about 4.5 %)."""
    spec = "BTD,DF->BTF"
    x, w, dy = spec_operands(spec, sizes={"B": 2, "T": 256, "D": 512, "F": 384})
    exact = jax.vjp(lambda x, w: jnp.einsum(spec, x, w), x, w)
    got = products(lambda x, w: linear(x, w, spec), x, w, dy)
    errors = [distance(a, b) for a, b in zip(got, (exact[0], *exact[1](dy)), strict=True)]
    print(errors)
    assert all(0.03 < e < 0.045 for e in errors[:2]) and 0.03 < errors[2] < 0.055


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_magnitudes_and_zeros(form, scale):
    spec = "BTD,DF->BTF"
    x, w, dy = spec_operands(spec)
    x, dy = (x * scale).at[0].set(0), (dy * scale).at[:, :, :128].set(0)
    got = products(lambda x, w: linear(x, w, spec), x, w, dy)
    for a, b in zip(got, expected_products(spec, x, w, dy), strict=True):
        assert np.isfinite(a).all() and distance(a, b) < 1e-6
    zero = products(lambda x, w: linear(x, w, spec), x * 0, w * 0, dy * 0)
    assert not any(np.asarray(a).any() for a in zero)


def test_broken_numbers_stay_visible(form):
    spec = "BTD,DF->BTF"
    x, w, dy = spec_operands(spec)
    y, _, dw = products(lambda x, w: linear(x, w, spec), x.at[0, 0, 0].set(jnp.nan).at[1, 1, 1].set(jnp.inf), w, dy)
    assert np.isnan(y[0, 0]).all() and np.isnan(y[1, 1]).all() and np.isfinite(y[2]).all()
    assert np.isnan(dw[0]).all()


def test_gradient_is_an_operand():
    x, w, _ = spec_operands("BTD,DF->BTF")
    operand = Fp8Operand(w.astype(jnp.bfloat16), (("F", 2),))
    gradient = jax.grad(lambda w: linear(x, w, "BTD,DF->BTF").sum())(operand)
    assert isinstance(gradient, Fp8Operand) and gradient.cuts == operand.cuts
    assert gradient.value.dtype == jnp.bfloat16 and jax.tree.map(lambda a: a[0], gradient).value.shape == w.shape[1:]


def test_specs_that_fp8_does_not_take():
    with pytest.raises(UserError, match="BTD,VD->BTV"):
        linear(normal((1, 2, 8)), Fp8Operand(normal((16, 8))), "BTD,VD->BTV")


def test_scan_and_remat():
    x, w, dy = spec_operands("BTD,DF->BTF", sizes=SIZES | {"F": SIZES["D"]})
    stacked = jnp.stack([w, w * 2])

    def unrolled(x, ws):
        for w in ws:
            x = linear(x, Fp8Operand(w), "BTD,DF->BTF")
        return (x * dy).sum()

    @jax.checkpoint
    def unit(x, w):
        return linear(x, w, "BTD,DF->BTF"), None

    def scanned(x, ws):
        return (jax.lax.scan(unit, x, Fp8Operand(ws))[0] * dy).sum()

    for a, b in zip(*(jax.jit(jax.grad(f, (0, 1)))(x, stacked) for f in (unrolled, scanned)), strict=True):
        assert distance(a, b) < 1e-6


# --- meshes


@pytest.mark.parametrize("shape", [(2, 4), (1, 8)])
@pytest.mark.parametrize("spec", ["BTD,DNH->BTNH", "BTF,FD->BTD"])
def test_sharded(form, shape, spec):
    """Whole blocks on every device: the numbers of one device, and no exchange but sums of results."""
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rules = {"B": "data", "N": "model", "F": "model"}
    x_axes, w_axes, out = re.split(",|->", spec)
    x, w, dy = spec_operands(spec, sizes={"B": 8, "T": 128, "D": 256, "N": 8, "H": 128, "F": 1024})
    places = [NamedSharding(mesh, P(*map(rules.get, axes))) for axes in (x_axes, w_axes, out)]
    placed = jax.device_put([x, w, dy], places)
    cuts = tuple((letter, mesh.shape[axis]) for letter, axis in rules.items())

    def run(x, w, dy):
        y, back = jax.vjp(lambda x, w: linear(x, Fp8Operand(w, cuts), spec), x, w)
        return y, *back(dy)

    run = jax.jit(run, out_shardings=(places[2], places[0], places[1]))
    for a, b in zip(run(*placed), expected_products(spec, x, w, dy), strict=True):
        assert distance(a, b) < 1e-6
    found = collectives(run.lower(*placed).compile().as_text())
    assert {c.kind for c in found} <= {"all-reduce"}, [c.line for c in found]
    assert len(found) <= 3, [c.line for c in found]


@pytest.mark.parametrize("sizes", [{"F": 96}, {"F": 600}])
def test_blocks_begin_anew_in_every_part(form, sizes):
    spec, n = "BTF,FD->BTD", 4
    x, w, dy = spec_operands(spec, sizes=SIZES | sizes)
    y, dx, dw = products(lambda x, w: linear(x, w, spec), x, w, dy, cuts=(("F", n),))
    parts = [expected_products(spec, a, b, dy) for a, b in zip(np.split(x, n, 2), np.split(w, n, 0), strict=True)]
    assert distance(y, sum(p[0] for p in parts)) < 1e-6
    assert distance(dx, np.concatenate([p[1] for p in parts], 2)) < 1e-6
    assert distance(dw, np.concatenate([p[2] for p in parts], 0)) < 1e-6


def test_rows_and_tokens_that_a_mesh_cuts(form):
    """As with context parallelism on replicas: the gradient of w is summed over the tokens of each part, in blocks of its own."""
    spec, cuts = "BTD,DF->BTF", (("B", 2), ("T", 4))
    x, w, dy = spec_operands(spec, sizes=SIZES | {"B": 2, "T": 4 * 136})
    y, dx, dw = products(lambda x, w: linear(x, w, spec), x, w, dy, cuts=cuts)
    parts = [[part for row in np.split(a, 2) for part in np.split(row, 4, axis=1)] for a in (x, dy)]
    wanted = [expected_products(spec, a, w, b) for a, b in zip(*parts, strict=True)]
    for got, at in ((y, 0), (dx, 1)):
        rows = [np.concatenate([p[at] for p in wanted[4 * i : 4 * i + 4]], axis=1) for i in range(2)]
        assert distance(got, np.concatenate(rows)) < 1e-6
    assert distance(dw, sum(p[2] for p in wanted)) < 1e-6
    assert distance(dw, expected_products(spec, x, w, dy)[2]) > 1e-3  # in blocks that lie across the parts


# --- grouped linear


def expected_groups(x, w, dy, sizes):
    out, start = [np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)], 0
    for group, size in enumerate(sizes):
        mine = slice(start, start + size)
        if size:
            out[0][mine], out[1][mine], out[2][group] = products_reference(x[mine], w[group], dy[mine])
        start += size
    return out


@all_forms
@pytest.mark.parametrize("name", GROUP_SIZES)
def test_grouped(form, name):
    x, w, dy = grouped_operands()
    sizes = jnp.asarray(GROUP_SIZES[name], jnp.int32)
    got = products(lambda x, w: grouped_linear(x, w, sizes), x, w, dy)
    for a, b, like in zip(got, expected_groups(x, w, dy, GROUP_SIZES[name]), (dy, x, w), strict=True):
        assert a.dtype == like.dtype and a.shape == like.shape and distance(a, b) < 1e-6
    assert not np.asarray(got[0][sum(GROUP_SIZES[name]) :]).any() and not np.asarray(got[1][sum(GROUP_SIZES[name]) :]).any()


@all_forms
@pytest.mark.parametrize("rows", [1, 130])
def test_grouped_few_rows(form, rows):
    x, w, dy = grouped_operands(rows=rows)
    sizes = (0, rows - rows // 2, 0, rows // 2)
    got = products(lambda x, w: grouped_linear(x, w, jnp.asarray(sizes, jnp.int32)), x, w, dy)
    for a, b in zip(got, expected_groups(x, w, dy, sizes), strict=True):
        assert distance(a, b) < 1e-6


@all_forms
def test_grouped_in_bfloat16_and_with_several_axes(form):
    x, w, dy = grouped_operands(jnp.bfloat16)
    sizes = GROUP_SIZES["ragged"]
    got = products(
        lambda x, w: grouped_linear(x.reshape(ROWS, 2, IN // 2), w, jnp.asarray(sizes)),
        x,
        w.reshape(GROUPS, 2, IN // 2, OUT),
        dy,
    )
    assert all(a.dtype == jnp.bfloat16 for a in got)
    for a, b in zip(got, expected_groups(x, w, dy, sizes), strict=True):
        assert distance(np.asarray(a).reshape(b.shape), b) < 3e-3


def test_grouped_of_nothing():
    x, w, _ = grouped_operands()
    y, back = jax.vjp(lambda x, w: grouped_linear(x, Fp8Operand(w), jnp.zeros(GROUPS, jnp.int32)), x[:0], w)
    assert y.shape == (0, OUT) and not np.asarray(back(y)[1]).any()


@pytest.mark.parametrize("shape", [(1, 300, 2, 200), (2, 64, 1, 384), (1, 5, 1, 7), (1, 128, 1, 128), (1, 0, 1, 256)])
def test_requantised_a_block_at_a_time(shape):
    """To the bit what the whole array, dequantised, gives along the other axis: ragged ends, short and empty axes."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape) * np.exp(3 * rng.standard_normal(shape))
    quantised = quantize_blocks(jnp.asarray(x, jnp.float32), (3,))
    for got, want in zip(
        requantize_blocks(*quantised, (1,)),
        quantize_blocks(dequantize_blocks(*quantised), (1,)),
        strict=True,
    ):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))
