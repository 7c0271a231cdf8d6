"""Generation with the kernels, interpreted on the CPU, says what it says without them."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import qwen35_jax
from qwen35_jax import LanguageModel, ModelConfig
from qwen35_jax.model import Model
from qwen35_jax.ops.forms import Forms
from qwen35_jax.sharding import Sharding, make_mesh
from tests.ops.xla_interpreter import kernels_as_xla
from tests.oracle import compare

KERNELS = Forms(gated_delta_rule="pallas_tpu", gated_delta_step="pallas_tpu", causal_conv1d="pallas_tpu")
ALL_KERNELS = dataclasses.replace(KERNELS, cached_attention="pallas_tpu")
PROMPTS = [[5, 7, 11, 13, 17], [3, 1, 4]]


CHATS = {
    "What is 37 + 58?": "37 + 58 = 95",
    "Repeat: k7m2": "k7m2",
    "Write backwards: fork mouth white rock": "rock white mouth fork",
    "Who are you?": None,
}


@pytest.fixture
def interpreted():
    """As TPU programs, in all threads: programs are compiled in a pool of them."""
    pltpu.set_tpu_interpret_mode()
    yield
    pltpu.set_tpu_interpret_mode(None)


def generate(forms: Forms, stacked: bool) -> list[list[int]]:
    """Greedy tokens of a model of one Gated DeltaNet and one attention layer a unit, all heads 128 wide."""
    tiny = ModelConfig.preset("tiny")
    config = tiny.replace(
        dtype="float32", num_hidden_layers=4, full_attention_interval=2, hidden_size=64, num_experts=0, num_experts_per_tok=0,
        shared_expert_intermediate_size=0, intermediate_size=64, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=128, linear_value_head_dim=128, vocab_size=128, initializer_range=0.2,
        head_dim=128, rope=dataclasses.replace(tiny.rope, mrope_section=(12, 10, 10)),
    )  # fmt: skip
    model = Model(config, Sharding(make_mesh("1x1")), forms)
    lm = LanguageModel(model, model.init_params(0, stacked), None, None, None, random_weights=True)
    return [done.token_ids for done in lm.generate(PROMPTS, max_new_tokens=5, temperature=0.0, ignore_eos=True)]


@pytest.mark.parametrize("stacked", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_same_text(interpreted, stacked):
    """In float32 the forms differ by 1e-6, and no two best logits of this model are that close."""
    want, got = (generate(forms, stacked) for forms in (Forms(), ALL_KERNELS))
    assert got == want and all(len(tokens) == 5 for tokens in got)


# The axes of a Gated DeltaNet layer's parameters, from the last, that are as long as its heads are wide.
HEAD_AXES = {"q": 1, "k": 1, "v": 1, "z": 1, "conv_q": 2, "conv_k": 2, "conv_v": 2, "norm": 1, "out": 2}


def widened(lm: LanguageModel, width: int = 128) -> LanguageModel:
    """The same function with Gated DeltaNet heads of `width`, zeros behind their numbers, since the kernels want such heads.

    Outputs become smaller by r = sqrt(width / old), which divides q, and their mean squares by r^4: the output norm's weight is
    divided by r. Its epsilon weighs r^4 times more, which changes logits slightly.
    """
    config = lm.config.replace(linear_key_head_dim=width, linear_value_head_dim=width)
    old = lm.config.linear_key_head_dim

    def widen(mixer: dict) -> dict:
        def pad(name, x):
            widths = [(0, width - old) if x.ndim - axis == HEAD_AXES.get(name, 0) else (0, 0) for axis in range(x.ndim)]
            return jnp.pad(x / (width / old) ** 0.5 if name == "norm" else x, widths)

        return {name: pad(name, x) for name, x in mixer.items()}

    def unit(tree: dict) -> dict:
        layers = {i: layer | {"mixer": widen(layer["mixer"]) if "A_log" in layer["mixer"] else layer["mixer"]}
                  for i, layer in tree["layers"].items()}  # fmt: skip
        return tree | {"layers": layers}

    params = lm.params | {"units": tuple(unit(tree) for tree in lm.params["units"])}
    model = dataclasses.replace(lm.model, config=config)
    return LanguageModel(model, params, lm.tokenizer, lm.template, lm.defaults)


@pytest.mark.slow
def test_the_packaged_model(monkeypatch):
    """Its greedy text and its logits with the kernels, prefill and decode, beside those of the XLA forms, in float32."""
    plain = widened(qwen35_jax.load("tiny", dtype="float32"))
    chats = [[{"role": "user", "content": question}] for question in CHATS]
    options = {"max_new_tokens": 24, "temperature": 0.0}
    want = plain.generate(chats, **options)
    rows = [done.prompt_token_ids + done.token_ids for done in want]
    tokens = np.array([(row * 128)[:128] for row in rows])
    logits = plain.logits(tokens)
    for done, answer in zip(want, CHATS.values(), strict=True):
        assert answer is None or done.text == answer  # the trained model's
    kernels_as_xla(monkeypatch)
    model = dataclasses.replace(plain.model, forms=KERNELS)
    ours = LanguageModel(model, plain.params, plain.tokenizer, plain.template, plain.defaults)
    found = compare.check(logits, ours.logits(tokens), "kernels")
    for done, other in zip(want, ours.generate(chats, **options), strict=True):
        assert other.prompt_token_ids == done.prompt_token_ids

        def before(said, prompt=done.prompt_token_ids):
            return plain.logits([prompt + said])[0, len(prompt) - 1 : -1]

        compare.check_greedy(done.token_ids, other.token_ids, before, done.text, found.error)
