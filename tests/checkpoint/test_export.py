"""Export: what comes out loads to the same parameters, has the published names, shapes and dtypes, and is whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qwen35_jax.checkpoint import check_export_target, export, export_hf, load_params, open_source, shards, to_hf_config
from qwen35_jax.checkpoint.safetensors_file import DTYPE_NAMES
from qwen35_jax.checkpoint.staging import LOCK
from qwen35_jax.config import ASSETS, PRESETS, ModelConfig, RopeConfig
from qwen35_jax.errors import UserError
from qwen35_jax.model import Model
from qwen35_jax.sharding import Sharding, make_mesh
from tests.checkpoint.bucket import Bucket
from tests.checkpoint.synthetic import canonical_tensors, hf_config, write


def _model(config: dict | ModelConfig, mesh: str = "1x1", dtype: str = "float32") -> Model:
    c = config if isinstance(config, ModelConfig) else ModelConfig.from_hf(config)
    return Model(c.replace(dtype=dtype), Sharding(make_mesh(mesh)))


def _load(directory: Path, mesh: str = "1x1", stacked: bool = True, dtype: str = "float32") -> dict:
    source = open_source(str(directory))
    return load_params(source, ModelConfig.from_hf(source.config), _model(source.config, mesh, dtype).abstract_params(stacked))


def _rounded(params: dict, dtype=jnp.bfloat16) -> dict:
    """What an export keeps of float32 parameters."""

    def leaf(path, x):
        exact = path[-1].key == "A_log" or path[-1].key == "norm" and "mixer" in str(path)
        return np.asarray(x) if exact else np.asarray(x.astype(dtype).astype(jnp.float32))

    return jax.tree_util.tree_map_with_path(leaf, params)


def _same(a, b) -> bool:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("moe,tied,mtp,mesh,stacked", [
    (False, False, True, "1x1", True),
    (False, True, False, "2x4", True),
    (True, False, True, "4x2", True),
    (True, True, True, "2x4", False),
])  # fmt: skip
def test_loads_to_the_same_parameters(tmp_path, monkeypatch, moe, tied, mtp, mesh, stacked):
    monkeypatch.setattr(export, "PIECE_BYTES", 2_000)  # many pieces
    model = _model(hf_config(moe=moe, tied=tied, mtp=mtp, vision=False, experts=8), mesh)
    params = model.init_params(3, stacked)
    export_hf(params, model.config, tmp_path / "out")
    assert ModelConfig.from_hf(tmp_path / "out").replace(dtype="float32") == model.config
    assert _same(_load(tmp_path / "out", stacked=stacked), _rounded(params))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_float32_loses_nothing(tmp_path):
    model = _model(hf_config(vision=False))
    params = model.init_params(0)
    export_hf(params, model.config, tmp_path / "out", dtype="float32")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]["dtype"] == "float32"
    assert _same(_load(tmp_path / "out"), params)


@pytest.mark.parametrize("moe", [False, True])
def test_from_a_checkpoint_and_back(tmp_path, monkeypatch, moe):
    """Names, dtypes, bytes, the vision tower and the files beside the weights are those of the source."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 60_000)
    config = hf_config(moe=moe) | {"torch_dtype": "float32", "image_token_id": 7}
    tensors = canonical_tensors(config)
    original = write(tmp_path / "hf", config, tensors)
    (original / "README.md").write_text("about the source")
    source = open_source(str(original))
    params = _load(original)
    export_hf(
        params,
        ModelConfig.from_hf(config),
        tmp_path / "out",
        template_dir=original,
        hf_config=source.config,
        vision_source=source,
    )
    exported = open_source(str(tmp_path / "out"))
    assert len(exported.shards) > 2 and exported.tensors.keys() == tensors.keys()
    assert all(f.size < 120_000 for f in exported.shards.values())
    for name, want in tensors.items():
        got = exported.read(name)
        assert (got.dtype, got.shape, got.tobytes()) == (want.dtype, want.shape, want.tobytes()), name
    index = json.loads(exported.index)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    want = {k: v for k, v in config.items() if k != "torch_dtype"}
    want["text_config"] = want["text_config"] | {"dtype": "bfloat16"}
    assert exported.config == want
    for file in ("tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / file).read_bytes() == (original / file).read_bytes()
    assert not (tmp_path / "out" / "README.md").exists()


def test_names_shapes_and_dtypes_as_published(tmp_path):
    """bfloat16 but for decay rates and gated norms; experts fused, also those of the MTP layer."""
    model = _model(hf_config(moe=True, vision=False))
    export_hf(model.init_params(0), model.config, tmp_path / "out")
    tensors = open_source(str(tmp_path / "out")).tensors
    wide = {n for n, x in tensors.items() if x.dtype != ml_dtypes.bfloat16}
    assert wide == {f"model.language_model.layers.{i}.linear_attn.{n}" for i in (0, 2) for n in ("A_log", "norm.weight")}
    assert all(DTYPE_NAMES[tensors[n].dtype] == "F32" for n in wide)
    assert tensors["mtp.layers.0.mlp.experts.gate_up_proj"].shape == (4, 144, 48)
    assert tensors["model.language_model.layers.1.self_attn.q_proj.weight"].shape == (128, 48)


def test_without_the_vision_tower_the_config_has_none(tmp_path):
    config = hf_config() | {"quantization_config": {"quant_method": "fp8"}}
    model = _model(hf_config(mtp=False))
    export_hf(model.init_params(0), model.config, tmp_path / "out", hf_config=config)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "vision_config" not in written and "quantization_config" not in written
    assert written["architectures"] == ["Qwen3_5ForCausalLM"] and written["text_config"]["mtp_num_hidden_layers"] == 0
    assert config["text_config"]["mtp_num_hidden_layers"] == 1  # the caller's own is left alone
    _load(tmp_path / "out")


def test_config_round_trip():
    configs = [ModelConfig.preset(name) for name in PRESETS]
    yarn = RopeConfig(1e6, 0.25, (11, 11, 10), "yarn", 4.0, 262144, beta_fast=16.0, truncate=False)
    configs += [configs[1].replace(rope=yarn, full_attention_interval=1, initializer_range=0.01)]
    configs += [configs[1].replace(rope=RopeConfig(1e6, 0.25, (11, 11, 10), "yarn", 2.0, 4096, 1.5), dtype="float32")]
    for config in configs:
        read = ModelConfig.from_hf(json.loads(json.dumps(to_hf_config(config))))
        assert read.replace(dtype=config.dtype) == config


def test_the_packaged_files_go_along(tmp_path):
    model = _model(hf_config(vision=False))
    export_hf(model.init_params(0), model.config, tmp_path / "out", template_dir=ASSETS / "tiny")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= names
    assert ModelConfig.from_hf(tmp_path / "out").vocab_size == 96


def test_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 60_000)
    model = _model(hf_config(vision=False))
    params, original, calls = model.init_params(0), shards.write_safetensors, []

    def failing(error):
        def write_safetensors(*args):
            calls.append(args)
            if len(calls) % 2 == 0:
                raise error
            original(*args)

        return write_safetensors

    cases = {KeyboardInterrupt: KeyboardInterrupt(), UserError: OSError(28, "No space left on device")}
    for expected, error in cases.items():
        monkeypatch.setattr(shards, "write_safetensors", failing(error))
        with pytest.raises(expected) as e:
            export_hf(params, model.config, tmp_path / "out")
        assert not list(tmp_path.iterdir())
    assert str(e.value) == f"could not write {tmp_path / 'out'}: No space left on device"
    monkeypatch.setattr(shards, "write_safetensors", original)
    (tmp_path / "out.partial" / "checkpoint").mkdir(parents=True)  # as after a kill
    (tmp_path / "out.partial" / LOCK).touch()
    (tmp_path / "out.partial" / "checkpoint" / "model-00001-of-00009.safetensors").write_bytes(b"half")
    export_hf(params, model.config, tmp_path / "out")
    assert _same(_load(tmp_path / "out"), _rounded(params)) and not (tmp_path / "out.partial").exists()


