"""generation_config.json and the named presets."""

import json
from pathlib import Path

import pytest

from qwen35_jax.errors import UserError
from qwen35_jax.text import SAMPLING_PRESETS, GenerationConfig, read_generation_config, sampling_preset

SPEC = Path(__file__).parents[3] / "shared" / "spec"


def read(tmp_path, content):
    (tmp_path / "generation_config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return read_generation_config(str(tmp_path))


def test_missing_file_and_fields(tmp_path):
    greedy = GenerationConfig()
    assert read_generation_config(tmp_path) == greedy == read(tmp_path, {})
    assert (greedy.do_sample, greedy.top_k, greedy.top_p, greedy.repetition_penalty) == (False, 0, 1.0, 1.0)
    assert read(tmp_path, {"top_k": None, "eos_token_id": None, "transformers_version": "5", "x": []}) == greedy


def test_all_fields(tmp_path):
    values = {
        "do_sample": True, "temperature": 1, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "presence_penalty": -1.5,
        "repetition_penalty": 1.1, "pad_token_id": 0, "bos_token_id": 1,
    }  # fmt: skip
    config = read(tmp_path, {**values, "eos_token_id": 7})
    assert config == GenerationConfig(**values, eos_token_ids=(7,))
    assert read(tmp_path, {"eos_token_id": [7, 8]}).eos_token_ids == (7, 8)


@pytest.mark.parametrize(
    "field, value",
    [
        ("do_sample", 1), ("do_sample", "true"), ("temperature", "hot"), ("temperature", -1), ("temperature", True),
        ("temperature", float("nan")), ("temperature", float("inf")), ("top_k", 2.0), ("top_k", -1), ("top_k", False),
        ("top_p", 0), ("top_p", 1.5), ("min_p", -0.1), ("min_p", [0.1]), ("presence_penalty", {}),
        ("repetition_penalty", 0), ("pad_token_id", "x"), ("pad_token_id", -1), ("bos_token_id", [1]),
        ("eos_token_id", "x"), ("eos_token_id", [1, "x"]), ("eos_token_id", [True]), ("eos_token_id", -1),
        ("temperature", 10**40), ("top_k", 2**40), ("presence_penalty", -1e300), ("repetition_penalty", 1e39),
        ("eos_token_id", [1, 2**40]), ("bos_token_id", 2**31),
    ],
)  # fmt: skip
def test_wrong_values(field, value, tmp_path):
    with pytest.raises(UserError) as caught:
        read(tmp_path, {field: value})
    message = str(caught.value)
    assert "generation_config.json" in message and field in message and repr(value) in message and "\n" not in message


@pytest.mark.parametrize("content", ["", "{", "[]", "3"])
def test_broken_file(content, tmp_path):
    with pytest.raises(UserError, match="generation_config.json"):
        read(tmp_path, content)


@pytest.mark.parametrize("path, temperature", [("generation/Qwen3.5-27B_397B.generation_config.json", 0.6),
                                               ("qwen3.8-27b/generation_config.json", 1.0)])  # fmt: skip
def test_official_files(path, temperature, tmp_path):
    if not SPEC.is_dir():
        pytest.skip("no official files: there is no ../shared")
    config = read(tmp_path, (SPEC / path).read_text())
    assert config == GenerationConfig(
        do_sample=True, temperature=temperature, top_k=20, top_p=0.95,
        eos_token_ids=(248046, 248044), pad_token_id=248044, bos_token_id=248044,
    )  # fmt: skip


def test_presets():
    assert list(SAMPLING_PRESETS) == ["thinking", "coding", "instruct", "reasoning", "small"]
    coding = sampling_preset("coding")
    assert (coding.temperature, coding.top_p, coding.top_k, coding.presence_penalty) == (0.6, 0.95, 20, 0.0)
    assert [p.enable_thinking for p in SAMPLING_PRESETS.values()] == [True, True, False, False, False]
    with pytest.raises(UserError, match="'creative' is unknown; there are thinking, coding"):
        sampling_preset("creative")
