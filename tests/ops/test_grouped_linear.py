"""`grouped_linear` against a dense loop, and what it costs."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from qwen35_jax.errors import UserError
from qwen35_jax.ops.fp8.reference import dequantize_reference
from qwen35_jax.ops.grouped_linear import grouped_linear, grouped_linear_reference
from qwen35_jax.ops.grouped_linear.blocks import for_blocks
from tests.ops.fp8_operands import quantize_weight

ROWS, GROUPS, IN, OUT = 150, 5, 192, (2, 40)
SIZES = {
    "ragged": (3, 0, 90, 17, 1),
    "one row each": (1, 1, 1, 1, 1),
    "all in one": (0, 0, 150, 0, 0),
    "all in the last": (0, 0, 0, 0, 150),
    "full": (30, 31, 29, 33, 27),
    "none": (0, 0, 0, 0, 0),
    "tail at the end": (0, 140, 0, 9, 1),
}


def operands(rows=ROWS, groups=GROUPS, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, IN), np.float32)
    w = rng.standard_normal((groups, IN, *OUT), np.float32) / 8
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype)


def dense(x, w, sizes):
    """One product after the other, float64."""
    x, w = (np.asarray(a).astype(np.float64) for a in (x, w))
    out, start = np.zeros((x.shape[0], *w.shape[x.ndim :])), 0
    for size, weight in zip(sizes, w, strict=True):
        out[start : start + size] = np.tensordot(x[start : start + size], weight, x.ndim - 1)
        start += size
    return out


def error(a, b):
    b = np.asarray(b).astype(np.float64)
    return np.abs(np.asarray(a).astype(np.float64) - b).max() / max(np.abs(b).max(), 1e-9)


@pytest.mark.parametrize("name", SIZES)
def test_values(form, name):
    sizes = jnp.asarray(SIZES[name], jnp.int32)
    for dtype, bound in ((jnp.float32, 1e-6), (jnp.bfloat16, 4e-3)):
        x, w = operands(dtype=dtype)
        y = jax.jit(grouped_linear)(x, w, sizes)
        assert y.dtype == dtype and y.shape == (ROWS, *OUT) and error(y, dense(x, w, SIZES[name])) < bound
        assert not np.asarray(y[sum(SIZES[name]) :]).any()
        assert error(grouped_linear_reference(x, w, sizes), dense(x, w, SIZES[name])) < 1e-6


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 33])
def test_few_rows(form, rows):
    for sizes in ([rows, 0, 0, 0, 0], [0, rows - 1, 0, 0, 1], [0, 0, 0, 0, rows - 1]):
        x, w = operands(rows, dtype=jnp.bfloat16)
        y = jax.jit(grouped_linear)(x, w, jnp.asarray(sizes, jnp.int32))
        assert error(y, dense(x, w, sizes)) < 4e-3


def test_several_input_axes_and_nothing():
    x, w = operands()
    y = grouped_linear(x.reshape(ROWS, 3, 64), w.reshape(GROUPS, 3, 64, *OUT), jnp.asarray(SIZES["ragged"]))
    assert error(y, dense(x, w, SIZES["ragged"])) < 1e-6
    assert grouped_linear(x[:0], w, jnp.zeros(GROUPS, jnp.int32)).shape == (0, *OUT)


@pytest.mark.parametrize("name", ["ragged", "all in one", "none"])
def test_fp8(form, name):
    x, w = operands()
    q = quantize_weight(w, (1, 3))
    sizes = jnp.asarray(SIZES[name], jnp.int32)
    assert error(jax.jit(grouped_linear)(x, q, sizes), dense(x, dequantize_reference(q), SIZES[name])) < 1e-6
    x = x.astype(jnp.bfloat16)
    rounded = jnp.asarray(dequantize_reference(q), jnp.float32).astype(jnp.bfloat16)
    assert error(jax.jit(grouped_linear)(x, q, sizes), dense(x, rounded, SIZES[name])) < 4e-3


def loss(f, x, w, sizes, c):
    return (c * f(x, w, sizes)).sum()


# Compiled once for all sizes of the groups, and anew for each form.
gradients = jax.jit(jax.grad(functools.partial(loss, grouped_linear), (0, 1)))
gradient_of_x = jax.jit(jax.grad(functools.partial(loss, grouped_linear)))


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients(form, name, dtype):
    x, w = operands(dtype=dtype)
    sizes = jnp.asarray(SIZES[name], jnp.int32)
    c = jnp.asarray(np.random.default_rng(1).standard_normal((ROWS, *OUT)), jnp.float32)
    bound = 2e-6 if dtype == jnp.float32 else 1e-2
    expected = jax.grad(functools.partial(loss, grouped_linear_reference), (0, 1))(x, w, sizes, c)
    for a, b in zip(gradients(x, w, sizes, c), expected, strict=True):
        assert a.dtype == dtype and a.shape == b.shape and error(a, b) < bound
    q = quantize_weight(w, (1, 3))
    expected = jax.grad(functools.partial(loss, grouped_linear_reference))(x, q, sizes, c)
    assert error(gradient_of_x(x, q, sizes, c), expected) < bound


def test_shard_map_over_groups():
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
    x, w = operands(ROWS, 8, jnp.bfloat16)
    sizes = np.asarray([3, 0, 50, 17, 1, 20, 4, 9], np.int32)

    def local(x, w, sizes):  # each device: its two groups' rows, moved to the front
        first = sizes.sum() * 0 + jnp.cumsum(sizes)[2 * jax.lax.axis_index("model")] - sizes[2 * jax.lax.axis_index("model")]
        own = jax.lax.dynamic_slice_in_dim(sizes, 2 * jax.lax.axis_index("model"), 2)
        y = grouped_linear(jnp.roll(x, -first, 0), w, own)
        return jax.lax.psum(jnp.roll(y.astype(jnp.float32), first, 0), "model")

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("model"), P()), out_specs=P(), check_vma=False)
    assert error(jax.jit(mapped)(x, w, jnp.asarray(sizes)), dense(x, w, sizes)) < 4e-3


def test_what_does_not_fit():
    x, w = operands()
    with pytest.raises(UserError, match="do not fit"):
        grouped_linear(x[:, :5], w, jnp.zeros(GROUPS, jnp.int32))
    with pytest.raises(UserError, match="pallas_gpu"):
        grouped_linear(x, w, jnp.zeros(GROUPS, jnp.int32), implementation="pallas_gpu")


# --- what it costs


@pytest.mark.parametrize("kind", ["bfloat16", "float32", "fp8"])
def test_only_the_weights_in_use_are_read(kind):
    """One token's eight experts of sixty-four: nothing of the size of all experts is written, at any precision."""
    w = jnp.zeros((64, 512, 256), jnp.bfloat16 if kind == "bfloat16" else jnp.float32)
    w = quantize_weight(w, (1, 2)) if kind == "fp8" else w
    x = jnp.zeros((8, 512), jnp.float32 if kind == "float32" else jnp.bfloat16)
    compiled = jax.jit(grouped_linear).lower(x, w, jnp.zeros(64, jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 512 * 256 * 4


def computed(group_sizes: list[int], rows: int) -> np.ndarray:
    """int [2, rows]: how many blocks of the loops hold each row, and how many count it as theirs."""

    def block(carry, _, group, start, size, mine):
        both = jnp.stack([jnp.ones(size, jnp.int32), mine[:, 0].astype(jnp.int32)])
        old = jax.lax.dynamic_slice_in_dim(carry, start, size, 1)
        return jax.lax.dynamic_update_slice_in_dim(carry, old + both, start, 1)

    run = jax.jit(lambda sizes: for_blocks(block, jnp.zeros((2, rows), jnp.int32), (), sizes, rows))
    return np.asarray(run(jnp.asarray(group_sizes, jnp.int32)))


@pytest.mark.parametrize("used", [(512,), (1, 1, 1, 1), (130, 7, 1, 64, 65, 245), (9,) * 50])
def test_work_follows_the_rows_and_not_the_groups(used):
    """Each row is some block's own, once; at most eight times the rows are computed; and empty groups add nothing."""
    rows = 512
    held, own = computed(list(used), rows)
    routed = sum(used)
    assert (own == (np.arange(rows) < routed)).all()
    assert held.sum() <= 8 * routed
    spread = [n for size in used for n in (0, size, 0, 0)]
    assert (computed(spread, rows) == [held, own]).all()


def test_nothing_is_done_for_every_group():
    """The operations of the program, each loop's counted once, are those of its blocks, and no loop is over the groups."""
    x = jnp.ones((512, 128))

    def operations(groups):
        lowered = jax.jit(grouped_linear).lower(x, jnp.ones((groups, 128, 128)), jnp.zeros(groups, jnp.int32))
        return lowered.compile().cost_analysis()["flops"]

    assert operations(64) < 1.5 * operations(4)  # a dense form: 16 times
    jaxpr = jax.make_jaxpr(grouped_linear)(x, jnp.ones((64, 128, 128)), jnp.zeros(64, jnp.int32))
    assert "length=64" not in str(jaxpr) and str(jaxpr).count("while") >= 2


@pytest.mark.parametrize("kind", ["bfloat16", "fp8"])
def test_tpu_uses_its_ragged_product(kind):
    x, w = operands(dtype=jnp.bfloat16)
    w = quantize_weight(w, (1, 3)) if kind == "fp8" else w

    def lowered(f):
        return jax.jit(f).trace(x, w, jnp.zeros(GROUPS, jnp.int32)).lower(lowering_platforms=("tpu",)).as_text()

    assert re.search("ragged_dot", lowered(grouped_linear)) and "while" not in lowered(grouped_linear)
