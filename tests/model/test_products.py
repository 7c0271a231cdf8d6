"""FP8 training of dense weights with the Hopper kernels on a mesh: each device multiplies its own shard by itself.

JAX's interpreter of Mosaic GPU kernels mixes up several devices, so that here XLA's product of the same operands stands for the
kernel; tests/ops/test_hopper_products.py compares the two on one device, tests/aot compiles the kernel on a mesh.
"""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from qwen35_jax.config import ModelConfig
from qwen35_jax.model.products import Products
from qwen35_jax.ops.forms import Forms
from qwen35_jax.ops.fp8 import Fp8Operand, share_activation
from qwen35_jax.ops.fp8.statistics import COUNT, ratios
from qwen35_jax.ops.fp8.training import block_dot
from qwen35_jax.ops.hopper import operands
from qwen35_jax.ops.linear import gpu
from qwen35_jax.planner.hlo import collectives
from qwen35_jax.planner.topologies import parse_topology, stand_ins
from qwen35_jax.sharding import Sharding, make_mesh

SIZES = {"B": 8, "T": 48, "D": 256, "N": 8, "K": 8, "H": 128, "F": 1536}
SPECS = ["BTD,DKH->BTKH", "BTD,DF->BTF", "BTF,FD->BTD", "BTNH,NHD->BTD"]
MESHES = ["2x4", *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("2x2x2", "8x1", "1x8"))]


@pytest.fixture
def kernels(monkeypatch):
    """The form, with a stand-in for its kernel that notes the operands that it is given."""
    seen = []

    def multiply(out_dtype, a, a_side, b, b_side):
        seen.append([operand[0].shape for operand in (a, b)])
        return block_dot(a, a_side, b, b_side).astype(out_dtype)

    monkeypatch.setattr(operands, "HAS_MOSAIC_GPU", True)
    monkeypatch.setattr(gpu, "training_dot", multiply)
    return seen


@functools.cache
def arrays(spec, mesh):
    """The sharding, and x bfloat16, w float32 and dy bfloat16 on it."""
    sharding, rng = Sharding(make_mesh(mesh)), np.random.default_rng(0)
    placed = []
    for axes, scale in zip(re.split(",|->", spec), (1, 1 / 16, 1), strict=True):
        dtype = jnp.float32 if scale < 1 else jnp.bfloat16
        value = scale * rng.standard_normal([SIZES[a] for a in axes], np.float32)
        placed.append(jax.device_put(jnp.asarray(value, dtype), NamedSharding(sharding.mesh, sharding.spec(" ".join(axes)))))
    return sharding, placed


def compiled(spec, mesh, form, shared=False, statistics_axis=None):
    """The product, dx and dw compiled, and their arguments. shared: x is quantised once, before the product."""
    sharding, (x, w, dy) = arrays(spec, mesh)
    products = Products(ModelConfig.preset("tiny"), sharding, Forms(fp8_training_linear=form))
    cuts = tuple((letter, sharding.size(letter)) for letter in "BNKF" if sharding.size(letter) > 1)

    def run(x, w, dy):
        def product(x, w):
            operand = Fp8Operand(w, cuts, statistics_axis)
            return products(share_activation(x, operand) if shared else x, operand, spec)

        y, back = jax.vjp(product, x, w)
        return y, *back(dy)

    places = dy.sharding, x.sharding, w.sharding
    return jax.jit(run, out_shardings=places).lower(x, w, dy).compile(), (x, w, dy)


def distance(a, b):
    a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("spec", SPECS)
def test_equal_to_the_partitioned_form(kernels, spec, mesh):
    """Up to the rounding of results in bfloat16, which partial sums over `model` are rounded to before they are added."""
    want, inputs = compiled(spec, mesh, "xla")
    got, _ = compiled(spec, mesh, "pallas_gpu")
    assert len(kernels) == 3 and {shape[0] for pair in kernels for shape in pair} == {1}  # no operand is cut any more
    for a, b in zip(got(*inputs), want(*inputs), strict=True):
        assert a.dtype == b.dtype and a.sharding == b.sharding and distance(a, b) < 4e-3
    found = collectives(got.as_text())
    assert {c.kind for c in found} <= {"all-reduce"}, [c.line for c in found]
    assert len(found) <= 2 + (mesh == "2x2x2"), [c.line for c in found]  # of y or dx over `model`, of dw over the data axes


def test_an_input_shared_by_several_products(kernels):
    got, want = (compiled(SPECS[1], "2x4", "pallas_gpu", shared)[0] for shared in (True, False))
    inputs = arrays(SPECS[1], "2x4")[1]
    for a, b in zip(got(*inputs), want(*inputs), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("spec", SPECS[1:3])
def test_statistics(kernels, spec):
    """The monitor sums over shards; of a partial product it sees the errors of the parts."""
    axis = spec.split(",")[1].index("D")
    found = []
    for form in ("xla", "pallas_gpu"):
        run, inputs = compiled(spec, "2x4", form, statistics_axis=axis)
        dw = run(*inputs)[2].sum(1 - axis)
        found.append({name: float(value) for name, value in ratios(dw[:COUNT]).items()})
    for name, value in found[0].items():
        assert abs(found[1][name] - value) < 0.02 * max(value, 1e-3), (name, found)


def test_weights_that_are_not_trained_in_fp8_go_their_own_way(kernels):
    sharding, (x, w, _) = arrays(SPECS[1], "2x4")
    products = [Products(ModelConfig.preset("tiny"), sharding, Forms(fp8_training_linear=f)) for f in ("pallas_gpu", "xla")]
    a, b = (jax.jit(functools.partial(p, spec=SPECS[1]))(x, w) for p in products)
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert not kernels


def on_gpus(mesh: str) -> Sharding:
    return Sharding(make_mesh(mesh, stand_ins(parse_topology("h100:8"))))


def test_which_tokens_are_alone_on_a_gpu():
    products = Products(ModelConfig.preset("tiny"), on_gpus("4x2"), Forms())
    for shape, alone in (((4, 1, 8), True), ((8, 1, 8), False), ((4, 2, 8), False)):
        assert products._one_row(jax.ShapeDtypeStruct(shape, jnp.bfloat16)) == alone
    here = Products(ModelConfig.preset("tiny"), Sharding(make_mesh("4x2")), Forms())
    assert not here._one_row(jax.ShapeDtypeStruct((4, 1, 8), jnp.bfloat16))


@pytest.mark.parametrize("spec", SPECS)
def test_a_token_taken_twice_is_the_same(monkeypatch, spec):
    sharding, (x, w, _) = arrays(spec, "8x1")
    once = Products(ModelConfig.preset("tiny"), sharding, Forms())
    x, w = x[:, :1].astype(jnp.float32), w.astype(jnp.float32)
    want = once(x, w, spec)
    monkeypatch.setattr(Products, "_one_row", lambda self, x: True)
    twice = once(x, w, spec)
    assert twice.shape == want.shape
    np.testing.assert_allclose(twice, want, rtol=0, atol=1e-5 * np.abs(want).max())
