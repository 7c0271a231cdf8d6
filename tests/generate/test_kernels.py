"""Generation with the kernels, interpreted on the CPU, says what it says without them."""

from __future__ import annotations

import pytest
from jax.experimental.pallas import tpu as pltpu

from qwen35_jax import LanguageModel, ModelConfig
from qwen35_jax.model import Model
from qwen35_jax.ops.forms import Forms
from qwen35_jax.sharding import Sharding, make_mesh

KERNELS = Forms(gated_delta_rule="pallas_tpu", gated_delta_step="pallas_tpu")
PROMPTS = [[5, 7, 11, 13, 17], [3, 1, 4]]


@pytest.fixture(autouse=True)
def interpreted():
    """As TPU programs, in all threads: programs are compiled in a pool of them."""
    pltpu.set_tpu_interpret_mode()
    yield
    pltpu.set_tpu_interpret_mode(None)


def generate(forms: Forms, stacked: bool) -> list[list[int]]:
    """Greedy tokens of a model of one Gated DeltaNet and one attention layer a unit, whose heads are 128 wide."""
    tiny = ModelConfig.preset("tiny")
    config = tiny.replace(
        dtype="float32", num_hidden_layers=4, full_attention_interval=2, hidden_size=64, num_experts=0, num_experts_per_tok=0,
        shared_expert_intermediate_size=0, intermediate_size=64, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=128, linear_value_head_dim=128, vocab_size=128, initializer_range=0.2,
    )  # fmt: skip
    model = Model(config, Sharding(make_mesh("1x1")), forms)
    lm = LanguageModel(model, model.init_params(0, stacked), None, None, None, random_weights=True)
    return [done.token_ids for done in lm.generate(PROMPTS, max_new_tokens=5, temperature=0.0, ignore_eos=True)]


@pytest.mark.parametrize("stacked", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_same_text(stacked):
    """In float32 the forms differ by 1e-6, and no two best logits of this model are that close."""
    want, got = (generate(forms, stacked) for forms in (Forms(), KERNELS))
    assert got == want and all(len(tokens) == 5 for tokens in got)
