"""A picture or a clip through the preprocessing and the vision tower of a published size, random weights: time and memory."""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

from qwen35_jax import command
from qwen35_jax.config import PRESETS, ModelConfig
from qwen35_jax.errors import UserError
from qwen35_jax.generate.vision import VisionEncoder
from qwen35_jax.model import VisionModel
from qwen35_jax.sharding import Sharding, make_mesh
from qwen35_jax.vision_io import VisionSettings, Visual, image_visual, read_image, read_video, video_visual

USAGE = """
Reads a picture as a user would, from a file, and runs the tower on it; prints seconds and the peak of the process's memory.

  python -m benchmarks.vision --side 2048
  python -m benchmarks.vision --frames 768 --side 360
"""
MODEL = flags.DEFINE_enum("model", "0.8b", PRESETS, "whose tower")
MESH = flags.DEFINE_string("mesh", "1x1", "DATAxMODEL or REPLICAxDATAxMODEL")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of weights and products")
SIDE = flags.DEFINE_integer("side", 1024, "height and width of the picture or frames", lower_bound=1)
FRAMES = flags.DEFINE_integer("frames", 0, "frames of a clip, all of which are looked at; 0: a picture", lower_bound=0)
GIB = 2**30


def pixels(rng: np.random.Generator, side: int) -> np.ndarray:
    """Waves and noise: uint8 [side, side, 3]."""
    x, y = np.meshgrid(*(np.linspace(0, 40, side, dtype=np.float32),) * 2)
    waves = np.stack([np.sin(x + y), np.sin(x * y / 20), np.cos(y)], -1)
    return (127 + 90 * waves + rng.integers(0, 30, waves.shape)).astype(np.uint8)


def read(settings: VisionSettings, side: int, frames: int) -> Visual:
    """From files that are made for it: a PNG, or as many as there are frames."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(max(1, frames)):
            Image.fromarray(pixels(rng, side)).save(Path(folder) / f"{i:04}.png", compress_level=1)
        begin = time.perf_counter()
        if frames:
            visual = video_visual(*read_video(folder, settings, settings.fps), settings)
        else:
            visual = image_visual(read_image(Path(folder) / "0000.png"), settings)
    print(f"read: {time.perf_counter() - begin:.1f} s, grid {' x '.join(map(str, visual.grid))}, {peak()}", flush=True)
    return visual


def peak() -> str:
    """The most memory that the process has held so far (kilobytes on Linux, bytes on macOS)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB:.2f} GiB"


def main(arguments: list[str]) -> None:
    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}: options start with --")
    config = ModelConfig.preset(MODEL.value).replace(dtype=DTYPE.value)
    tower = VisionModel(config, Sharding(make_mesh(MESH.value)))
    print(f"{MODEL.value}, {DTYPE.value}, mesh {MESH.value}, side {SIDE.value}, frames {FRAMES.value}", flush=True)
    visual = read(VisionSettings.from_directory(None, config.vision), SIDE.value, FRAMES.value)
    encoder, begin = VisionEncoder(tower, tower.init_params), time.perf_counter()
    (rows,) = encoder.encode([visual])
    seconds, compiling = time.perf_counter() - begin, encoder.compile_seconds
    if not np.isfinite(rows.astype(np.float32)).all():
        raise UserError("the tower's rows are not finite")
    print(f"tower: {seconds - compiling:.1f} s, compiled in {compiling:.1f} s, {len(rows)} rows, {peak()}")


if __name__ == "__main__":
    command.run(main, USAGE)
