"""The model on meshes of virtual devices against transformers, live: logits, and greedy tokens of one prompt and of five."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="the oracle needs torch")
pytest.importorskip("transformers", minversion="5.23", reason="the oracle needs transformers 5.23 or newer")

import qwen35_jax  # noqa: E402
from tests.oracle import compare  # noqa: E402
from tests.oracle.reference import CHUNK, LENGTHS, NEW_TOKENS  # noqa: E402

MESHES = ("1x1", "8x1", "4x2", "2x4", "1x8", "2x2x2")
MESH_MODELS = ("mesh_dense", "mesh_moe", "mesh_dense_repeat", "mesh_moe_repeat")


# Every mesh, and every model on one that cuts it as far as it goes.
QUICK = {*((mesh, "mesh_moe") for mesh in MESHES), *(("1x8", name) for name in MESH_MODELS)}
CASES = [(mesh, name) for name in MESH_MODELS for mesh in MESHES]


@pytest.mark.parametrize(
    ("mesh", "name"), [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_meshes(references, models, mesh, name):
    """One prompt and five, on meshes whose shards divide the heads (and experts) or repeat them."""
    reference = references(name)
    if name == "mesh_moe_repeat" and mesh == "8x1":
        with pytest.raises(qwen35_jax.UserError, match="num_experts"):
            models(name, mesh)
        return
    lm = models(name, mesh)
    error = compare.check(reference.full, lm.logits(reference.ids), f"{name} on {mesh}").error
    for rows in (1, len(LENGTHS)):
        prompts = [reference.prompt(row, length) for row, length in enumerate(LENGTHS[:rows])]
        answers = lm.generate(prompts, max_new_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, prefill_chunk=CHUNK)
        for row, answer in enumerate(answers):
            reference.check_greedy(row, LENGTHS[row], answer.token_ids, f"{name} on {mesh}, {rows} prompts", error)
