"""One small model for all tests of generation, with every part of the architecture, and the same weights on other meshes."""

from __future__ import annotations

import dataclasses
import functools

import pytest

from qwen35_jax import LanguageModel, ModelConfig
from qwen35_jax.config import ASSETS
from qwen35_jax.model import Model
from qwen35_jax.sharding import Sharding, make_mesh
from qwen35_jax.text import ChatTemplate, Tokenizer, read_generation_config


@functools.lru_cache
def small_model(
    mesh: str = "1x1", stacked: bool = False, context_parallel: bool = False, dense: bool = False, yarn: bool = False, **options
) -> LanguageModel:
    """Two units of one Gated DeltaNet and one attention layer, each with experts (or `dense`); float32, random weights.
    `yarn`: as a config.json has it that stretches 64 positions to 128 and names the 64. `options`: of Model."""
    config = ModelConfig.preset("tiny").replace(
        dtype="float32", num_hidden_layers=4, full_attention_interval=2, hidden_size=64, head_dim=32,
        linear_key_head_dim=16, linear_value_head_dim=16, moe_intermediate_size=32, shared_expert_intermediate_size=32,
        rope=ModelConfig.preset("tiny").rope.__class__(1e7, 0.25, (2, 1, 1)), max_position_embeddings=512, initializer_range=0.2,
    )  # fmt: skip
    if dense:
        config = config.replace(num_experts=0, num_experts_per_tok=0, intermediate_size=64, shared_expert_intermediate_size=0)
    if yarn:
        rope = dataclasses.replace(config.rope, rope_type="yarn", factor=2.0, original_max_position_embeddings=64)
        config = config.replace(rope=rope, max_position_embeddings=64)
    model = Model(config, Sharding(make_mesh(mesh), context_parallel), **options)
    directory = ASSETS / "tiny"
    return LanguageModel(
        model,
        model.init_params(0, stacked),
        Tokenizer.from_directory(directory),
        ChatTemplate.from_directory(directory),
        read_generation_config(directory),
        random_weights=True,
    )


@pytest.fixture(scope="package")
def tiny_on():
    """The models are let go behind the last of these tests: their programs hold many memory mappings (tests/conftest.py)."""
    yield small_model
    small_model.cache_clear()


@pytest.fixture(scope="package")
def tiny(tiny_on) -> LanguageModel:
    return tiny_on()
