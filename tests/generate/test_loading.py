"""`load` refuses what it cannot use before it reads weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import qwen35_jax
from qwen35_jax import UserError
from qwen35_jax.model import Model
from qwen35_jax.text import Tokenizer
from qwen35_jax.vision_io import VisionSettings

GOLDEN = Path(__file__).parents[1] / "golden" / "dense"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("", {}, "no model is named"),
        ("tiny", {"revision": "main"}, r"tiny is a preset; a directory of that name is \./tiny"),
        ("./tiny", {}, "no such directory: ./tiny"),
        (Path("./tiny"), {}, "no such directory: ./tiny"),  # which pathlib writes as "tiny"
        ("tiny", {"seed": 10**23, "random_weights": True}, "seed is 1"),
        ("tiny", {"seed": -1}, "seed is -1"),
    ],
)
def test_wrong_arguments(tmp_path, monkeypatch, name, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        qwen35_jax.load(name, **options)


def test_published_sizes_have_the_published_processor(monkeypatch):
    """And not that of the packaged model, whose tokenizer they borrow."""
    monkeypatch.setattr(Model, "init_params", lambda model, seed, stacked: model.abstract_params(stacked))
    assert qwen35_jax.load("0.8b").vision.settings == VisionSettings()


def test_end_tokens_are_counted(tmp_path):
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(9))}))
    with pytest.raises(UserError, match="generation_config.json: eos_token_id names 9 end tokens; at most 8"):
        qwen35_jax.load(str(tmp_path))


@pytest.mark.parametrize(
    ("written", "ends"),
    [
        (None, (11, 7)),  # the model's, and the one behind a chat's turns
        ({"do_sample": True}, (11, 7)),
        ({"eos_token_id": [3, 4]}, (3, 4)),
    ],
)
def test_end_tokens_without_generation_config(tmp_path, monkeypatch, written, ends):
    """Some published sizes have no such file: without an end, a chat's answer would go on as the user."""
    monkeypatch.setattr(Tokenizer, "from_directory", lambda _: SimpleNamespace(eos_token_id=7, vocab_size=64))
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    if written is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(written))
    config = json.loads((tmp_path / "config.json").read_text())
    (config["text_config"] if "text_config" in config else config)["eos_token_id"] = 11
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert qwen35_jax.load(str(tmp_path)).defaults.eos_token_ids == ends


def test_names_are_imported_when_they_are_used():
    assert set(qwen35_jax.__all__) <= set(dir(qwen35_jax))
    assert all(getattr(qwen35_jax, name).__name__ == name for name in qwen35_jax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'loud'"):
        qwen35_jax.loud  # noqa: B018
