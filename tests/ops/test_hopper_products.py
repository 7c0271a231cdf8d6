"""The Hopper kernels of `linear` and `grouped_linear`, run (pytest --gpu) or interpreted on the CPU, against float64 of the
operands they multiply."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen35_jax.compat import HAS_MOSAIC_GPU
from qwen35_jax.config import ModelConfig
from qwen35_jax.errors import UserError
from qwen35_jax.ops.forms import resolve_forms
from qwen35_jax.ops.fp8 import Fp8Operand, Fp8Weight, dequantize
from qwen35_jax.ops.fp8.reference import dequantize_reference, round_reference
from qwen35_jax.ops.grouped_linear import grouped_linear
from qwen35_jax.ops.hopper import operands, ring
from qwen35_jax.ops.hopper.gradients_fp8 import padded_blocks
from qwen35_jax.ops.hopper.rows import rows_times
from qwen35_jax.ops.hopper.tiles import ALIGNED, row_tiles, tile_count
from qwen35_jax.ops.linear import linear
from tests.ops import mosaic_gpu
from tests.ops.fp8_operands import (
    distance,
    expected_products,
    normal,
    products,
    quantize_activation,
    quantize_weight,
    spec_operands,
)

pytestmark = pytest.mark.skipif(not HAS_MOSAIC_GPU, reason="Pallas Mosaic GPU kernels need JAX 0.11 or newer")

# float32 results: sums of up to 512 terms in float32. bfloat16 results: one rounding more.
BOUND, ROUNDED = 1e-6, 4e-3
TENSOR_CORES = 2e-3  # what those of Hopper sum of FP8 numbers is kept in 14 bits (DeepSeek-V3, section 3.3.2); 1e-3 was seen
ROWS, GROUPS, IN, OUT = 96, 4, 256, 128
GROUP_SIZES = {
    "ragged": (3, 0, 69, 17),
    "all in one": (0, 96, 0, 0),
    "full": (20, 65, 3, 8),
    "none": (0, 0, 0, 0),
    "one row each": (1, 1, 1, 1),
}
SLOW = pytest.mark.slow
SIZES = [pytest.param(sizes, id=name, marks=() if name == "ragged" else SLOW) for name, sizes in GROUP_SIZES.items()]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Two thread blocks, so that each goes through several tiles."""
    monkeypatch.setattr(ring, "SMS", 2)
    with mosaic_gpu.run_or_interpreted():
        yield


def fp8_bound() -> float:
    return TENSOR_CORES if mosaic_gpu.has_gpu() else BOUND


def dense(x, w, sizes):
    """One product after the other, float64."""
    x, w = (np.asarray(a).astype(np.float64) for a in (x, w))
    out, start = np.zeros((x.shape[0], w.shape[2])), 0
    for size, weight in zip(sizes, w, strict=True):
        out[start : start + size] = x[start : start + size] @ weight
        start += size
    return out


def scaled(x) -> np.ndarray:
    """What an `Fp8Activation` stands for, float64."""
    values, scales = (np.asarray(a).astype(np.float64) for a in (x.values, x.scales))
    with np.errstate(invalid="ignore"):  # infinite scales times zero
        return values * np.repeat(scales, 128, -1)


grouped = jax.jit(functools.partial(grouped_linear, implementation="pallas_gpu"))


def grouped_operands(rows=ROWS):
    return normal((rows, IN), 0, jnp.bfloat16), normal((GROUPS, IN, OUT), 1, jnp.bfloat16) / 16


@jax.jit
def both(x, w, dy, sizes):
    """The product and its gradients."""
    y, back = jax.vjp(lambda x, w: grouped_linear(x, w, sizes, implementation="pallas_gpu"), x, w)
    return y, *back(dy)


def gradients(x, w, dy, sizes):
    ends = np.cumsum(sizes)
    dx = dense(dy, np.asarray(w).swapaxes(1, 2), sizes)
    x, dy = (np.asarray(a).astype(np.float64) for a in (x, dy))
    return dx, np.stack([x[end - n : end].T @ dy[end - n : end] for n, end in zip(sizes, ends, strict=True)])


@pytest.mark.parametrize("sizes", SIZES)
def test_grouped_bfloat16(sizes):
    """Rows of no group hold NaN: they reach nothing."""
    x, w = grouped_operands()
    dy, used = normal((ROWS, OUT), 2, jnp.bfloat16), sum(sizes)
    got = both(x.at[used:].set(jnp.nan), w, dy.at[used:].set(jnp.nan), jnp.asarray(sizes, jnp.int32))
    want = dense(x, w, sizes), *gradients(x, w, dy, sizes)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.bfloat16 and distance(a, b) < ROUNDED
    assert not np.asarray(got[0][used:]).any() and not np.asarray(got[1][used:]).any()


