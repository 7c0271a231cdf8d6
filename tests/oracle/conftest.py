"""The models of the comparison with transformers, each built and loaded once a session."""

from __future__ import annotations

import functools
import gc

import jax
import pytest

import qwen35_jax
from tests.conftest import many_mappings


@pytest.fixture(scope="session")
def references(tmp_path_factory):
    """Name of a case -> Reference."""
    import torch  # not here in every environment: these tests skip then

    from tests.oracle.reference import Reference

    torch.set_num_threads(1)  # the models are tiny
    return functools.cache(lambda name: Reference(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def models(references):
    """(name, mesh, dtype) -> the loaded LanguageModel."""

    @functools.cache
    def load(name: str, mesh: str = "1x1", dtype: str = "float32") -> qwen35_jax.LanguageModel:
        return qwen35_jax.load(references(name).directory, mesh=mesh, dtype=dtype)

    return load


@pytest.fixture(autouse=True)
def forget_programs(models):
    """Lets go of the models when the process has many memory mappings: Linux allows 65,530, XLA:CPU takes several a kernel,
    and what asks for one more crashes."""
    yield
    if many_mappings():
        models.cache_clear()
        jax.clear_caches()
        gc.collect()
