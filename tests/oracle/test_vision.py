"""The vision tower against transformers, live: images and videos of several sizes, on one device and on meshes."""

from __future__ import annotations

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the oracle needs torch")
pytest.importorskip("transformers", minversion="5.23", reason="the oracle needs transformers 5.23 or newer")

import jax  # noqa: E402

from qwen35_jax.checkpoint import load_vision_params, open_source  # noqa: E402
from qwen35_jax.config import ModelConfig  # noqa: E402
from qwen35_jax.generate.vision import VisionEncoder  # noqa: E402
from qwen35_jax.model import VisionModel  # noqa: E402
from qwen35_jax.sharding import Sharding, make_mesh  # noqa: E402
from qwen35_jax.vision_io import Visual  # noqa: E402

# float32 sums in another order give about 1e-6.
LIMIT = 1e-4
# (frames, height, width) in patches: a square, a strip, one merged row, a video whose frames are packed, one patch square.
GRIDS = ((1, 8, 8), (1, 4, 20), (3, 6, 4), (1, 2, 30), (5, 2, 2))


def visuals(config: ModelConfig, grids, seed: int = 0) -> list[Visual]:
    v, rng = config.vision, np.random.default_rng(seed)
    width = v.in_channels * v.temporal_patch_size * v.patch_size**2
    kinds = {True: "image", False: "video"}
    draw = functools.partial(rng.integers, 0, 256, dtype=np.uint8)
    return [Visual(kinds[g[0] == 1], draw((int(np.prod(g)), width)), g, v.spatial_merge_size) for g in grids]


@torch.inference_mode()
def theirs(reference, given: list[Visual]) -> np.ndarray:
    pixels = torch.tensor(np.concatenate([x.patches for x in given]).astype(np.float32) / 127.5 - 1)
    grids = torch.tensor([x.grid for x in given])
    return reference.oracle.model.model.visual(pixels, grid_thw=grids).pooler_output.numpy()


def relative(expected: np.ndarray, got: np.ndarray) -> float:
    """Largest error of a row, relative to its norm."""
    error = np.linalg.norm(expected - got, axis=-1) / np.linalg.norm(expected, axis=-1)
    return float(error.max())


@pytest.mark.parametrize("mesh", ("1x1", "4x2", "8x1", "1x8"))
def test_tower(references, mesh):
    """Meshes whose `model` divides the heads, and (1x8) one that does not, where the tower is replicated."""
    reference = references("vision")
    source = open_source(reference.directory)
    config = ModelConfig.from_hf(source.config).replace(dtype="float32")
    model = VisionModel(config, Sharding(make_mesh(mesh)))
    assert (model.layout.heads == "X") == (mesh == "1x8")
    given = visuals(config, GRIDS)
    rows = VisionEncoder(model, lambda: load_vision_params(source, config, model.abstract_params())).encode(given)
    assert [len(r) for r in rows] == [x.tokens for x in given]
    error = relative(theirs(reference, given), np.concatenate(rows))
    print(f"vision tower on {mesh}: largest relative error of a row {error:.1e}")
    assert error < LIMIT


def test_sizes_share_programs(references):
    """Patch counts are bucketed: another image of about the size compiles nothing."""
    config = ModelConfig.from_hf(open_source(references("vision").directory).config).replace(dtype="float32")
    model = VisionModel(config, Sharding(make_mesh("1x1")))
    encoder = VisionEncoder(model, model.init_params)
    encoder.encode(visuals(config, [(1, 14, 14)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", lambda *_: pytest.fail("compiled again"))
        encoder.encode(visuals(config, [(1, 16, 14)]))
        encoder.encode(visuals(config, [(3, 4, 6), (1, 8, 8)]))