@pytest.mark.parametrize("sizes", SIZES)
def test_grouped_weights_in_fp8(sizes):
    x, w = grouped_operands()
    w = quantize_weight(w, (1, 2))
    y = grouped(x, w, jnp.asarray(sizes, jnp.int32))
    assert y.dtype == jnp.bfloat16 and distance(y, dense(x, dequantize(w, jnp.bfloat16), sizes)) < ROUNDED
    assert not np.asarray(y[sum(sizes) :]).any()


@pytest.mark.parametrize("many", [pytest.param(10**6, id="few rows"), pytest.param(0, id="many rows", marks=SLOW)])
@pytest.mark.parametrize("sizes", SIZES)
def test_grouped_both_in_fp8(monkeypatch, many, sizes):
    monkeypatch.setattr(operands, "MANY_ROWS", many)
    x, w = grouped_operands()
    x, w = quantize_activation(x), quantize_weight(w, (1, 2))
    y = jax.jit(lambda *args: grouped_linear(*args, implementation="pallas_gpu"))(x, w, jnp.asarray(sizes, jnp.int32))
    assert distance(y, dense(scaled(x), dequantize_reference(w), sizes)) < ROUNDED
    assert not np.asarray(y[sum(sizes) :]).any()


@jax.jit
def trained(x, w, dy, sizes):
    y, back = jax.vjp(lambda x, w: grouped_linear(x, Fp8Operand(w), sizes, implementation="pallas_gpu"), x, w)
    dx, dw = back(dy)
    return y, dx, dw.value if isinstance(dw, Fp8Operand) else dw


@pytest.mark.parametrize("sizes", SIZES)
def test_grouped_training(sizes):
    """Sizes that are no multiples of 128; the weights' gradients are those of the XLA form, which quantises the same blocks."""
    x, w = normal((ROWS, 136), 0, jnp.bfloat16), normal((GROUPS, 136, 72), 1) / 16
    dy = normal((ROWS, 72), 2, jnp.bfloat16)
    y, dx, dw = trained(x, w, dy, jnp.asarray(sizes, jnp.int32))
    rounded = np.stack([round_reference(np.asarray(m), (0, 1)) for m in w])
    assert distance(y, dense(round_reference(np.asarray(x), (1,)), rounded, sizes)) < ROUNDED
    assert distance(dx, dense(round_reference(np.asarray(dy), (1,)), rounded.swapaxes(1, 2), sizes)) < ROUNDED
    x = round_reference(np.asarray(x), (1,))
    for n, end, got in zip(sizes, np.cumsum(sizes), dw, strict=True):
        want = round_rows(x[end - n : end]).T @ round_rows(np.asarray(dy)[end - n : end])
        assert distance(got, want) < fp8_bound() if n else not np.asarray(got).any()


def round_rows(a: np.ndarray) -> np.ndarray:
    return round_reference(a, (0,)) if len(a) else a.astype(np.float64)


@pytest.mark.parametrize("spec", ["TD,DF->TF", pytest.param("BTNH,NHD->BTD", marks=SLOW)])
def test_linear_training(spec):
    x, w, dy = spec_operands(spec)
    x, dy = (a.astype(jnp.bfloat16).astype(jnp.float32) for a in (x, dy))
    f = functools.partial(linear, spec=spec, implementation="pallas_gpu")
    got = products(lambda x, w: f(x, w), x.astype(jnp.bfloat16), w, dy.astype(jnp.bfloat16))
    for a, b, bound in zip(got, expected_products(spec, x, w, dy), (ROUNDED, ROUNDED, fp8_bound()), strict=True):
        assert distance(a, b) < bound


def weight(shape, blocked, seed=1) -> Fp8Weight:
    return quantize_weight(normal(shape, seed) / 16, blocked)


@pytest.mark.parametrize("rows", [1, pytest.param(70, marks=SLOW), pytest.param(300, marks=SLOW)])
def test_linear_weights_in_fp8(rows):
    """Few rows: the summed axis in several parts. More than 256: XLA's product of the dequantised weight."""
    x, w = normal((rows, 2, 256), 0, jnp.bfloat16), weight((2, 256, 128), (1, 2))
    y = jax.jit(lambda x, w: linear(x, w, "TNH,NHD->TD", out_dtype=jnp.float32, implementation="pallas_gpu"))(x, w)
    want = np.asarray(x).astype(np.float64).reshape(rows, -1) @ np.asarray(dequantize(w, jnp.bfloat16), np.float64).reshape(
        512, -1
    )
    assert y.dtype == jnp.float32 and distance(y, want) < BOUND


