"""Models with the Hopper kernels, on a GPU, beside the same models in XLA's forms there: logits and greedy text.

pytest --gpu tests/generate/test_gpu_kernels.py, with JAX 0.11 or newer. Kernels alone are interpreted on the CPU (tests/ops).
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

import qwen35_jax
from qwen35_jax.checkpoint.conversion import convert
from qwen35_jax.compat import HAS_MOSAIC_GPU
from qwen35_jax.generate import LanguageModel
from qwen35_jax.ops.forms import Forms
from tests.checkpoint.synthetic import canonical_tensors, hf_config, write
from tests.ops import mosaic_gpu
from tests.oracle import compare

pytestmark = pytest.mark.skipif(not HAS_MOSAIC_GPU, reason="Pallas Mosaic GPU kernels need JAX 0.11 or newer")

# The long one makes prefill have more rows than the products of few rows take.
PROMPTS = [[5, 7, 11, 13, 17], [3, 1, 4], np.random.default_rng(1).integers(0, 96, 300).tolist()]
KINDS = {"bfloat16": {}, "weights": {"keep_fp8": True}, "both": {"keep_fp8": True, "fp8_activations": True}}
RULE = dict.fromkeys(("gated_delta_rule", "gated_delta_step", "cached_attention"), "pallas_gpu")
PLAIN = {"grouped_linear": "xla", "fp8_linear": "xla", "fp8_grouped_linear": "xla"}


def expected_forms(kind: str, moe: bool) -> dict[str, str]:
    """Those that the kernels' model must have: every kernel for its weights."""
    ours = ("fp8_linear", "fp8_grouped_linear")[: 1 + moe] if kind != "bfloat16" else ("grouped_linear",) * moe
    return RULE | PLAIN | dict.fromkeys(ours, "pallas_gpu")


@pytest.fixture(scope="module", autouse=True)
def hopper():
    if not mosaic_gpu.has_gpu() or jax.devices()[0].compute_capability != "9.0":
        pytest.skip("needs an H100 or H200: pytest --gpu")


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def checkpoints(request, tmp_path_factory):
    """A random model of one Gated DeltaNet and one attention layer, heads and all sides in whole blocks of 128: in bfloat16 and
    quantised; and whether it has experts."""
    config = hf_config(moe=request.param, hidden=256, head_dim=128, linear_head_dim=128, ffn=128, layers=2, vision=False)
    tensors = canonical_tensors(config, vision=False)
    tensors = {n: x if x.ndim < 2 else (x.astype(np.float32) / 16).astype(x.dtype) for n, x in tensors.items()}  # unit gain
    path = tmp_path_factory.mktemp("hopper")
    convert(str(write(path / "bf16", config, tensors)), str(path / "fp8"), quantize="fp8", progress=False)
    return path, request.param


def greedy(lm: LanguageModel) -> list[list[int]]:
    """Tokens after each prompt."""
    return [done.token_ids for done in lm.generate(PROMPTS, max_new_tokens=8, temperature=0.0, ignore_eos=True)]


def check(exact: LanguageModel, plain: LanguageModel, ours: LanguageModel) -> None:
    """exact: the model in float32, plain: in bfloat16, both in XLA's forms; ours: in bfloat16 with kernels.

    The kernels round where XLA's forms do or later, in other places: their logits may be as far from float32's as XLA's are in
    bfloat16, and half as far again by chance (TPU kernels, interpreted: 1.04 times, 0.84 with weights in FP8). Greedy text is
    that of `plain` up to its first near tie.
    """
    tokens = np.random.default_rng(0).integers(0, 96, (2, 150))
    logits = {name: lm.logits(tokens) for name, lm in (("exact", exact), ("plain", plain), ("ours", ours))}
    found = {name: compare.compare(logits["exact"], logits[name]) for name in ("plain", "ours")}
    print({name: str(one) for name, one in found.items()})
    assert found["ours"].mean_kl < 1.5 * found["plain"].mean_kl
    error = compare.compare(logits["plain"], logits["ours"]).error
    for prompt, expected, said in zip(PROMPTS, greedy(plain), greedy(ours), strict=True):

        def before(said, prompt=prompt):
            return plain.logits([prompt + said])[0, len(prompt) - 1 : -1]

        compare.check_greedy(expected, said, before, "kernels", error)


@pytest.mark.parametrize("kind", KINDS)
def test_same_model(checkpoints, kind):
    path, moe = checkpoints
    source, options = str(path / ("bf16" if kind == "bfloat16" else "fp8")), KINDS[kind] | {"mesh": "1x1"}
    exact, plain = (qwen35_jax.load(source, dtype=dtype, kernels="xla", **options) for dtype in ("float32", "bfloat16"))
    ours = qwen35_jax.load(source, dtype="bfloat16", kernels="pallas", **options)
    assert plain.model.forms == Forms()
    forms = expected_forms(kind, moe)
    assert {name: getattr(ours.model.forms, name) for name in forms} == forms
    check(exact, plain, ours)
