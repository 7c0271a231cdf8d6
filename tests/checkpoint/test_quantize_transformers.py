"""transformers reads what `convert --quantize fp8` makes and, dequantising it (on a CPU it does), computes what we compute."""

from __future__ import annotations

import numpy as np
import pytest

import qwen35_jax
from qwen35_jax.checkpoint.conversion import convert
from tests.checkpoint.synthetic import canonical_tensors, hf_config, write
from tests.oracle.compare import check

torch = pytest.importorskip("torch", reason="the oracle needs torch")
transformers = pytest.importorskip("transformers", minversion="5.23", reason="the oracle needs transformers 5.23 or newer")
pytest.importorskip("accelerate", reason="transformers needs accelerate for FP8: pip install -e '.[test,oracle]' (with torch)")


@pytest.mark.parametrize("moe", [False, True])
def test_the_same_logits(tmp_path, moe):
    config = hf_config(moe=moe, hidden=128, ffn=256, head_dim=64, linear_head_dim=128, vision=False)
    config["architectures"] = ["Qwen3_5MoeForCausalLM" if moe else "Qwen3_5ForCausalLM"]
    tensors = canonical_tensors(config, vision=False)
    for name, x in tensors.items():
        if x.ndim > 1 and "conv1d" not in name:
            tensors[name] = (x.astype(np.float32) / 16).astype(x.dtype)
    convert(str(write(tmp_path / "bf16", config, tensors)), str(tmp_path / "fp8"), quantize="fp8", progress=False)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
    tokens = np.random.default_rng(0).integers(0, 96, (2, 24))
    with torch.inference_mode():
        reference = loaded.float()(input_ids=torch.tensor(tokens), use_cache=False).logits.float().numpy()
    check(reference, qwen35_jax.load(tmp_path / "fp8", dtype="float32", keep_fp8=True).logits(tokens), f"fp8, moe {moe}")
