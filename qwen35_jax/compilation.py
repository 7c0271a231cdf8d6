"""JAX's persistent compilation cache, on by default for the commands."""

from __future__ import annotations

import pathlib

import jax


def use_compilation_cache() -> None:
    """Turns the cache on, in the user's cache folder, unless JAX has been told where it is."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path.home() / ".cache" / "qwen35_jax" / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
