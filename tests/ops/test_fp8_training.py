"""FP8 training of `linear` and `grouped_linear`: all forms against float64, what is saved, and what is lowered."""

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
from qwen35_jax.ops.fp8 import Fp8Operand, share_activation
from qwen35_jax.ops.fp8.blocks import quantize_blocks, round_blocks
from qwen35_jax.ops.fp8.reference import products_reference, round_reference
from qwen35_jax.ops.fp8.statistics import ratios
from qwen35_jax.ops.fp8.training import dequantize_blocks
from qwen35_jax.ops.grouped_linear import grouped_linear
from qwen35_jax.ops.linear import linear
from tests.hlo import collectives

SIZES = {"B": 3, "T": 50, "D": 200, "N": 3, "G": 2, "H": 64, "K": 1, "F": 130}
SPECS = ["BTD,DNGH->BTNGH", "BTNH,NHD->BTD", "BTF,FD->BTD"]


@pytest.fixture(params=["cpu", "default"])
def form(request, monkeypatch):
    """The form of one platform, run here: FP8 products are slow on the CPU, and exact."""

    def choose(*args, default, **branches):
        return branches.get(request.param, default)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", choose)
    return request.param


all_forms = pytest.mark.parametrize("form", ["cpu", "default", "tpu"], indirect=True)


def normal(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def spec_operands(spec, dtype=jnp.float32, sizes=SIZES):
    x_axes, w_axes, out = re.split(",|->", spec)
    x, w, dy = (normal([sizes[a] for a in axes], i, dtype) for i, axes in enumerate((x_axes, w_axes, out)))
    return x, w / 16, dy


def expected_products(spec, x, w, dy):
    x_axes, w_axes, _ = re.split(",|->", spec)
    width = int(np.prod([x.shape[x_axes.index(a)] for a in w_axes if a in x_axes]))
    flat = [
        np.asarray(a).astype(np.float64) for a in (x.reshape(-1, width), w.reshape(width, -1), dy.reshape(x.size // width, -1))
    ]
    return [a.reshape(b.shape) for a, b in zip(products_reference(*flat), (dy, x, w), strict=True)]


def products(f, x, w, dy, **operand):
    """y, dx and dw of f(x, w), compiled."""

    def run(x, w, dy):
        y, back = jax.vjp(lambda x, w: f(x, Fp8Operand(w, **operand)), x, w)
        return y, *back(dy)

    return jax.jit(run)(x, w, dy)


def distance(a, b):
    """Relative Frobenius distance."""
    a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300)


# --- rounding


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)])
def test_rounding_is_exact(axes):
    x = np.asarray(normal((150, 260))) * np.repeat([1e-30, 1e-3, 1.0, 3e37], 65)[None].astype(np.float32)
    x[:128, :128] = 0
    expected = round_reference(x, axes).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(round_blocks, static_argnums=1)(x, axes), expected)
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


# --- grouped linear

ROWS, GROUPS, IN, OUT = 300, 4, 136, 72
GROUP_SIZES = {
    "ragged": (3, 0, 200, 17),
    "all in one": (0, 300, 0, 0),
    "full": (75, 150, 11, 64),
    "none": (0, 0, 0, 0),
    "one row each": (1, 1, 1, 1),
}


def grouped_operands(dtype=jnp.float32, rows=ROWS):
    return normal((rows, IN), 0, dtype), normal((GROUPS, IN, OUT), 1, dtype) / 16, normal((rows, OUT), 2, dtype)


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
