"""`convert --quantize fp8`: the names, layers, dtypes and scales of the published FP8 checkpoints, and what they hold."""

from __future__ import annotations

import json

import jax
import ml_dtypes
import numpy as np
import pytest

import qwen35_jax
from qwen35_jax.checkpoint import open_source, quantization, shards
from qwen35_jax.checkpoint.conversion import convert
from qwen35_jax.errors import UserError
from qwen35_jax.ops.fp8.reference import round_reference
from tests.checkpoint.synthetic import BF16, FP8, canonical_tensors, hf_config, per_expert, renamed, write


def quantise(source, target, **options):
    convert(str(source), str(target), quantize="fp8", progress=False, **options)
    return tensors_of(target)


def tensors_of(directory):
    source = open_source(str(directory))
    return {name: np.array(source.read(name)) for name in source.tensors}


def dequantised(tensors, name):
    scales = np.repeat(np.repeat(tensors[f"{name}_scale_inv"].astype(np.float64), 128, 0), 128, 1)
    values = tensors[name].astype(np.float64)
    return values * scales[: values.shape[0], : values.shape[1]]


@pytest.mark.parametrize("kind", ["dense", "fused experts", "experts apart, old names", "orbax"])
def test_it_is_as_published(tmp_path, monkeypatch, kind):
    """Every layer that the published files quantise and no other; values are e4m3 of the bf16 weights, others untouched."""
    monkeypatch.setattr(quantization, "PIECE_ELEMENTS", 30_000)  # weights in several pieces
    monkeypatch.setattr(shards, "SHARD_BYTES", 300_000)
    moe = kind != "dense"
    config = hf_config(moe=moe, hidden=160, ffn=200, head_dim=32, linear_head_dim=32)
    tensors = canonical_tensors(config)
    stored = renamed(per_expert(tensors), "old") if "apart" in kind else tensors
    source = write(tmp_path / "bf16", config, stored, shards=2)
    if kind == "orbax":
        convert(str(source), str(tmp_path / "orbax"), progress=False)
        source = tmp_path / "orbax"
    got = quantise(source, tmp_path / "fp8")
    wanted = per_expert(canonical_tensors(config, fp8=True))  # the published names, as the loader's tests have them
    assert {n: (x.dtype, x.shape) for n, x in got.items()} == {n: (x.dtype, x.shape) for n, x in wanted.items()}
    assert len(list((tmp_path / "fp8").glob("*.safetensors"))) > 1
    for name, original in per_expert(tensors).items():
        if got[name].dtype == FP8:
            np.testing.assert_array_equal(dequantised(got, name), round_reference(original, (0, 1)), name)
        else:
            assert got[name].tobytes() == original.tobytes(), name
    made = json.loads((tmp_path / "fp8" / "config.json").read_text())
    fp8 = made.pop("quantization_config")
    kept = fp8.pop("modules_to_not_convert")
    assert made == config
    assert fp8 == {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    modules = {n.removesuffix(".weight") for n in got if n.endswith(".weight")}
    assert modules - set(kept) == {n.removesuffix(".weight") for n, x in got.items() if x.dtype == FP8}
    assert (tmp_path / "fp8" / "chat_template.jinja").read_bytes() == (source / "chat_template.jinja").read_bytes()


@pytest.mark.parametrize("moe", [pytest.param(False, marks=pytest.mark.slow), True])
def test_our_loader_keeps_it_and_dequantises_it(tmp_path, moe):
    config = hf_config(moe=moe, hidden=128, ffn=128, head_dim=32, linear_head_dim=32)
    source = write(tmp_path / "bf16", config, canonical_tensors(config))
    quantise(source, tmp_path / "fp8")
    tokens = np.random.default_rng(0).integers(0, 96, (1, 20))
    kept, plain = (qwen35_jax.load(tmp_path / "fp8", dtype="float32", keep_fp8=keep) for keep in (True, False))
    expected = np.asarray(plain.logits(tokens))
    np.testing.assert_allclose(np.asarray(kept.logits(tokens)), expected, atol=1e-4 * np.abs(expected).max())
    assert sum(x.dtype == FP8 for x in jax.tree.leaves(kept.params)) > 10


def test_it_converts_to_orbax_and_back(tmp_path):
    config = hf_config(moe=True)
    got = quantise(write(tmp_path / "bf16", config, canonical_tensors(config)), tmp_path / "fp8")
    convert(str(tmp_path / "fp8"), str(tmp_path / "orbax"), progress=False)
    convert(str(tmp_path / "orbax"), str(tmp_path / "back"), "hf", progress=False)
    assert {n: x.tobytes() for n, x in tensors_of(tmp_path / "back").items()} == {n: x.tobytes() for n, x in got.items()}


def test_odd_weights(tmp_path):
    """Blocks of zeros, neighbours of very different size, NaN: as `quantize_weight` has it."""
    config = hf_config(hidden=160, ffn=200)
    tensors = canonical_tensors(config, vision=False, mtp=False)
    name = "model.language_model.layers.0.mlp.gate_proj.weight"
    tensors[name][:128, :128], tensors[name][128:, :128] = 0, 3e38
    tensors[name][0, 150] = np.nan
    got = quantise(write(tmp_path / "bf16", config, tensors), tmp_path / "fp8")
    values = got[name].astype(np.float32)
    assert (values[:128, :128] == 0).all() and np.isnan(values[0, 150]) and np.isnan(values).sum() == 1
    assert got[f"{name}_scale_inv"][0, 0] == 1
    np.testing.assert_allclose(dequantised(got, name)[128:, :128], 3e38, rtol=0.01)


def test_what_is_refused(tmp_path):
    config = hf_config()
    source = write(tmp_path / "bf16", config, canonical_tensors(config))
    quantised = write(tmp_path / "fp8", config, canonical_tensors(config, fp8=True))
    for message, options in (
        ("holds FP8 weights already", {"src": quantised}),
        ("cannot quantize to 'int4'; choose fp8", {"quantize": "int4"}),
        ("convert them to orbax afterwards", {"to": "orbax"}),
        ("exists already", {"dst": quantised}),
    ):
        arguments = {"src": source, "dst": tmp_path / "out", "quantize": "fp8"} | options
        src, dst = (str(arguments.pop(name)) for name in ("src", "dst"))
        with pytest.raises(UserError, match=message) as error:
            convert(src, dst, progress=False, **arguments)
        assert "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bf16", "fp8"]


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    source = write(tmp_path / "bf16", hf_config(), canonical_tensors(hf_config()))

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quantization, "_quantise", fail)
    with pytest.raises(UserError, match="No space left"):
        quantise(source, tmp_path / "fp8")
    assert [p.name for p in tmp_path.iterdir()] == ["bf16"]


def test_float32_weights_are_quantised_too(tmp_path):
    config = hf_config()
    tensors = {n: x.astype(np.float32) for n, x in canonical_tensors(config, vision=False).items()}
    got = quantise(write(tmp_path / "f32", config, tensors), tmp_path / "fp8")
    assert {x.dtype for x in got.values()} == {np.dtype(t) for t in (ml_dtypes.float8_e4m3fn, BF16, np.float32)}
