"""A checkpoint that sees, for tests without torch: small random weights, the packaged tokenizer, small pictures and videos."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from qwen35_jax.config import ASSETS
from tests.checkpoint.synthetic import canonical_tensors, hf_config, write

# A patch is 4 x 4 pixels and four are one token, so a picture of 16 x 24 pixels is six.
IMAGE, VIDEO = 4075, 4076  # the packaged tokenizer's placeholders
SIZES = {"size": {"shortest_edge": 64, "longest_edge": 4096}}


def write_checkpoint(directory: Path, layers: int = 4, vision: bool = True) -> Path:
    config = hf_config(layers=layers, vision=vision) | {"image_token_id": IMAGE, "video_token_id": VIDEO}
    config["text_config"]["vocab_size"] = 4096
    tensors = {name: (x * np.float32(0.2)).astype(x.dtype) for name, x in canonical_tensors(config, vision=vision).items()}
    write(directory, config, tensors)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(ASSETS / "tiny" / name, directory / name)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (directory / name).write_text(json.dumps(SIZES))
    return directory


def picture(height: int = 16, width: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def write_video(path, count: int, size: tuple[int, int] = (64, 96), fps: int = 8) -> None:
    """Frame i is grey, ten times i."""
    write_frames(path, [np.full((*size, 3), 10 * i, np.uint8) for i in range(count)], fps)


def write_frames(path, frames: list[np.ndarray], fps: int = 8) -> None:
    """A video of uint8 [H, W, 3]; one in twelve stands for itself, the others say what changes."""
    av = pytest.importorskip("av", reason="reading video files needs PyAV (av)")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps, options={"sc_threshold": "1000000000"})
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = *frames[0].shape[:2], "yuv420p", 10_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