def adversarial(shape, seed=0):
    """Neighbouring blocks whose sizes differ by ten powers of ten, and blocks of zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape, np.float32) * 10.0 ** rng.integers(-6, 5, (shape[0], shape[1] // 128)).repeat(128, 1)
    x[:, :128] *= rng.integers(0, 2, (shape[0], 1))
    return jnp.asarray(x, jnp.bfloat16)


@pytest.mark.parametrize("many", [pytest.param(10**6, id="few rows", marks=SLOW), pytest.param(0, id="many rows")])
def test_linear_both_in_fp8(monkeypatch, many):
    """Broken rows stay broken and alone; scales that differ; what is larger than 448; the gradient is that of x itself."""
    monkeypatch.setattr(operands, "MANY_ROWS", many)
    rows = adversarial((70, 512)).at[3, 7].set(jnp.nan).at[5, 200].set(jnp.inf).at[6].set(1e30)
    w = quantize_weight(adversarial((512, 256), 1), (0, 1), jnp.float32)
    x = quantize_activation(rows)

    def f(rows, x, w):
        multiply = functools.partial(linear, spec="TD,DF->TF", out_dtype=jnp.float32, implementation="pallas_gpu")
        return jax.vjp(lambda rows: multiply(type(x)(rows, x.values, x.scales), w), rows)

    y, back = f(rows, x, w)
    broken = np.isin(np.arange(70), (3, 5))
    assert np.isnan(np.asarray(y)[broken]).all() and np.isfinite(np.asarray(y)[~broken]).all()
    for got, want in zip(np.asarray(y)[~broken], scaled(x)[~broken] @ dequantize_reference(w), strict=True):
        assert distance(got, want) < (BOUND if many else fp8_bound())
    dy = normal(y.shape, 4)
    want = np.asarray(dy.astype(jnp.bfloat16)).astype(np.float64) @ np.asarray(dequantize(w, jnp.bfloat16), np.float64).T
    assert distance(back(dy)[0], want) < ROUNDED


def in_pairs(sizes, rows: int, columns: int, pairs: bool):
    """Rows times weights, both in FP8, by thread blocks alone or in pairs."""
    x, w = quantize_activation(normal((rows, IN), 0)), weight((len(sizes), IN, columns), (1, 2))
    multiply = functools.partial(rows_times, transposed=True, out_dtype=jnp.float32, pairs=pairs)
    scales = {"x_scales": x.scales, "w_scales": w.scales.astype(jnp.float32)}
    return jax.jit(multiply)(x.values, w.values.swapaxes(1, 2), jnp.asarray(sizes, jnp.int32), **scales)


@pytest.mark.parametrize("sizes", [(131, 0, 140), pytest.param((300,), marks=SLOW), pytest.param((0, 0), marks=SLOW)])
def test_blocks_in_pairs(monkeypatch, sizes):
    """What two thread blocks copy for each other is what each copies alone: two pairs, of which one has a tile more; on a GPU
    all of them, and several turns of each."""
    blocks, rows, columns, more = (132, 4096, 4096, 10) if mosaic_gpu.has_gpu() else (4, 400, 768, 1)
    sizes = [more * size for size in sizes]
    monkeypatch.setattr(ring, "SMS", blocks)
    alone, paired = (np.asarray(in_pairs(sizes, rows, columns, pairs)) for pairs in (False, True))
    np.testing.assert_array_equal(alone, paired)
    assert alone.any() == (sum(sizes) > 0)


def test_pairs_need_an_even_number_of_tiles():
    with pytest.raises(ValueError, match="even number of tiles, not fp8_rows with 3"):
        in_pairs((300,), 300, 384, True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bfloat16", "fp8", "training", "pairs"])
def test_no_races(kind):
    """What one warpgroup writes no other touches before it is told to: the interpreter raises where one does. It does not see
    what JAX takes of shared memory for itself."""
    x, w = grouped_operands(70)
    sizes, dy = jnp.asarray((3, 0, 50, 17), jnp.int32), normal((70, OUT), 2, jnp.bfloat16)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True, on_race="raise")):
        if kind == "pairs":
            jax.block_until_ready(in_pairs((128, 128), 256, 512, True))
        elif kind == "fp8":
            jax.block_until_ready(
                jax.jit(lambda *a: grouped_linear(*a, implementation="pallas_gpu"))(x, weight(w.shape, (1, 2)), sizes)
            )
        else:
            operand = Fp8Operand if kind == "training" else lambda w: w
            y, back = jax.vjp(lambda x, w: grouped_linear(x, operand(w), sizes, implementation="pallas_gpu"), x, w)
            jax.block_until_ready(back(dy))


def hopper_mesh():
    device = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0")
    return SimpleNamespace(devices=np.array([device]))


def test_choice_of_forms():
    """Weights kept in FP8 need whole blocks; float32 has no kernels; nothing is chosen for weights that a model has not."""
    ours = ("grouped_linear", "fp8_linear", "fp8_grouped_linear", "fp8_training_linear")

    def chosen(model, **changes):
        forms = resolve_forms(hopper_mesh(), ModelConfig.preset(model).replace(**changes))
        return {name for name in ours if getattr(forms, name) == "pallas_gpu"}

    assert chosen("35b-a3b", fp8_weights=True) == {"fp8_linear", "fp8_grouped_linear", "fp8_training_linear"}
    assert chosen("0.8b", fp8_weights=True) == {"fp8_linear", "fp8_training_linear"}
    assert chosen("35b-a3b") == {"grouped_linear", "fp8_training_linear"}
    assert chosen("0.8b") == chosen("tiny", dtype="bfloat16", fp8_weights=True) == {"fp8_training_linear"}
    assert chosen("35b-a3b", dtype="float32", fp8_weights=True) == set()


def test_forms_of_a_step_of_generation():
    """Opened once, a weight in FP8 is multiplied by XLA beyond 256 rows; with activations in FP8 too, by the kernel always."""

    def forms(model, rows, **changes):
        config = ModelConfig.preset(model).replace(**changes)
        return resolve_forms(hopper_mesh(), config).in_generation(config, rows)

    large = {"dtype": "bfloat16", "fp8_weights": True}
    assert [forms("35b-a3b", rows, **large)["fp8_linear"] for rows in (256, 257)] == ["pallas_gpu", "xla"]
    assert forms("35b-a3b", 257, **large, fp8_activations=True)["fp8_linear"] == "pallas_gpu"
    assert forms("35b-a3b", 257, **large)["fp8_grouped_linear"] == "pallas_gpu"
    plain = forms("35b-a3b", 257)
    assert plain["grouped_linear"] == "pallas_gpu" and plain["linear"] == "xla"
    assert not {"fp8_linear", "fp8_grouped_linear", "fp8_training_linear"} & plain.keys()
    assert not {"grouped_linear", "fp8_grouped_linear"} & forms("0.8b", 1).keys()


@pytest.mark.parametrize("height", [8, 64])
@pytest.mark.parametrize("sizes", [*GROUP_SIZES.values(), (0, 0, 0, 96), (64, 8, 0, 22), (8, 1, 7, 72)])
def test_tiles_cover_each_row_once(sizes, height):
    group, start, skip, size, total = (np.asarray(a) for a in row_tiles(jnp.asarray(sizes, jnp.int32), ROWS, height))
    assert len(group) == tile_count(ROWS, GROUPS, height) >= total[0]
    seen = np.full(ROWS, -1)
    for t in range(total[0]):
        rows = slice(start[t] + skip[t], start[t] + skip[t] + size[t])
        assert 0 <= start[t] <= ROWS - height and size[t] > 0 and (seen[rows] == -1).all()
        assert start[t] % ALIGNED == 0  # the interpreter copies from anywhere, the hardware does not
        seen[rows] = group[t]
    assert (seen == np.repeat(np.arange(GROUPS + 1), (*sizes, ROWS - sum(sizes)))).all()


@pytest.mark.parametrize("sizes", [(3, 0, 290, 17), (0, 320, 0, 0), (128, 192, 0, 0), (129, 0, 0, 100), (0, 0, 0, 0)])
def test_padded_blocks_hold_one_group(sizes):
    row, firsts, counts = (np.asarray(a) for a in padded_blocks(jnp.asarray(sizes, jnp.int32), 320))
    want, start = [], 0
    for size, first, count in zip(sizes, firsts, counts, strict=True):
        assert count == -(-size // 128) and len(want) == first * 128
        want += [*range(start, start + size), *[320] * (count * 128 - size)]
        start += size
    assert list(row) == want + [320] * (len(row) - len(want))


@pytest.mark.parametrize(
    ("x", "w", "spec", "message"),
    [
        (normal((4, 256)), weight((256, 128), (0, 1)), "TD,DF->TF", "bfloat16"),
        (normal((4, 200), 0, jnp.bfloat16), weight((200, 128), (0, 1)), "TD,DF->TF", "whole blocks"),
        (normal((4, 4, 64), 0, jnp.bfloat16), weight((4, 64, 128), (1, 2)), "TNH,NHD->TD", "whole blocks"),
        (normal((4, 256), 0, jnp.bfloat16), weight((128, 256), (0, 1)), "TD,VD->TV", "the last of x"),
        (normal((4, 128), 0, jnp.bfloat16), Fp8Operand(normal((128, 256)), (("F", 2),)), "TD,DF->TF", "one device"),
    ],
)
def test_what_the_kernels_refuse(x, w, spec, message):
    with pytest.raises(UserError, match=message):
        linear(x, w, spec, implementation="pallas_gpu")
