"""The vision tower, and training with it, compiled for chips that are not there."""

from __future__ import annotations

import pytest

from qwen35_jax.config import ModelConfig
from tests.aot.run import PATCHES, Case, of_this_jax
from tests.aot.test_scale import MIB, compiled

# MiB of temporaries, a tenth above what was measured with jax 0.10.2, and where that is less than 0.12.0.1 takes, with it.
TOWERS = [("v5e", (750,)), ("v6e", (750,)), ("tpu7x", (1110, 1350)), ("h200", (1390, 1600))]
TRAINING = [("v5e", "1x8", 2620), ("h200", "8x1", 6220)]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "ceiling"), TOWERS)
def test_tower(target, ceiling):
    """A picture of 4096 x 4096, 65,536 patches, on each of eight devices. Their number does not divide the 12 heads: each has
    the whole tower and works on a row of its own, without a word to the others. Nothing has the size of patches squared."""
    result, found = compiled(Case(target, "1x8", "0.8b", "vision", length=65536))
    assert result["temporary_bytes"] < of_this_jax(ceiling) * MIB
    assert not found


@pytest.mark.slow
@pytest.mark.parametrize(("target", "mesh", "ceiling"), TRAINING)
def test_training_step(target, mesh, ceiling):
    """Four layers and a tower trained with them: every device takes a row of patches, and gathers the rows of all eight."""
    result, _ = compiled(Case(target, mesh, "0.8b", "train", rows=8, length=2048, layers=4, pictures=True))
    assert result["temporary_bytes"] < ceiling * MIB
    rows = 8 * PATCHES // 4 * ModelConfig.preset("0.8b").hidden_size * 2
    assert any(kind == "all-gather" and size == rows for kind, size, *_ in result["collectives"])
