"""Configurations: published files, presets, parameter counts, and every way in which a file can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen35_jax import ModelConfig, UserError
from qwen35_jax.config import ASSETS, PRESETS
from qwen35_jax.model import parameter_counts

SHARED = Path(__file__).parents[2] / "shared" / "spec"
# size: (text, vision, mtp, active), from the model's specification
COUNTS = {
    "0.8b": (752_393_024, 100_592_896, 20_452_864, 752_393_024),
    "2b": (1_881_825_088, 331_416_576, 60_828_160, 1_881_825_088),
    "4b": (4_205_751_296, 333_514_240, 120_599_552, 4_205_751_296),
    "9b": (8_953_803_264, 456_010_480, 243_290_624, 8_953_803_264),
    "27b": (26_895_998_464, 460_730_096, 424_699_392, 26_895_998_464),
    "35b-a3b": (34_660_610_688, 446_571_248, 844_640_768, 3_454_988_928),
    "122b-a10b": (122_111_526_912, 451_290_864, 2_523_679_232, 9_771_288_576),
    "397b-a17b": (396_346_350_336, 456_010_480, 6_595_568_128, 17_349_040_896),
}


def tiny_json() -> dict:
    return json.loads((ASSETS / "tiny" / "config.json").read_text())


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_equal_the_published_table(name):
    text, vision, mtp, active = COUNTS[name]
    expected = {"text": text, "vision": vision, "mtp": mtp, "total": text + vision + mtp, "active": active}
    assert parameter_counts(ModelConfig.preset(name)) == expected


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published configurations (../shared) are absent")
@pytest.mark.parametrize("name", COUNTS)
def test_presets_equal_the_published_files(name):
    size = name.upper()
    assert ModelConfig.from_hf(SHARED / "configs" / f"Qwen3.5-{size}.config.json") == ModelConfig.preset(name)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published configurations (../shared) are absent")
def test_a_later_release_reads_as_the_same_architecture():
    assert ModelConfig.from_hf(SHARED / "qwen3.8-27b") == ModelConfig.preset("27b")


def test_fields_of_qwen36_are_understood():
    raw = tiny_json()
    raw["language_model_only"] = False
    raw["text_config"] |= {"output_gate_type": "swish", "bos_token_id": 1, "pad_token_id": None, "partial_rotary_factor": 0.25}
    assert ModelConfig.from_hf(raw) == ModelConfig.preset("tiny")


def test_text_only_file():
    raw = tiny_json()["text_config"] | {"tie_word_embeddings": True}
    text = ModelConfig.preset("tiny").replace(vision=None, image_token_id=None, video_token_id=None)
    assert ModelConfig.from_hf(raw) == text


def test_every_preset_exists():
    assert {ModelConfig.preset(name).vocab_size for name in PRESETS if name != "tiny"} == {248320}
    with pytest.raises(UserError, match="no preset '7b'.*0.8b"):
        ModelConfig.preset("7b")


WRONG = [
    ({"model_type": "llama"}, {}, "model_type is 'llama'.*qwen3_5"),
    ({"model_type": None}, {}, "model_type is None"),
    ({"text_config": []}, {}, "text_config is list"),
    ({}, {"hidden_size": "many"}, "hidden_size is 'many'; expected int"),
    ({}, {"hidden_size": True}, "hidden_size is True; expected int"),
    ({}, {"num_attention_heads": 3}, r"num_attention_heads \(3\).*num_key_value_heads \(2\)"),
    ({}, {"linear_num_value_heads": 5}, r"linear_num_value_heads \(5\).*linear_num_key_heads \(2\)"),
    ({}, {"linear_num_key_heads": 0}, r"linear_num_key_heads \(0\)"),
    ({}, {"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu'"),
    ({}, {"attention_bias": True}, "attention_bias is True"),
    ({}, {"attn_output_gate": False}, "attn_output_gate is False"),
    ({}, {"layer_types": ["full_attention"]}, "layer_types must hold num_hidden_layers"),
    ({}, {"layer_types": ["linear_attention"] * 8}, "layer_types must hold"),
    ({}, {"num_experts_per_tok": 9}, r"num_experts_per_tok \(9\)"),
    ({}, {"linear_conv_kernel_dim": 3}, "linear_conv_kernel_dim is 3"),
    ({}, {"rope_parameters": None}, "rope_parameters is None"),
    ({}, {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; expected a finite number"),
    ({}, {"rms_norm_eps": 10**400}, "rms_norm_eps is 10*; expected a finite number"),
    ({}, {"rms_norm_eps": -1}, "rms_norm_eps is -1.0; it must be above 0"),
    ({}, {"max_position_embeddings": 0}, "max_position_embeddings is 0; it must be 1 or more"),
    ({}, {"moe_intermediate_size": 0}, "moe_intermediate_size is 0"),
    ({}, {"head_dim": 10**400}, "head_dim is 10*; expected 0 to 2147483647"),
    ({}, {"num_hidden_layers": 20_000_000, "layer_types": None}, "num_hidden_layers is 20000000; the most"),
    ({}, {"num_experts": 20_000_000}, "num_experts is 20000000; the most"),
    ({"quantization_config": {"quant_method": "gptq"}}, {}, "quant_method is 'gptq'"),
    ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}, {}, "weight_block_size"),
    ({"vision_config": {"depth": 2}}, {}, "vision_config.hidden_size is missing"),
]


@pytest.mark.parametrize(("top", "text", "message"), WRONG)
def test_wrong_fields_are_named(top, text, message):
    raw = tiny_json()
    raw["text_config"] |= text
    with pytest.raises(UserError, match=message) as error:
        ModelConfig.from_hf(raw | top)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "dynamic"}, "rope_type is 'dynamic'; accepted are default, yarn"),
        ({"rope_type": "yarn"}, "rope_parameters.factor is missing"),
        ({"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings is missing"),
        (
            {"rope_type": "yarn", "factor": 1e308, "original_max_position_embeddings": 9},
            "1e\\+308 times 9 positions",
        ),
        ({"mrope_section": [3, 3]}, "mrope_section"),
        ({"mrope_section": [3, 3, 3]}, "mrope_section .* must add up to 8"),
        ({"mrope_interleaved": False}, "mrope_interleaved is False"),
        ({"partial_rotary_factor": 0.01}, "no even width"),
        ({"partial_rotary_factor": float("inf")}, "partial_rotary_factor is inf; expected a finite number"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5; it must be"),
        ({"rope_theta": 0}, "rope_theta is 0.0; it must be 1 to 1e12"),
    ],
)
def test_wrong_rotary_parameters(rope, message):
    raw = tiny_json()
    raw["text_config"]["rope_parameters"] |= rope
    with pytest.raises(UserError, match=message):
        ModelConfig.from_hf(raw)


@pytest.mark.parametrize(("factor", "known", "tokens"), [(None, 0, 8192), (4.0, 8192, 32768), (4.0, 1024, 8192)])
def test_yarn_lengthens_the_context(factor, known, tokens):
    """Model cards add rope_parameters for long prompts and leave max_position_embeddings."""
    raw = tiny_json()
    if factor:
        yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": known}
        raw["text_config"]["rope_parameters"] |= yarn
    config = ModelConfig.from_hf(raw)
    assert (config.max_position_embeddings, config.context_length) == (8192, tokens)


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "rms_norm_eps", "head_dim", "num_experts", "vocab_size"])
def test_missing_fields_do_not_fall_back(field):
    raw = tiny_json()
    del raw["text_config"][field]
    with pytest.raises(UserError, match=f"{field} is missing"):
        ModelConfig.from_hf(raw)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00", "[" * 100_000, "1" * 5000])
def test_broken_files(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="config.json"):
        ModelConfig.from_hf(tmp_path)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        ModelConfig.from_hf(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda x: st.lists(x, max_size=3)
)


@given(st.sampled_from(sorted(tiny_json()["text_config"])), JSON)
def test_any_value_in_any_field_is_read_or_refused_in_one_line(field, value):
    raw = tiny_json()
    raw["text_config"][field] = value
    try:
        ModelConfig.from_hf(raw)
    except UserError as error:
        assert "\n" not in str(error)
