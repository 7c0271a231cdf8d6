"""`linear` against float64, on one device and on meshes, and what XLA:CPU makes of it."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen35_jax.errors import UserError
from qwen35_jax.ops.fp8.reference import dequantize_reference
from qwen35_jax.ops.linear import linear, linear_reference
from qwen35_jax.planner.hlo import collectives
from tests.ops.fp8_operands import quantize_weight

SIZES = {"B": 2, "T": 3, "D": 1024, "N": 8, "G": 2, "H": 128, "K": 2, "F": 1152, "V": 600}
# Every form of the model: spec, the weight's blocked axes.
SPECS = {
    "BTD,DNGH->BTNGH": (0, 3),
    "BTD,DKH->BTKH": (0, 2),
    "BTD,DN->BTN": (0, 1),
    "BTNH,NHD->BTD": (1, 2),
    "BTD,DF->BTF": (0, 1),
    "BTF,FD->BTD": (0, 1),
    "BTD,VD->BTV": (0, 1),
    "BTD,D->BT": (0,),
}


def operands(spec, sizes=SIZES, dtype=jnp.float32, seed=0):
    x_axes, w_axes = spec.split("->")[0].split(",")
    rng = np.random.default_rng(seed)
    x, w = (rng.standard_normal([sizes[a] for a in axes], np.float32) for axes in (x_axes, w_axes))
    return jnp.asarray(x, dtype), jnp.asarray(w / 32, dtype)


def exact(spec, x, w):
    return np.einsum(spec, np.asarray(x).astype(np.float64), np.asarray(w).astype(np.float64))


def relative(a, b):
    b = np.asarray(b).astype(np.float64)
    return np.abs(np.asarray(a).astype(np.float64) - b).max() / np.abs(b).max()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("rows", [(1, 1), (2, 3), (1, 40)])
def test_values(spec, rows):
    sizes = SIZES | {"B": rows[0], "T": rows[1]}
    for dtype, bound in ((jnp.float32, 2e-6), (jnp.bfloat16, 4e-3)):
        x, w = operands(spec, sizes, dtype)
        y, wide = jax.jit(lambda x, w: (linear(x, w, spec), linear(x, w, spec, out_dtype=jnp.float32)))(x, w)
        assert y.dtype == dtype and relative(y, exact(spec, x, w)) < bound
        assert wide.dtype == jnp.float32 and relative(wide, exact(spec, x, w)) < 2e-6
        assert relative(linear_reference(x, w, spec), exact(spec, x, w)) < 2e-6


@pytest.mark.parametrize("spec", SPECS)
def test_fp8(spec):
    """Sums of 256 terms: in whatever order a machine adds them, float32 errs by about sqrt(256) x 2^-24 < 1e-6."""
    x, w = operands(spec, SIZES | {"D": 256, "F": 256, "N": 2})
    q = quantize_weight(w, SPECS[spec])
    y = jax.jit(linear, static_argnums=2)(x, q, spec)
    assert relative(y, exact(spec, x, dequantize_reference(q))) < 1e-6
    # In bfloat16 the dequantised weight is rounded once, like the activations.
    y = jax.jit(linear, static_argnums=2)(x.astype(jnp.bfloat16), q, spec)
    rounded = jnp.asarray(dequantize_reference(q), jnp.float32).astype(jnp.bfloat16)
    assert relative(y, exact(spec, x.astype(jnp.bfloat16), rounded)) < 4e-3


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients(spec, dtype):
    x, w = operands(spec, dtype=dtype)
    c = jnp.asarray(np.random.default_rng(3).standard_normal(linear_reference(x, w, spec).shape), jnp.float32)
    bound = 2e-6 if dtype == jnp.float32 else 8e-3
    expected = jax.jit(jax.grad(lambda x, w: (c * linear_reference(x, w, spec)).sum(), (0, 1)))(x, w)
    got = jax.jit(jax.grad(lambda x, w: (c * linear(x, w, spec)).sum(), (0, 1)))(x, w)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype and relative(a, b) < bound
    q = quantize_weight(w, SPECS[spec])
    expected = jax.jit(jax.grad(lambda x, q: (c * linear_reference(x, q, spec)).sum()))(x, q)
    assert relative(jax.jit(jax.grad(lambda x, q: (c * linear(x, q, spec)).sum()))(x, q), expected) < bound


def test_vmap_and_scan():
    x, w = operands("BTD,DF->BTF")
    one = linear(x, w, "BTD,DF->BTF")
    np.testing.assert_allclose(jax.vmap(lambda x: linear(x, w, "TD,DF->TF"))(x), one, rtol=1e-5, atol=1e-5)
    _, stacked = jax.lax.scan(lambda c, w: (c, linear(x, w, "BTD,DF->BTF")), 0, jnp.stack([w, w]))
    np.testing.assert_allclose(stacked[1], one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "x, w, spec, message",
    [((2, 3), (3, 4), "BTD,DF->BTF", "does not fit"), ((2, 3, 4), (5, 6), "BTD,DF->BTF", "axis D differs")],
)
def test_shapes_that_do_not_fit(x, w, spec, message):
    with pytest.raises(UserError, match=message):
        linear(jnp.zeros(x), jnp.zeros(w), spec)


def test_unknown_form():
    with pytest.raises(UserError, match="'triton'.*pallas_tpu"):
        linear(jnp.zeros((1, 1, 2)), jnp.zeros((2, 2)), "BTD,DF->BTF", implementation="triton")


# --- meshes

WEIGHT_AXES = {"F": "model", "N": "model", "V": "model"}


def on_mesh(mesh, axes, a, batch):
    rules = WEIGHT_AXES | ({"B": "data"} if batch else {})
    return jax.device_put(a, NamedSharding(mesh, P(*(rules.get(axis) for axis in axes))))


@pytest.mark.parametrize("shape", [(1, 8), (2, 4), (8, 1)])
@pytest.mark.parametrize("spec", ["BTD,DF->BTF", "BTF,FD->BTD", "BTNH,NHD->BTD", "BTD,DNGH->BTNGH", "BTD,VD->BTV"])
@pytest.mark.parametrize("rows", [(8, 2), (1, 1)])
def test_sharded_equals_unsharded(shape, spec, rows):
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    x_axes, w_axes = spec.split("->")[0].split(",")
    x, w = operands(spec, SIZES | {"B": rows[0], "T": rows[1]}, jnp.bfloat16)
    run = jax.jit(lambda x, w: linear(x, w, spec, out_dtype=jnp.float32))
    expected = run(x, w)
    placed = on_mesh(mesh, x_axes, x, rows[0] == 8), on_mesh(mesh, w_axes, w, False)
    np.testing.assert_allclose(run(*placed), expected, rtol=1e-4, atol=1e-4)
    found = {c.kind for c in collectives(run.lower(*placed).compile().as_text())}
    assert found <= {"all-reduce"}, found  # partial sums, and never a gathered weight


def test_shard_map():
    mesh = jax.make_mesh((1, 8), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    x, w = operands("BTF,FD->BTD", dtype=jnp.bfloat16)

    def local(x, w):
        return jax.lax.psum(linear(x, w, "BTF,FD->BTD", out_dtype=jnp.float32), "model")

    specs = (P(None, None, "model"), P("model"))
    y = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P()))(x, w)
    np.testing.assert_allclose(y, linear(x, w, "BTF,FD->BTD", out_dtype=jnp.float32), rtol=1e-4, atol=1e-4)


def test_shard_map_vocabulary():
    mesh = jax.make_mesh((1, 8), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    x, w = operands("BTD,VD->BTV", dtype=jnp.bfloat16)

    def local(x, w):
        return linear(x, w, "BTD,VD->BTV", out_dtype=jnp.float32)

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("model")), out_specs=P(None, None, "model"))
    np.testing.assert_allclose(jax.jit(mapped)(x, w), local(x, w), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("vocabulary", [4096, 4099, 5 * 8 * 97])
@pytest.mark.parametrize("rows", [1, 5])
def test_vocabulary_in_slabs(vocabulary, rows):
    x, w = operands("BTD,VD->BTV", SIZES | {"V": vocabulary, "B": rows, "T": 1}, jnp.bfloat16)
    y = jax.jit(lambda x, w: linear(x, w, "BTD,VD->BTV", out_dtype=jnp.float32))(x, w)
    assert relative(y, exact("BTD,VD->BTV", x, w)) < 2e-6


# --- what is compiled


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("spec", ["BTD,DNGH->BTNGH", "BTNH,NHD->BTD", "BTF,FD->BTD", "BTD,VD->BTV"])
def test_cpu_writes_no_float32_copy_of_the_weight(spec, rows):
    x, w = operands(spec, SIZES | {"B": rows, "T": 1, "V": 16384}, jnp.bfloat16)
    compiled = jax.jit(linear, static_argnums=2).lower(x, w, spec).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < w.nbytes / 2


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_other_platforms_get_one_product(platform):
    x, w = operands("BTD,DF->BTF", dtype=jnp.bfloat16)
    text = jax.jit(linear, static_argnums=2).trace(x, w, "BTD,DF->BTF").lower(lowering_platforms=(platform,)).as_text()
    assert len(re.findall(r"stablehlo\.dot_general", text)) == 1 and "convert" not in text
