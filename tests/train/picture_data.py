"""Chats with pictures for the tests of training: files beside a JSONL file, and the configuration of a small run on them."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from qwen35_jax.train.config import default_config
from tests.vision_checkpoint import picture, write_checkpoint

LENGTH, ROWS, PATCHES, PATCH_ROWS = 96, 8, 64, 8


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def chat(question, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def image(source) -> dict:
    return {"type": "image", "image": source}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def write_chats(folder: Path) -> Path:
    """chats.jsonl with two dozen documents: images, a folder of frames, lists, data URLs, several pictures, text."""
    (folder / "pictures").mkdir(parents=True)
    for i in range(6):
        (folder / "pictures" / f"{i}.png").write_bytes(png(picture(16 + 8 * (i % 3), 24 + 8 * (i % 2), i)))
    (folder / "clip").mkdir()
    for i in range(4):
        (folder / "clip" / f"{i}.png").write_bytes(png(picture(16, 16, 20 + i)))
    url = "Data:image/png;base64," + base64.b64encode(png(picture(16, 16, 9))).decode()
    lines = [chat([image(f"pictures/{i % 6}.png"), text(f"Which is it, {i}?")], f"It is number {i}.") for i in range(12)]
    lines += [chat([{"type": "video", "video": "clip", "fps": 2}, text("Where?")], "To the left.")] * 2
    frames = [f"clip/{i}.png" for i in range(3)]
    lines.append(chat([text("Look: "), {"type": "video", "video": frames, "fps": 2}, image(f"{folder}/pictures/1.png")], "Yes."))
    lines.append(chat([{"type": "image_url", "image_url": {"url": url}}, image("pictures/2.png"), text("Same?")], "No."))
    lines += [chat(f"What is {i} + 1?", f"{i + 1}") for i in range(6)] + [{"text": "Once upon a time there was a cat. " * 3}]
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def picture_config(folder: Path, **changes):
    """A small run in float32 on `write_chats` and `write_checkpoint` (one unit), both made in `folder` where not there yet."""
    c = default_config()
    c.model.source = str(folder / "model")
    if not (folder / "model").exists():
        write_checkpoint(folder / "model", layers=2)
        write_chats(folder)
    c.dtype, c.remat, c.steps = "float32", "none", 4
    c.data.train = (str(folder / "chats.jsonl"),)
    c.data.sequence_length, c.data.batch_size, c.data.patches, c.data.patch_rows = LENGTH, ROWS, PATCHES, PATCH_ROWS
    c.optimizer.warmup_steps, c.optimizer.learning_rate = 1, 3e-3
    for field, value in changes.items():
        *path, name = field.split("__")
        node = c
        for key in path:
            node = node[key]
        node[name] = value
    return c
