"""The vision tower against numbers of transformers (tests/golden), its packing, its meshes and its memory."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from qwen35_jax.checkpoint import load_vision_params, open_source
from qwen35_jax.config import ModelConfig
from qwen35_jax.generate.vision import VisionEncoder, make_vision, pack_frames, row_bucket
from qwen35_jax.model import VisionModel
from qwen35_jax.sharding import Sharding, make_mesh
from qwen35_jax.vision_io import Visual

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parents[1] / "golden" / "dense"
LIMIT = 1e-4  # relative; float32 sums in another order give about 1e-6


@functools.cache
def _golden() -> tuple[list[Visual], list[np.ndarray]]:
    with np.load(GOLDEN / "vision.npz") as file:
        grids, patches, rows = (file[name] for name in ("grids", "patches", "rows"))
    cuts = grids.prod(axis=1).cumsum()[:-1]
    kinds = ["image" if g[0] == 1 else "video" for g in grids]
    visuals = [
        Visual(kind, part, tuple(grid.tolist()), 2)
        for kind, part, grid in zip(kinds, np.split(patches, cuts), grids, strict=True)
    ]
    return visuals, np.split(rows, cuts // 4)


def _encoder(mesh: str, dtype: str = "float32") -> VisionEncoder:
    source = open_source(str(GOLDEN))
    config = ModelConfig.from_hf(source.config).replace(dtype=dtype)
    model = VisionModel(config, Sharding(make_mesh(mesh)))
    return VisionEncoder(model, lambda: load_vision_params(source, config, model.abstract_params()))


def _error(expected: list[np.ndarray], got: list[np.ndarray]) -> float:
    pairs = zip(expected, got, strict=True)
    return max(float((np.linalg.norm(a - b, axis=-1) / np.linalg.norm(a, axis=-1)).max()) for a, b in pairs)


@pytest.mark.parametrize(("mesh", "cut"), [("1x1", True), ("2x2", True), ("1x8", False)])
def test_rows(mesh, cut):
    """Two heads: on 2x2 they are cut over `model`, on 1x8 every device holds the tower."""
    visuals, rows = _golden()
    encoder = _encoder(mesh)
    assert (encoder.model.layout.heads == "N") == cut
    assert _error(rows, encoder.encode(visuals)) < LIMIT


def test_neighbours_do_not_matter():
    """A frame says the same beside others as alone, in whatever order."""
    visuals, rows = _golden()
    encoder = _encoder("1x1")
    assert _error(rows[::-1], encoder.encode(visuals[::-1])) < LIMIT
    assert _error(rows[1:], encoder.encode(visuals[1:])) < LIMIT


def test_bfloat16():
    visuals, rows = _golden()
    got = [r.astype(np.float32) for r in _encoder("1x1", "bfloat16").encode(visuals)]
    assert _error(rows, got) < 0.05  # one block's roundings of 2^-8 each


def test_packing():
    visuals = [
        Visual("video", np.zeros((7 * 96, 1), np.uint8), (7, 8, 12), 2),
        Visual("image", np.zeros((16, 1), np.uint8), (1, 4, 4), 2),
    ]
    length, rows = pack_frames(visuals, 2)
    assert length == row_bucket(344) == 384
    assert [[(f.visual, f.start) for f in row] for row in rows] == [
        [(0, t * 96) for t in range(4)],
        [(0, t * 96) for t in range(4, 7)] + [(1, 0)],
    ]
    assert pack_frames(visuals, 8)[0] == row_bucket(96) == 256
    assert [row_bucket(n) for n in (1, 256, 257, 512, 513, 9000, 65536)] == [256, 256, 320, 512, 640, 10240, 65536]


def test_memory_of_a_large_image():
    """A picture of 4096 x 4096, 65,536 patches: in far less than patches squared (8 GiB for one head in bfloat16)."""
    model = VisionModel(ModelConfig.preset("0.8b"), Sharding(make_mesh("1x1")))
    memory = make_vision(model, 1, 65536).compile().memory_analysis()
    used = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    print(f"65,536 patches through the 0.8b tower: {used / 2**30:.2f} GiB")
    assert used < 4 << 30


@pytest.mark.end_to_end
def test_an_image_of_a_thousand_pixels_goes_through():
    """From a file to the rows that the text model reads, in the 0.8b tower; the rows are finite, or the program would fail."""
    command = [sys.executable, "-m", "benchmarks.vision", "--side", "1024"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (peak,) = re.findall(r"tower: .* 1024 rows, peak ([\d.]+) GiB", done.stdout)
    assert "grid 1 x 64 x 64" in done.stdout and float(peak) < 8


def test_random_parameters_are_the_same_on_every_mesh():
    config = ModelConfig.from_hf(str(GOLDEN)).replace(dtype="float32")
    trees = [VisionModel(config, Sharding(make_mesh(mesh))).init_params(3) for mesh in ("1x1", "2x2")]
    jax.tree.map(np.testing.assert_array_equal, *trees)
