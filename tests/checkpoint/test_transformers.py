"""transformers loads an exported checkpoint, and finds in it what it saved."""

from __future__ import annotations

import pytest

from qwen35_jax.checkpoint import open_source
from qwen35_jax.checkpoint.conversion import convert

torch = pytest.importorskip("torch", reason="the oracle needs torch")
hf_models = pytest.importorskip("tests.oracle.hf_models", reason="the oracle needs transformers")


@pytest.mark.parametrize("name", ["moe_tied_mtp", "dense_ratio3"])
def test_transformers_loads_the_export(tmp_path, name):
    oracle = hf_models.build(hf_models.CASES[name])
    hf_models.save(oracle, tmp_path / "hf")
    convert(str(tmp_path / "hf"), str(tmp_path / "orbax"), progress=False)
    convert(str(tmp_path / "orbax"), str(tmp_path / "back"), "hf", progress=False)
    loaded, report = type(oracle.model).from_pretrained(
        tmp_path / "back", dtype=torch.bfloat16, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["mismatched_keys"], report
    state = loaded.state_dict()
    want = {n: x.to(state[n].dtype) for n, x in oracle.model.state_dict().items()}
    assert state.keys() == want.keys()
    assert all(torch.equal(state[n], x) for n, x in want.items())
    mtp = [n for n in open_source(str(tmp_path / "orbax")).tensors if n.startswith("mtp.")]
    assert bool(mtp) == hf_models.CASES[name].mtp  # transformers ignores it; it is there all the same
