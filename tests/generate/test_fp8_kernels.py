"""FP8 end to end: the TPU kernels (interpreted) in the model against its XLA forms, and the packaged model in FP8."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import qwen35_jax
from qwen35_jax.checkpoint.conversion import convert
from qwen35_jax.config import ASSETS
from qwen35_jax.generate import LanguageModel
from qwen35_jax.ops.forms import Forms
from tests.checkpoint.synthetic import canonical_tensors, hf_config, write

KERNELS = Forms(fp8_linear="pallas_tpu", fp8_grouped_linear="pallas_tpu")
CHATS = (
    ("What is 37 + 58?", "37 + 58 = 95"),
    ("Reverse: lamp", "pmal"),
    ("Copy this: red stone", "red stone"),
    ("What is 81 - 27?", "81 - 27 = 54"),
)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """In every thread: programs are compiled in others than this one."""
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=pltpu.InterpretParams()))


def with_kernels(lm: LanguageModel) -> LanguageModel:
    model = dataclasses.replace(lm.model, forms=KERNELS)
    return LanguageModel(model, lm.params, lm.tokenizer, lm.template, lm.defaults)


def divergence(logits, others) -> float:
    """Mean KL over positions, float64."""

    def logarithms(x):
        x = np.asarray(x, np.float64)
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = logarithms(logits), logarithms(others)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.mark.slow
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_kernels_and_xla_forms_agree(tmp_path, moe):
    """One unit of a random model (unit gain, sides of whole blocks), activations in float32; weights alone in FP8, and both."""
    config = hf_config(moe=moe, hidden=256, head_dim=128, linear_head_dim=128, ffn=128, layers=2, vision=False)
    tensors = {
        n: x if x.ndim < 2 else (x.astype(np.float32) / 16).astype(x.dtype)
        for n, x in canonical_tensors(config, vision=False).items()
    }
    convert(str(write(tmp_path / "bf16", config, tensors)), str(tmp_path / "fp8"), quantize="fp8", progress=False)
    tokens = np.random.default_rng(0).integers(0, 96, (1, 48))
    plain = qwen35_jax.load(tmp_path / "fp8", dtype="float32").logits(tokens)
    for activations in (False, True):
        lm = qwen35_jax.load(tmp_path / "fp8", dtype="float32", keep_fp8=True, fp8_activations=activations)
        want = lm.logits(tokens)
        got = with_kernels(lm).logits(tokens)
        print(f"kernels against XLA, activations in FP8: {activations}: KL {divergence(want, got):.1e}")
        assert divergence(want, got) < 1e-5
        if not activations:
            print(f"kept against dequantised: KL {divergence(plain, want):.1e}")
            assert divergence(plain, want) < 1e-5
        else:
            assert divergence(plain, want) > 1e-6  # it is another arithmetic


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    """The packaged model quantised, and chats as its tokens."""
    path = tmp_path_factory.mktemp("fp8") / "tiny"
    convert(str(ASSETS / "tiny"), str(path), quantize="fp8", progress=False)
    lm = qwen35_jax.load("tiny", dtype="float32")
    chats = ([{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in CHATS)
    ids = [i for chat in chats for i in lm.encode(chat)]
    return path, lm, np.array([(4 * ids)[:128]])


@pytest.mark.slow
def test_the_packaged_model_in_fp8(packaged):
    """Heads of 32 and experts of 64: blocks are shared or end early."""
    path, lm, tokens = packaged
    options = {"dtype": "float32", "keep_fp8": True}
    dequantised = qwen35_jax.load(path, dtype="float32").logits(tokens)
    kept = qwen35_jax.load(path, **options).logits(tokens)
    both = qwen35_jax.load(path, **options, fp8_activations=True).logits(tokens)
    found = {
        "kept, dequantised": divergence(dequantised, kept),
        "activations, weights alone": divergence(kept, both),
        "activations, original": divergence(lm.logits(tokens), both),
    }
    print({name: f"{value:.1e}" for name, value in found.items()})
    assert found["kept, dequantised"] < 1e-5
    assert found["activations, weights alone"] < 2e-2 and found["activations, original"] < 2e-2


@pytest.mark.slow
@pytest.mark.parametrize("activations", [False, True])
def test_the_packaged_model_through_kernels(packaged, activations):
    """Logits through both forms, and the greedy answer to one question, word for word."""
    path, _, tokens = packaged
    lm = qwen35_jax.load(path, dtype="float32", keep_fp8=True, fp8_activations=activations)
    chat, options = [{"role": "user", "content": "What is 37 + 58?"}], {"max_new_tokens": 12, "temperature": 0.0}
    want, (text,) = lm.logits(tokens[:, :64]), lm.generate([chat], **options)
    kernels = with_kernels(lm)
    got, (said,) = kernels.logits(tokens[:, :64]), kernels.generate([chat], **options)
    print(f"activations in FP8: {activations}: KL {divergence(want, got):.1e}, {said.text!r}")
    assert divergence(want, got) < 1e-5 and said.token_ids == text.token_ids
