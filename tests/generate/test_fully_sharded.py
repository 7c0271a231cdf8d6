"""Weights cut over the data axes too and gathered a unit at a time: the same answers, fewer bytes on each device."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

import qwen35_jax
from qwen35_jax import ModelConfig
from qwen35_jax.generate import steps
from qwen35_jax.model import Model
from qwen35_jax.ops.forms import Forms
from qwen35_jax.sharding import Sharding, make_mesh
from tests.checkpoint import synthetic

PROMPTS = [np.random.default_rng(n).integers(0, 4000, n).tolist() for n in (40, 3, 64, 17, 1)]
OPTIONS = {"max_new_tokens": 6, "seed": [1, 2, 3, 4, 5], "temperature": 1.0, "top_k": 20, "ignore_eos": True}


def weight_bytes(tree) -> int:
    """On one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("mesh", "stacked", "moe"),
    [
        ("4x2", True, "all_to_all"),
        pytest.param("8x1", True, "gather", marks=pytest.mark.slow),
        pytest.param("2x2x2", True, "gather", marks=pytest.mark.slow),
        pytest.param("8x1", False, "all_to_all", marks=pytest.mark.slow),
    ],
)
def test_says_the_same(tiny, tiny_on, mesh, stacked, moe):
    lm = tiny_on(mesh, stacked, fully_sharded=True, forms=Forms(moe=moe))
    expected = [done.token_ids for done in tiny.generate(PROMPTS, **OPTIONS)]
    assert [done.token_ids for done in lm.generate(PROMPTS, **OPTIONS)] == expected
    assert lm.stats()["forms"]["moe"] == moe
    tokens = np.random.default_rng(0).integers(0, 4000, (8, 48))
    logits = np.asarray(tiny.logits(tokens))
    np.testing.assert_allclose(lm.logits(tokens), logits, atol=1e-4 * np.abs(logits).max())  # other orders of float32 sums
    # All but scales of norms and gates, which no axis divides, and the experts, which are cut already.
    assert weight_bytes(lm.params) < 1.1 * weight_bytes(tiny.params) / 8


@pytest.mark.parametrize("moe", [pytest.param(False, marks=pytest.mark.slow), True], ids=["dense", "moe"])
def test_an_fp8_checkpoint(moe, tmp_path):
    """Loaded in shards that cut through FP8 blocks, which the weights are only multiplied without."""
    config = synthetic.hf_config(moe=moe, hidden=128, head_dim=128, linear_head_dim=128, ffn=256, vision=False)
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    tensors = synthetic.canonical_tensors(config, fp8=True, vision=False)
    path = str(synthetic.write(tmp_path / "hf", config, synthetic.per_expert(tensors) if moe else tensors))
    whole = qwen35_jax.load(path, mesh="4x2", dtype="float32", keep_fp8=True)
    cut = qwen35_jax.load(path, mesh="4x2", dtype="float32", keep_fp8=True, fully_sharded=True)
    stacked = jax.tree.map(lambda *units: np.stack([np.asarray(u) for u in units]), *whole.params["units"])
    jax.tree.map(np.testing.assert_array_equal, dict(cut.params), whole.params | {"units": stacked})
    bytes_whole, bytes_cut = (lm.stats()["weight_bytes_per_device"] for lm in (whole, cut))
    assert bytes_cut < (0.6 if moe else 0.35) * bytes_whole  # experts are cut over both axes already
    tokens = np.random.default_rng(0).integers(0, 96, (4, 40))
    expected = np.asarray(whole.logits(tokens))
    np.testing.assert_allclose(cut.logits(tokens), expected, atol=1e-5 * np.abs(expected).max())


def test_memory_holds_the_weights_of_one_unit():
    config = ModelConfig.preset("tiny").replace(
        dtype="float32", num_hidden_layers=16, full_attention_interval=2, hidden_size=256, vocab_size=256,
        num_experts=0, num_experts_per_tok=0, intermediate_size=1024, shared_expert_intermediate_size=0,
    )  # fmt: skip
    model = Model(config, Sharding(make_mesh("8x1")), fully_sharded=True)
    whole = weight_bytes(Model(config, model.sharding).abstract_params()["units"])
    memory = steps.make_prefill(model, 8, 8, 64, 128).compile().memory_analysis()
    state = weight_bytes(steps.abstract_session(model, 8, 128))
    assert memory.argument_size_in_bytes < 1.2 * whole / 8 + state
    assert memory.temp_size_in_bytes < 2 * whole / config.num_units  # gathered whole, they would be 8
