"""Opening: what is no checkpoint is refused in one line that says what to do."""

from __future__ import annotations

import json

import huggingface_hub
import pytest

from qwen35_jax.checkpoint import open_source
from qwen35_jax.checkpoint.conversion import convert
from qwen35_jax.errors import UserError
from tests.checkpoint.synthetic import canonical_tensors, hf_config, write

INDEX = "model.safetensors.index.json"


class ReadError(Exception):
    """As the HTTP package of the hub's client has it: no OSError."""


# What a download raises when it breaks in the middle.
BROKEN = {"http": ReadError(), "xet": RuntimeError("Data processing error: request failed")}


@pytest.fixture
def sharded(tmp_path):
    config = hf_config()
    return write(tmp_path / "hf", config, canonical_tensors(config), shards=3)


def _refused(path, message: str, revision=None):
    with pytest.raises(UserError, match=message) as error:
        open_source(str(path), revision)
    assert "\n" not in str(error.value)


def test_directories_that_are_none(tmp_path):
    _refused(tmp_path / "nothing", "no such directory")
    _refused("nothing", "no such directory: nothing")
    (tmp_path / "empty").mkdir()
    _refused(tmp_path / "empty", "is empty")
    (tmp_path / "file").write_text("x")
    _refused(tmp_path / "file", "is a file")
    (tmp_path / "empty" / "notes.txt").write_text("x")
    _refused(tmp_path / "empty", "no config.json")
    (tmp_path / "empty" / "config.json").write_text("{}")
    _refused(tmp_path / "empty", "holds no weights")
    (tmp_path / "empty" / "pytorch_model.bin").write_text("x")
    _refused(tmp_path / "empty", "pickle .* never read")
    (tmp_path / "empty" / "model-00001-of-00002.safetensors").write_text("x")
    _refused(tmp_path / "empty", "no model.safetensors.index.json")


@pytest.mark.parametrize("text,message", [("{", "not valid JSON"), ("[1]", "not a JSON object"), ("\xff", "not UTF-8")])
def test_broken_config(sharded, text, message):
    (sharded / "config.json").write_bytes(text.encode("latin-1"))
    _refused(sharded, message)


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".hidden.safetensors", "x.bin", "a\\b.safetensors", 5],
)
def test_shard_names_that_lead_elsewhere(sharded, name):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = name
    (sharded / INDEX).write_text(json.dumps(index))
    _refused(sharded, "only plain names of .safetensors files")


def test_index_and_shards_disagree(sharded):
    index = json.loads((sharded / INDEX).read_text())
    first, second = list(index["weight_map"])[0], list(index["weight_map"])[-1]
    index["weight_map"][first] = index["weight_map"][second]
    (sharded / INDEX).write_text(json.dumps(index))
    _refused(sharded, f"(lacks|holds) {first} that {INDEX}")
    for text in ("[]", '{"weight_map": {}}', '{"weight_map": 3}', "{"):
        (sharded / INDEX).write_text(text)
        _refused(sharded, INDEX)


def test_missing_and_truncated_shards(sharded):
    shard = sharded / "model-00002-of-00003.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-100])
    _refused(sharded, f"{shard.name} is truncated: {len(data) - 100} bytes, its header promises {len(data)}")
    shard.unlink()
    _refused(sharded, f"lacks the shard {shard.name}")


def test_orbax_directories_that_no_conversion_made(sharded, tmp_path):
    out = tmp_path / "orbax"
    convert(str(sharded), str(out), progress=False)
    record = json.loads((out / "source.json").read_text())
    (out / "source.json").write_text(json.dumps(record | {"format": "other"}))
    _refused(out, "says format 'other'")
    (out / "source.json").write_text(json.dumps(record | {"headers": {"../x": "{}"}}))
    _refused(out, "no plain name")
    (out / "source.json").write_text(json.dumps(record | {"tensors": {"a/b": {}}}))
    _refused(out, "no plain name")
    (out / "source.json").unlink()
    _refused(out, "Orbax checkpoint without source.json")


def test_damaged_arrays(sharded, tmp_path):
    out = tmp_path / "orbax"
    convert(str(sharded), str(out), progress=False)
    source = open_source(str(out))
    array = out / "state" / "lm_head.weight"
    (array / ".zarray").rename(array / "moved")
    with pytest.raises(UserError, match="lm_head.weight is missing or damaged"):
        source.read("lm_head.weight")
    norm = out / "state" / "model.language_model.norm.weight" / "0"
    norm.write_bytes(b"x")
    with pytest.raises(UserError, match="cannot read tensor model.language_model.norm.weight"):
        source.read("model.language_model.norm.weight")
    norm.unlink()
    with pytest.raises(UserError, match="model.language_model.norm.weight"):
        source.read("model.language_model.norm.weight")


def test_hub_ids(sharded, monkeypatch):
    calls = []

    def fake(repo, revision, allow_patterns):
        calls.append((repo, revision))
        if revision == "broken":
            raise OSError("Connection refused\nsome\nmore lines")
        if revision in BROKEN:
            raise BROKEN[revision]
        if revision == "offline":
            raise huggingface_hub.errors.LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder")
        return str(sharded)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    assert open_source("org/name", "main").directory.name == "hf"
    assert calls == [("org/name", "main")]
    _refused("org/name", "no directory org/name, .* at revision broken: Connection refused", "broken")
    _refused("org/name", "no directory org/name, .* at revision offline: it cannot be reached", "offline")
    for revision, error in BROKEN.items():
        _refused("org/name", f"at revision {revision}: {str(error) or 'ReadError'}; the same command resumes", revision)
    _refused(sharded, "a revision belongs to a hub id", "main")
    _refused("../name", "no such directory")
