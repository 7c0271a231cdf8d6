"""Text generation: `load`, `LanguageModel`, sampling, and the compiled steps."""

from qwen35_jax.generate.language_model import Completion, LanguageModel, Piece
from qwen35_jax.generate.loading import load
from qwen35_jax.generate.sampling import SamplingParams

__all__ = ["Completion", "LanguageModel", "Piece", "SamplingParams", "load"]
