"""FP8 end to end: the TPU kernels (interpreted) in the model against its XLA forms, and the packaged model in FP8."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import qwen35_jax
from qwen35_jax.checkpoint.conversion import convert
from qwen35_jax.config import ASSETS
from qwen35_jax.generate import LanguageModel
from qwen35_jax.model import products
from qwen35_jax.ops.forms import Forms
from qwen35_jax.ops.fp8 import Fp8Activation, quantize_activation
from qwen35_jax.ops.moe import gather
from qwen35_jax.ops.moe import products as moe_products
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


def divergences(logits, others) -> np.ndarray:
    """KL at each position, float64."""

    def logarithms(x):
        x = np.asarray(x, np.float64)
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = logarithms(logits), logarithms(others)
    return (np.exp(p) * (p - q)).sum(-1)


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def random_model(request, tmp_path_factory):
    """One unit of a random model (unit gain, sides of whole blocks), quantised; and tokens."""
    config = hf_config(moe=request.param, hidden=256, head_dim=128, linear_head_dim=128, ffn=128, layers=2, vision=False)
    tensors = canonical_tensors(config, vision=False)
    tensors = {n: x if x.ndim < 2 else (x.astype(np.float32) / 16).astype(x.dtype) for n, x in tensors.items()}
    path = tmp_path_factory.mktemp("fp8")
    convert(str(write(path / "bf16", config, tensors)), str(path / "fp8"), quantize="fp8", progress=False)
    return path / "fp8", np.random.default_rng(0).integers(0, 96, (1, 64))


@pytest.mark.slow
def test_kernels_and_xla_forms_agree(random_model):
    """Activations in float32, weights in FP8."""
    path, tokens = random_model
    lm = qwen35_jax.load(path, dtype="float32", keep_fp8=True)
    want = lm.logits(tokens)
    found = {
        "kernels against XLA": divergences(want, with_kernels(lm).logits(tokens)).mean(),
        "kept against dequantised": divergences(qwen35_jax.load(path, dtype="float32").logits(tokens), want).mean(),
    }
    print({name: f"{value:.1e}" for name, value in found.items()})
    assert max(found.values()) < 1e-5


@pytest.mark.slow
def test_kernels_and_xla_forms_agree_in_fp8(random_model):
    """Activations in FP8 too; only the FP8 products are kernels. An activation that lies beside the middle of two e4m3 numbers is
    rounded to the other one where what is quantised differs in its last bits, -184.00002 and -183.99998 of its scale to -192 and
    -176, which changes all that follows in its row: a KL of 1e-3. So the forms agree where they do the same arithmetic in the
    same order, and several inputs are needed to see that they do. Sums over devices are in another order: the XLA form on two
    devices may differ from itself on one, by far less than the KL that quantising activations costs at all."""
    path, tokens = random_model
    options = {"dtype": "float32", "keep_fp8": True, "fp8_activations": True}
    lm = qwen35_jax.load(path, **options)
    kernels, want = with_kernels(lm), lm.logits(tokens)
    lengths = (48, 64, 64, 64, 64, 64)  # of 48 tokens XLA:CPU multiplies matrices of other shapes than the kernel's tile
    inputs = [tokens, *(np.random.default_rng(seed).integers(0, 96, (1, n)) for seed, n in enumerate(lengths))]
    found = [divergences(lm.logits(x), kernels.logits(x)) for x in inputs]
    control = divergences(want, qwen35_jax.load(path, mesh="1x2", **options).logits(tokens))
    weights_alone = divergences(want, qwen35_jax.load(path, dtype="float32", keep_fp8=True).logits(tokens))
    for name, x in (*(("kernels", x) for x in found), ("XLA on 1x2", control), ("weights alone", weights_alone)):
        print(f"{name}: mean {x.mean():.1e}, median {np.median(x):.1e}, largest {x.max():.1e}")
    assert max(x.mean() for x in found) < 1e-5
    assert max(np.median(x) for x in (*found, control)) < 1e-8  # where nothing was rounded otherwise, the same numbers
    assert control.mean() < 0.05 * weights_alone.mean()  # and all in all the same arithmetic


class Rounding:
    """Stands for `quantize_activation` in a model: keeps what each call gave, or gives what another one kept. Calls are known by
    their order while a program is traced; each runs once."""

    def __init__(self, kept: dict | None = None):
        self.given, self.kept, self.calls = kept, {}, 0

    def __call__(self, x) -> Fp8Activation:
        call, self.calls = self.calls, self.calls + 1
        if self.given is not None:
            return Fp8Activation(x, *(jnp.asarray(part) for part in self.given[call]))
        rounded = quantize_activation(x)
        jax.debug.callback(functools.partial(self._keep, call), rounded.values, rounded.scales)
        return rounded

    def _keep(self, call, *parts):
        assert call not in self.kept
        self.kept[call] = tuple(np.asarray(part) for part in parts)


@pytest.mark.slow
def test_kernels_and_xla_forms_agree_where_activations_are_rounded_alike(random_model, monkeypatch):
    """Activations in FP8 too, those of the kernels' model rounded as they were in that of the XLA forms: the same arithmetic."""
    path, tokens = random_model

    def logits(lm, rounding):
        for module in (products, moe_products, gather):
            monkeypatch.setattr(module, "quantize_activation", rounding)
        found = np.asarray(lm.logits(tokens))
        jax.effects_barrier()
        return found

    lm, own = qwen35_jax.load(path, dtype="float32", keep_fp8=True, fp8_activations=True), Rounding()
    want = logits(lm, own)
    again = Rounding(own.kept)
    found = divergences(want, logits(with_kernels(lm), again))
    print(f"mean {found.mean():.1e}, largest {found.max():.1e}, {again.calls} activations")
    assert again.calls == len(own.kept) == own.calls >= 8
    assert found.mean() < 1e-5


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
        "kept, dequantised": divergences(dequantised, kept).mean(),
        "activations, weights alone": divergences(kept, both).mean(),
        "activations, original": divergences(lm.logits(tokens), both).mean(),
    }
    print({name: f"{value:.1e}" for name, value in found.items()})
    assert found["kept, dequantised"] < 1e-5
    assert found["activations, weights alone"] < 2e-2 and found["activations, original"] < 2e-2
