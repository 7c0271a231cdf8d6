"""Qwen3.5 in JAX: `load`, `ModelConfig`, and what they return."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen35_jax.config import ModelConfig
    from qwen35_jax.errors import UserError
    from qwen35_jax.generate import Completion, LanguageModel, Piece, SamplingParams, load

__all__ = ["Completion", "LanguageModel", "ModelConfig", "Piece", "SamplingParams", "UserError", "load"]
__version__ = "0.1.0"

_HOME = {"ModelConfig": "qwen35_jax.config", "UserError": "qwen35_jax.errors"}


def __getattr__(name: str) -> Any:
    """Imports a name when it is first used: `python -m qwen35_jax.…` passes here before it can do anything else."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME.get(name, "qwen35_jax.generate")), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
