"""Pixels, sizes, sampled frames and patches against transformers' processors.

The published image processor is the torchvision one. Where torchvision is not installed its resizing is what torch computes for
it (`interpolate` with antialiasing on uint8), and the video processor's functions are taken out of its file, which cannot be
imported without torchvision.
"""

from __future__ import annotations

import ast
import importlib.util
import math
import types
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the oracle needs torch")
pytest.importorskip("transformers", minversion="5.23", reason="the oracle needs transformers 5.23 or newer")

from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize  # noqa: E402

from qwen35_jax.errors import UserError  # noqa: E402
from qwen35_jax.vision_io import (  # noqa: E402
    VisionSettings,
    image_size,
    image_visual,
    read_video,
    resize,
    sample_frames,
    video_size,
    video_visual,
)

SETTINGS = VisionSettings()
VIDEO_FILE = "transformers.models.qwen3_vl.video_processing_qwen3_vl"


def _video_functions() -> dict:
    """`smart_resize` of videos, and the methods `sample_frames` and `patchify`."""
    tree = ast.parse(Path(importlib.util.find_spec(VIDEO_FILE).origin).read_text(encoding="utf-8"))
    found = [
        n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name in ("smart_resize", "sample_frames", "patchify")
    ]
    for function in found:
        function.decorator_list, function.returns = [], None
        for argument in (*function.args.args, *function.args.kwonlyargs):
            argument.annotation = None
    names: dict = {"math": math, "torch": torch, "np": np}
    exec(compile(ast.Module(found, []), VIDEO_FILE, "exec"), names)
    return names


@pytest.fixture(scope="module")
def processor():
    size = {"shortest_edge": SETTINGS.image_min_pixels, "longest_edge": SETTINGS.image_max_pixels}
    half = [0.5, 0.5, 0.5]
    return Qwen2VLImageProcessorPil(
        size=size, patch_size=16, temporal_patch_size=2, merge_size=2, image_mean=half, image_std=half
    )


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Soft colours with noise and hard edges in them."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    soft = np.stack([128 + 100 * np.sin(x / 17 + c) * np.cos(y / (11 + c)) for c in range(3)], axis=-1)
    soft += rng.normal(0, 12, soft.shape)
    soft[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return soft.clip(0, 255).astype(np.uint8)


def levels(pixel_values: np.ndarray) -> np.ndarray:
    """Normalised values back to uint8 levels."""
    return (pixel_values.astype(np.float64) * 127.5 + 127.5).round().astype(np.uint8)


@pytest.mark.parametrize("shape", [(256, 256), (320, 512), (96, 1024)])
def test_without_resizing(processor, shape):
    """Exactly the processor's patches."""
    pixels = picture(*shape)
    expected = processor(pixels, return_tensors="np")
    assert image_size(*shape, SETTINGS) == shape
    ours = image_visual(pixels, SETTINGS)
    assert [list(ours.grid)] == expected["image_grid_thw"].tolist()
    np.testing.assert_array_equal(ours.patches, levels(expected["pixel_values"]))
    np.testing.assert_allclose((ours.patches.astype(np.float32) - 127.5) / 127.5, expected["pixel_values"], atol=2e-7)


SHAPES = [(300, 520), (1, 1), (90, 37), (784, 816), (30, 5000), (1400, 900)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("max_pixels", [None, 80_000])
def test_with_resizing(shape, max_pixels):
    """Exactly torch's kernel for uint8, which is the one that the published processor resizes with on the CPU."""
    pixels = picture(*shape)
    size = image_size(*shape, SETTINGS.changed(max_pixels=max_pixels))
    channels = torch.tensor(pixels).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(channels, size, mode="bicubic", antialias=True)
    np.testing.assert_array_equal(resize(pixels, size), expected[0].permute(1, 2, 0).numpy())


def test_sizes_of_images():
    rng = np.random.default_rng(1)
    sizes = [
        (784, 784),
        (816, 16),
        (1, 1),
        (9000, 9000),
        (16, 3200),
        *np.exp(rng.uniform(0, 9.5, (3000, 2))).astype(int).tolist(),
    ]
    for settings in (SETTINGS, SETTINGS.changed(max_pixels=100_000)):
        most = settings.max_pixels or settings.image_max_pixels
        for height, width in sizes:
            try:
                expected = smart_resize(height, width, 32, settings.image_min_pixels, most)
            except ValueError:
                with pytest.raises(UserError, match="one side may be"):
                    image_size(height, width, settings)
                continue
            assert image_size(height, width, settings) == expected, (height, width)


def test_sizes_of_videos():
    theirs, rng = _video_functions()["smart_resize"], np.random.default_rng(2)
    for frames, height, width in np.exp(rng.uniform([0.7, 2, 2], [6.6, 8, 8], (3000, 3))).astype(int).tolist():
        limits = {"min_pixels": SETTINGS.video_min_pixels, "max_pixels": SETTINGS.video_max_pixels}
        try:
            expected = theirs(frames, height, width, 2, 32, **limits)
        except ValueError:
            with pytest.raises(UserError, match="one side may be"):
                video_size(frames, height, width, SETTINGS)
            continue
        assert video_size(frames, height, width, SETTINGS) == expected, (frames, height, width)


def test_sampled_frames():
    theirs = _video_functions()["sample_frames"]
    limits = types.SimpleNamespace(min_frames=4, max_frames=768, fps=2)
    for count in (1, 2, 5, 9, 24, 100, 5000, 100_000):
        for fps in (1, 4, 23.976, 30):
            expected = theirs(limits, types.SimpleNamespace(total_num_frames=count, fps=fps))
            assert sample_frames(count, fps, SETTINGS) == expected.tolist(), (count, fps)


@pytest.mark.parametrize("count", range(2, 10))
def test_patches_of_videos(count):
    frames = np.stack([picture(64, 96, seed) for seed in range(count)])
    read, seconds = read_video(frames, SETTINGS.changed(fps=24), fps=24)
    np.testing.assert_array_equal(read, frames)
    pixels = torch.tensor(frames).permute(0, 3, 1, 2)[None].contiguous()
    expected, *grid = _video_functions()["patchify"](None, pixels, 16, 2, 2)
    ours = video_visual(read, seconds, SETTINGS)
    assert list(ours.grid) == grid and len(seconds) == grid[0]
    np.testing.assert_array_equal(ours.patches, expected[0].numpy())
