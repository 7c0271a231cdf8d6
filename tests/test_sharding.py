"""Meshes, logical axes and what each parameter becomes on a mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from qwen35_jax import ModelConfig, UserError
from qwen35_jax.sharding import Sharding, check_mesh, make_mesh, parse_mesh

make_mesh("8x1")  # JAX runs from here on, with the eight devices of all tests: no larger mesh below changes their number


@pytest.mark.parametrize(("text", "shape"), [("8x1", (1, 8, 1)), ("1x8", (1, 1, 8)), ("2x2x2", (2, 2, 2)), (" 4x2 ", (1, 4, 2))])
def test_parse_mesh(text, shape):
    assert parse_mesh(text) == shape


@given(st.text(alphabet="0123456789x-+ ", max_size=8))
def test_whatever_is_typed_is_a_mesh_or_one_line(text):
    try:
        assert all(n > 0 for n in parse_mesh(text))
    except UserError as error:
        assert "8x1" in str(error) and "\n" not in str(error)


def test_too_few_devices_says_how_many_there_are():
    with pytest.raises(UserError, match="needs 64 devices, but there are 8"):
        make_mesh("64x1")


@pytest.mark.parametrize("mesh", ["100000x1", "999999999x999999999x1"])
def test_far_too_many_devices_are_not_made(mesh):
    with pytest.raises(UserError, match="there are 8 .cpu.: at most 1024 virtual CPU devices are made"):
        make_mesh(mesh)


@pytest.mark.parametrize("mesh", ["3000000000x1x1", "9" * 5000 + "x1"])
def test_numbers_that_are_no_sizes(mesh):
    with pytest.raises(UserError, match="is not a mesh"):
        make_mesh(mesh)


def test_a_platform_that_is_absent(monkeypatch):
    def devices():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(UserError, match="no device of the platforms cpu .JAX_PLATFORMS or jax_platforms"):
        make_mesh("1x1")


def sharding(mesh: str) -> Sharding:
    return Sharding(make_mesh(mesh))


def test_specs():
    s = sharding("4x2")
    assert s.spec("B T N H") == P(("replica", "data"), None, ("model",), None)
    with pytest.raises(ValueError, match="two dimensions on one mesh axis"):
        s.spec("N F")


def test_context_parallelism_cuts_sequences_and_caches():
    s = Sharding(make_mesh("2x4x1"), context_parallel=True)
    assert (s.batch, s.size("T"), s.context_axis) == (2, 4, "data")
    assert s.spec("B T N H") == P(("replica",), ("data",), ("model",), None)
    one = s.for_one_token()
    assert (one.batch, one.size("T"), one.context_axis) == (2, 1, None)
    assert one.spec("B T D") == P(("replica",), None, None)
    assert s.spec("U S K P H") == one.spec("U S K P H") == P(None, ("replica",), ("model",), ("data",), None)
    with pytest.raises(ValueError, match="two dimensions on one mesh axis"):
        s.spec("T E")
    whole = sharding("2x4x1")
    assert whole.for_one_token() == whole and whole.spec("S K P H") == P(("replica", "data"), ("model",), None, None)


@pytest.mark.parametrize(
    ("mesh", "axes", "shapes", "spec"),
    [
        ("1x8", "D K H", [(16, 2, 4)], P(None, None, None)),  # fewer heads than shards: whole, repeated at compute
        ("1x8", "D N H", [(16, 8, 4)], P(None, ("model",), None)),
        ("4x2", "E D F", [(8, 16, 4)], P(("data", "model"), None, None)),
        ("4x2", "E D F", [(4, 16, 4)], P(("data",), None, ("model",))),
        ("1x4", "D F", [(512, 512), (4, 4)], P(None, ("model",))),
        ("1x4", "D F", [(512, 256), (4, 2)], P(None, None)),  # 2 FP8 blocks do not go on 4 shards
    ],
)
def test_parameter_specs(mesh, axes, shapes, spec):
    assert sharding(mesh).parameter_spec(axes, *shapes) == spec


@pytest.mark.parametrize("mesh", ["1x8", "2x4", "4x2", "1x1"])
def test_repeated_heads_and_their_gradient(mesh):
    s = sharding(mesh)
    w = jnp.arange(24.0).reshape(3, 2, 4)
    repeats = max(1, s.model // 2)
    repeated = jax.jit(lambda w: s.repeat_heads(w, "D K H", "K"))(w)
    np.testing.assert_array_equal(repeated, np.repeat(w, repeats, axis=1))
    gradient = jax.jit(jax.grad(lambda w: s.repeat_heads(w, "D K H", "K").sum()))(w)
    np.testing.assert_array_equal(gradient, np.full(w.shape, repeats))
    once = jax.jit(lambda w: s.repeat_heads(w, "D K H", "K", once=True))(w)
    np.testing.assert_array_equal(once.sum(1), w.sum(1))


@pytest.mark.parametrize(
    ("mesh", "change", "message"),
    [
        (
            "1x8",
            {"num_attention_heads": 6, "num_key_value_heads": 6},
            r"num_attention_heads \(6\); meshes of 8 devices that work: 8x1, 4x2",
        ),
        ("8x1", {"num_experts": 12}, r"data shards do not divide num_experts \(12\).*4x2"),
        ("1x8", {"vocab_size": 4095}, r"do not divide vocab_size \(4095\).*8x1"),
        ("1x8", {"shared_expert_intermediate_size": 100}, "shared_expert_intermediate_size"),
        ("7x1", {}, "meshes of 4 devices that work: 4x1, 2x2, 1x4"),
    ],
)
def test_meshes_that_do_not_fit_name_those_that_do(mesh, change, message):
    config = ModelConfig.preset("tiny").replace(**change)
    with pytest.raises(UserError, match=message):
        check_mesh(config, sharding(mesh))


@pytest.mark.parametrize("mesh", ["8x1", "4x2", "2x4", "1x8", "2x2x2", "1x1"])
def test_tiny_fits_the_meshes_of_the_readme(mesh):
    check_mesh(ModelConfig.preset("tiny"), sharding(mesh))