def test_an_export_that_a_bucket_refuses_is_said_in_a_line(bucket, monkeypatch):
    """Clients of buckets have exceptions of their own, such as gcsfs's HttpError."""
    model = _model(hf_config(vision=False))

    def refused(*args, **kwargs):
        raise Exception("Too Many Requests, 429")

    export_hf(model.init_params(0), model.config, bucket / "out")
    assert len(open_source(str(bucket / "out")).tensors) > 9
    (bucket / "out.partial" / LOCK).write_text("as after a kill")
    export_hf(model.init_params(0), model.config, bucket / "out")
    assert not (bucket / "out.partial").exists()
    monkeypatch.setattr(Bucket, "_open", refused)
    with pytest.raises(UserError, match="^could not write gs://bucket/new: Too Many Requests, 429$"):
        export_hf(model.init_params(0), model.config, bucket / "new")
    monkeypatch.setattr(Bucket, "ls", refused)
    with pytest.raises(UserError, match="^cannot read gs://bucket/out: Too Many Requests, 429$"):
        check_export_target(bucket / "out")


def test_what_cannot_be_exported(tmp_path):
    model = _model(hf_config(vision=False))
    params = model.init_params(0)
    check_export_target(tmp_path / "new")
    (tmp_path / "old").mkdir()
    check_export_target(tmp_path / "old")
    (tmp_path / "old" / "file").write_text("mine")
    with pytest.raises(UserError, match="old exists already"):
        check_export_target(tmp_path / "old")
    with pytest.raises(UserError, match="old exists already"):
        export_hf(params, model.config, tmp_path / "old")
    with pytest.raises(UserError, match="is a file"):
        check_export_target(tmp_path / "old" / "file")
    with pytest.raises(UserError, match="file is not a directory one can write to"):
        check_export_target(tmp_path / "old" / "file" / "new")
    with pytest.raises(UserError, match="'float16'; accepted are bfloat16 and float32"):
        export_hf(params, model.config, tmp_path / "new", dtype="float16")
    with pytest.raises(ValueError, match="its vocab_size is 96, the parameters have 99"):
        export_hf(params, model.config.replace(vocab_size=99), tmp_path / "new", hf_config=hf_config())
    with pytest.raises(ValueError, match=r"embed/embedding has shape \(96, 48\)"):
        export_hf(params, model.config.replace(vocab_size=99), tmp_path / "new")
    with pytest.raises(ValueError, match="the parameters lack lm_head/kernel"):
        export_hf({k: v for k, v in params.items() if k != "lm_head"}, model.config, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old"]
