"""Qwen3.5 in JAX: `load`, `ModelConfig`, and what they return."""

from qwen35_jax.config import ModelConfig
from qwen35_jax.errors import UserError
from qwen35_jax.generate import Completion, LanguageModel, Piece, SamplingParams, load

__all__ = ["Completion", "LanguageModel", "ModelConfig", "Piece", "SamplingParams", "UserError", "load"]
__version__ = "0.1.0"
