"""FP8 checkpoints end to end: weights kept in FP8 compute what their dequantised numbers compute."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import qwen35_jax
from qwen35_jax import UserError
from qwen35_jax.ops.forms import Forms
from qwen35_jax.ops.fp8 import Fp8Weight
from tests.checkpoint import synthetic


@pytest.fixture(scope="module", params=[pytest.param(False, marks=pytest.mark.slow), True], ids=["dense", "moe"])
def directory(request, tmp_path_factory):
    config = synthetic.hf_config(moe=request.param, hidden=128, head_dim=128, linear_head_dim=128, ffn=256, vision=False)
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    tensors = synthetic.canonical_tensors(config, fp8=True, vision=False)
    tensors = synthetic.per_expert(tensors) if request.param else tensors
    return str(synthetic.write(tmp_path_factory.mktemp("fp8") / "hf", config, tensors))


def test_kept_weights_equal_dequantised_ones(directory):
    tokens = np.random.default_rng(0).integers(0, 96, (2, 40))
    plain = qwen35_jax.load(directory, dtype="float32")
    expected = np.asarray(plain.logits(tokens))
    assert np.isfinite(expected).all() and expected.std() > 0
    for mesh in ("1x1", "2x2"):
        kept = qwen35_jax.load(directory, mesh=mesh, dtype="float32", keep_fp8=True)
        leaves = jax.tree.leaves(kept.params, is_leaf=lambda x: isinstance(x, Fp8Weight))
        assert sum(isinstance(x, Fp8Weight) for x in leaves) > 10
        # The same numbers in the same products; only the order of additions may differ.
        np.testing.assert_allclose(np.asarray(kept.logits(tokens)), expected, atol=1e-4 * np.abs(expected).max())
    (answer,) = kept.generate(tokens[:1].tolist(), max_new_tokens=4, temperature=0.0, ignore_eos=True)
    assert answer.token_ids[0] == expected[0, -1].argmax()
    assert kept.stats()["weight_bytes_per_device"] < plain.stats()["weight_bytes_per_device"] / 3


def test_stats_say_what_ran(directory):
    """On Hopper an FP8 weight is multiplied by XLA where there are many rows; a device has half of them here."""
    kept = qwen35_jax.load(directory, mesh="2x1", keep_fp8=True)
    assert kept.stats()["forms"] == {}  # nothing has run
    kept.model = dataclasses.replace(kept.model, forms=Forms(fp8_linear="pallas_gpu", fp8_training_linear="pallas_gpu"))
    found = []
    for tokens in (512, 1024):
        kept.step_tokens = {"prefill": tokens, "decode": 2}
        found.append(kept.stats()["forms"])
    assert [forms["fp8_linear"] for forms in found] == ["pallas_gpu", "xla (prefill) and pallas_gpu (decode)"]
    assert all(forms["linear"] == "xla" and "fp8_training_linear" not in forms for forms in found)
    assert all("moe" in forms and "vision_attention" not in forms for forms in found) or not kept.config.num_experts


def test_keeping_fp8_needs_an_fp8_checkpoint(tmp_path):
    config = synthetic.hf_config()
    path = synthetic.write(tmp_path / "hf", config, synthetic.canonical_tensors(config))
    with pytest.raises(UserError, match="no FP8 weights"):
        qwen35_jax.load(str(path), keep_fp8=True)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["2x2", "1x8"])
def test_activations_in_fp8_on_meshes(directory, mesh):
    """What a mesh computes, heads and features cut, is what one device does; and it is FP8: more than rounding apart."""
    tokens = np.random.default_rng(0).integers(0, 96, (2, 40))
    plain = np.asarray(qwen35_jax.load(directory, dtype="float32").logits(tokens))
    forms = {"dtype": "float32", "keep_fp8": True, "fp8_activations": True}
    whole, cut = (np.asarray(qwen35_jax.load(directory, mesh=m, **forms).logits(tokens)) for m in ("1x1", mesh))
    assert 1e-3 * np.abs(plain).max() < np.abs(whole - plain).max()
    # A sum in another order can round an activation to the other e4m3 neighbour.
    assert np.abs(cut - whole).max() < 0.5 * np.abs(whole - plain).max()


def test_activations_in_fp8_need_weights_in_fp8(directory):
    with pytest.raises(UserError, match="fp8_activations needs keep_fp8"):
        qwen35_jax.load(directory, fp8_activations=True)
