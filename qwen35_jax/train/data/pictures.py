"""Pictures of a chat on their way into a batch: read, cut into patches, packed into rows of patches, and told where they go."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from qwen35_jax.config import ModelConfig
from qwen35_jax.errors import UserError
from qwen35_jax.model import FrameQueue, vision_positions
from qwen35_jax.vision_io import Picture, VisionSettings, Visual, check_tokens, is_data_url, is_remote, patch_places, read_picture

READ_AHEAD_BYTES = 1 << 30  # of patches of documents that are read before their turn


@dataclasses.dataclass(frozen=True)
class Pictures:
    """What a document shows, and where.

    Attributes:
        patches: uint8 [N, channels * frames * height * width] of all frames, one after the other.
        frames: (height, width) of each, in patches.
        rows: int32 [T], the row of the vision tower, counted over the document's own, that takes the place of a token; or -1.
        positions: int32 [3, T], M-RoPE positions: time, height, width.
    """

    patches: np.ndarray
    frames: tuple[tuple[int, int], ...]
    rows: np.ndarray
    positions: np.ndarray

    @property
    def sizes(self) -> list[int]:
        """Patches of each frame."""
        return [height * width for height, width in self.frames]

    def cut(self, end: int) -> Pictures:
        """Of the first `end` tokens; the frames stay, whether tokens are left of them or not."""
        return dataclasses.replace(self, rows=self.rows[:end], positions=self.positions[:, :end])


@dataclasses.dataclass(frozen=True)
class PatchShape:
    """The rows of patches of a batch: `rows` of `length` patches of `width` numbers, in `parts` that are run one after the other;
    `merge` patches on a side become one row of the text model."""

    rows: int
    length: int
    width: int
    merge: int
    parts: int = 1

    def empty(self) -> list[PatchRows]:
        """Rows to fill, apart for each part."""
        return [PatchRows(self) for _ in range(self.parts)]

    def check(self, sizes: Sequence[int]) -> None:
        """UserError where frames of these sizes never fit."""
        if sizes and max(sizes) > self.length:
            text = f"a picture has {max(sizes)} patches, but a row holds data.patches ({self.length})"
            raise UserError(f"{text}: raise that, or lower data.max_pixels")
        if _first_fit(sizes, np.zeros(self.rows // self.parts, np.int64), self.length) is None:
            text = f"its pictures have {sum(sizes)} patches, more than fit in the {self.rows // self.parts} rows of {self.length}"
            raise UserError(f"{text} that are run at once: raise data.patch_rows, or lower data.max_pixels or data.max_frames")


class PatchRows:
    """Rows of patches being filled, those of one part: I rows, P patches, frames behind each other with padding behind."""

    def __init__(self, shape: PatchShape):
        count = shape.rows // shape.parts
        self._shape = shape
        self._patches = np.zeros((count, shape.length, shape.width), np.uint8)
        self._places = np.ones((count, shape.length, 4), np.int32)
        self._frames = np.zeros((count, shape.length), np.int32)
        self._used = np.zeros(count, np.int64)
        self._numbers = np.zeros(count, np.int32)

    def fits(self, pictures: Pictures) -> bool:
        return _first_fit(pictures.sizes, self._used, self._shape.length) is not None

    def add(self, pictures: Pictures) -> np.ndarray:
        """Place all frames; returns where their rows lie, int32 [rows of the document], counted over all rows after merging."""
        merged, start, found = self._shape.merge**2, 0, []
        fit = _first_fit(pictures.sizes, self._used, self._shape.length)
        for (row, place), (height, width) in zip(fit, pictures.frames, strict=True):
            size = height * width
            here = slice(place, place + size)
            self._numbers[row] += 1
            self._patches[row, here] = pictures.patches[start : start + size]
            self._places[row, here] = patch_places(height, width, self._shape.merge)
            self._frames[row, here] = self._numbers[row]
            self._used[row] = here.stop
            first = (row * self._shape.length + place) // merged
            found.append(np.arange(first, first + size // merged, dtype=np.int32))
            start += size
        return np.concatenate(found)

    def arrays(self) -> dict[str, np.ndarray]:
        """`patches` uint8 [I, P, width], `places` int32 [I, P, 4] and `frames` int32 [I, P], as the vision tower takes them."""
        return {"patches": self._patches, "places": self._places, "frames": self._frames}


def _first_fit(sizes: Sequence[int], used: np.ndarray, length: int) -> list[tuple[int, int]] | None:
    """(row, place) of each frame in the first row with room for it; None if one has none."""
    used, found = used.copy(), []
    for size in sizes:
        row = int(np.argmax(used + size <= length))
        if used[row] + size > length:
            return None
        found.append((row, int(used[row])))
        used[row] += size
    return found


@dataclasses.dataclass(frozen=True)
class PictureReader:
    """Reads the pictures of chats for a model: how large they may be, and the rows of patches that they must fit."""

    config: ModelConfig
    settings: VisionSettings
    shape: PatchShape

    @property
    def read_ahead(self) -> int:
        """How many documents may be read before their turn, as far as memory goes; at least 4."""
        largest = self.shape.rows // self.shape.parts * self.shape.length * self.shape.width
        return max(4, READ_AHEAD_BYTES // largest)

    def read(self, pictures: Sequence[Picture], folder: str) -> list[Visual]:
        """The pictures' patches; relative paths count from `folder`. UserError for what is wrong with one of them."""
        visuals = [read_picture(_located(p, folder), self.settings) for p in pictures]
        self.shape.check([height * width for v in visuals for height, width in _frames(v)])
        return visuals

    def place(self, tokens: np.ndarray, visuals: Sequence[Visual]) -> Pictures | None:
        """Where the visuals go in a document's tokens, whose placeholders are expanded. None for a document of text."""
        if not visuals:
            return None
        check_tokens(tokens.tolist(), visuals, self.config)
        queue = FrameQueue([v.kind for v in visuals], [v.grid for v in visuals], self.shape.merge)
        positions, _, spans = vision_positions(tokens, queue, self.config)
        queue.finish()
        first = np.cumsum([0, *(v.tokens for v in visuals)])
        rows = np.full(len(tokens), -1, np.int32)
        for span in spans:
            rows[span.start : span.start + span.count] = first[span.visual] + span.row + np.arange(span.count)
        frames = tuple(frame for v in visuals for frame in _frames(v))
        return Pictures(np.concatenate([v.patches for v in visuals]), frames, rows, positions)

    def is_placeholder(self, tokens: np.ndarray) -> np.ndarray:
        """bool [T]: tokens in whose place a picture may stand; nobody is asked to say them."""
        return (tokens == self.config.image_token_id) | (tokens == self.config.video_token_id)


def _frames(visual: Visual) -> list[tuple[int, int]]:
    return [visual.grid[1:]] * visual.grid[0]


def _located(picture: Picture, folder: str) -> Picture:
    """The picture with paths that are relative to `folder` made whole."""

    def whole(source: Any) -> Any:
        if isinstance(source, list):
            return [whole(part) for part in source]
        if is_remote(source):
            raise UserError(f"{source[:80]!r}: nothing is fetched in training; download the picture, and give its path")
        if not isinstance(source, str) or is_data_url(source) or re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source):
            return source
        return os.fspath(epath.Path(folder) / source)

    return dataclasses.replace(picture, source=whole(picture.source))
