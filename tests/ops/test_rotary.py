"""Rotary embedding: the published frequencies and axes, and positions that differ between time, height and width."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from qwen35_jax.config import ModelConfig, RopeConfig
from qwen35_jax.errors import UserError
from qwen35_jax.ops.rotary import apply_rotary, axis_of_pair, rotary_angles, rotary_frequencies

GOLDEN = Path(__file__).parents[3] / "shared" / "spec" / "golden" / "rope.json"
ROPE = ModelConfig.preset("0.8b").rope  # theta 1e7, 64 of 256 features, sections 11, 11, 10
YARN = RopeConfig(
    theta=1e7,
    partial_rotary_factor=0.25,
    mrope_section=(11, 11, 10),
    rope_type="yarn",
    factor=4.0,
    original_max_position_embeddings=262144,
)
DIM = 64


@pytest.fixture(scope="module")
def golden() -> dict:
    if not GOLDEN.exists():
        pytest.skip("no golden frequencies: there is no ../shared")
    return json.loads(GOLDEN.read_text())


def test_published_frequencies(golden):
    inverse, factor = rotary_frequencies(ROPE, DIM)
    assert factor == 1 and inverse.tolist() == golden["default_inv_freq"]
    inverse, factor = rotary_frequencies(YARN, DIM)
    np.testing.assert_allclose(inverse, golden["yarn4_inv_freq"], rtol=3e-7)  # two roundings to float32
    assert factor == pytest.approx(golden["yarn4_attention_factor"], rel=1e-12)
    assert "".join("THW"[a] for a in axis_of_pair(ROPE.mrope_section)) == golden["axis_of_pair"]


def test_a_model_with_yarn():
    config = ModelConfig.preset("0.8b")
    long = config.with_yarn(4)
    assert (long.rope, long.max_position_embeddings) == (YARN, 4 * config.max_position_embeddings)
    assert long.with_yarn(2).max_position_embeddings == 2 * config.max_position_embeddings  # not twice upon it
    with pytest.raises(UserError, match="rope_type 'yarn' needs factor >= 1"):
        config.with_yarn(0.5)


def test_yarn_stretches_slow_pairs_only():
    """Over 262,144 positions, pairs up to 14 turn more than 32 times and stay; those from 22 turn less than once: a quarter."""
    plain, stretched = rotary_frequencies(ROPE, DIM)[0], rotary_frequencies(YARN, DIM)[0]
    between = np.arange(1, 8) / 8 * -0.75 + 1
    np.testing.assert_allclose(stretched / plain, [1.0] * 15 + between.tolist() + [0.25] * 10, rtol=1e-6)


@pytest.mark.parametrize(("section", "axes"), [((11, 11, 10), "THW" * 10 + "TH"), ((4, 2, 2), "THWTHWTT"), ((2, 0, 0), "TT")])
def test_axes_take_turns(section, axes):
    assert "".join("THW"[a] for a in axis_of_pair(section)) == axes


@pytest.mark.parametrize("rope", [ROPE, YARN], ids=["default", "yarn"])
def test_three_axes_turn_their_own_pairs(rope):
    """Against float64 complex rotation, pair by pair."""
    rng = np.random.default_rng(0)
    positions = rng.integers(0, 5000, (3, 2, 7))
    x = rng.normal(size=(2, 7, 3, 96)).astype(np.float32)
    cos, sin = rotary_angles(jnp.asarray(positions), rope, DIM)
    ours = np.asarray(apply_rotary(jnp.asarray(x), cos, sin))
    inverse, factor = rotary_frequencies(rope, DIM)
    expected = x.astype(np.float64)
    for pair in range(DIM // 2):
        angle = positions[pair % 3] * np.float64(inverse[pair])
        turned = (x[..., pair] + 1j * x[..., pair + DIM // 2]) * (factor * np.exp(1j * angle))[..., None]
        expected[..., pair], expected[..., pair + DIM // 2] = turned.real, turned.imag
    # An angle up to 5,000 rad is rounded to float32: 2.4e-4.
    np.testing.assert_allclose(ours, expected, atol=2e-3)
    assert (ours[..., DIM:] == x[..., DIM:]).all()


def test_text_is_three_equal_axes():
    positions = jnp.asarray(np.random.default_rng(1).integers(0, 9999, (2, 5)))
    for a, b in zip(rotary_angles(positions, ROPE, DIM), rotary_angles(jnp.stack([positions] * 3), ROPE, DIM), strict=True):
        assert (a == b).all()


def test_late_positions_keep_their_digits():
    """Position 262,143 in pair 8 and one earlier differ by the pair's frequency: nothing was rounded to bfloat16."""
    cos, sin = rotary_angles(jnp.asarray([[262142, 262143]]), ROPE, DIM)
    step = np.angle(np.asarray(cos + 1j * sin, np.complex128)[0, :, 8])
    inverse = rotary_frequencies(ROPE, DIM)[0][8]
    assert np.mod(step[1] - step[0], 2 * np.pi) == pytest.approx(float(inverse), abs=2e-3)
