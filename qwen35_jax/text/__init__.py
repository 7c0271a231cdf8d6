"""Text in and out: tokenizer, chat template, streaming, and the sampling settings that come with a checkpoint."""

from qwen35_jax.text.chat_template import ChatTemplate, built_in_template
from qwen35_jax.text.files import one_line, read_json_object
from qwen35_jax.text.generation_config import (
    SAMPLING_PRESETS,
    GenerationConfig,
    SamplingPreset,
    read_generation_config,
    sampling_preset,
)
from qwen35_jax.text.messages import normalise_messages, normalise_tools
from qwen35_jax.text.prompts import FilePrompt, read_prompts
from qwen35_jax.text.streaming import StopStrings, StreamDecoder
from qwen35_jax.text.tokenizer import Tokenizer

__all__ = [
    "SAMPLING_PRESETS",
    "ChatTemplate",
    "FilePrompt",
    "GenerationConfig",
    "SamplingPreset",
    "StopStrings",
    "StreamDecoder",
    "Tokenizer",
    "built_in_template",
    "normalise_messages",
    "normalise_tools",
    "one_line",
    "read_generation_config",
    "read_json_object",
    "read_prompts",
    "sampling_preset",
]
