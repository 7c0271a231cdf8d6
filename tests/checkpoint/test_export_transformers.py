"""transformers reads an exported directory and computes what we compute."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen35_jax.checkpoint import export_hf, to_hf_config
from qwen35_jax.config import ModelConfig
from qwen35_jax.generate.steps import segment_positions
from qwen35_jax.model import Model
from qwen35_jax.sharding import Sharding, make_mesh
from tests.checkpoint.synthetic import hf_config
from tests.oracle.compare import check

torch = pytest.importorskip("torch", reason="the oracle needs torch")
transformers = pytest.importorskip("transformers", minversion="5.23", reason="the oracle needs transformers 5.23 or newer")


@pytest.mark.parametrize("moe,tied", [(False, True), (True, False)])
def test_the_same_logits(tmp_path, moe, tied):
    config = hf_config(moe=moe, tied=tied, vision=False)
    model = Model(ModelConfig.from_hf(config).replace(dtype="float32"), Sharding(make_mesh("1x1")))
    params = jax.tree.map(lambda x: (3 * x).astype(jnp.bfloat16).astype(jnp.float32), model.init_params(5))
    export_hf(params, model.config, tmp_path / "out")
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
    assert loaded.config.get_text_config().rope_parameters["mrope_section"] == [2, 1, 1]
    tokens = np.random.default_rng(0).integers(0, 96, (2, 24))
    with torch.inference_mode():
        reference = loaded(input_ids=torch.tensor(tokens), use_cache=False).logits.numpy()
    segments = jnp.ones(tokens.shape, jnp.int32)

    @jax.jit
    def logits(params, tokens):
        hidden, _ = model.hidden(params, tokens, model.inputs(segment_positions(segments), segments))
        return model.logits(params, hidden)

    check(reference, logits(params, jnp.asarray(tokens)), f"export, moe {moe}")


@pytest.mark.parametrize("moe", [False, True])
def test_the_multimodal_configuration(tmp_path, moe):
    """With a vision tower the configuration is that of ForConditionalGeneration, and transformers reads every field."""
    config = ModelConfig.preset("35b-a3b" if moe else "0.8b")
    kind = transformers.Qwen3_5MoeConfig if moe else transformers.Qwen3_5Config
    read = kind.from_dict(to_hf_config(config))
    assert isinstance(read.vision_config.depth, int) and read.vision_config.depth == config.vision.depth
    assert ModelConfig.from_hf(read.to_dict()).replace(mtp_num_hidden_layers=1) == config
