"""Prompts with pictures: from chat messages to token ids and patches, and from the tower's rows to the arrays of a step."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen35_jax.config import ModelConfig
from qwen35_jax.errors import UserError
from qwen35_jax.generate.vision import VisionEncoder
from qwen35_jax.model import FrameQueue, Span, vision_positions
from qwen35_jax.vision_io import PADS, Picture, VisionSettings, Visual, read_picture

VISION_OPTIONS = ("max_pixels", "fps", "max_frames", "allow_remote_media")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prompt ready for the model: token ids with the placeholders of all pictures, and the pictures in their order."""

    token_ids: list[int]
    visuals: tuple[Visual, ...] = ()


def content_with_pictures(text: str, pictures: Sequence[Picture]) -> str | list[dict[str, Any]]:
    """A message's content: the pictures in place of the marks <image> and <video>, those of a kind without marks in front.

    Without pictures the text as it is, marks included. UserError for more or fewer marks of a kind than pictures.
    """
    if not pictures:
        return text
    pieces = re.split("(<image>|<video>)", text)
    waiting = {kind: [p for p in pictures if p.kind == kind] for kind in PADS}
    for kind, own in waiting.items():
        marks = pieces.count(f"<{kind}>")
        if marks and marks != len(own):
            raise UserError(f"the prompt has {marks} <{kind}> marks for {len(own)} {kind}s: write as many, or none")
    unmarked = [p for p in pictures if f"<{p.kind}>" not in pieces]
    parts = [_part(p) for p in unmarked]
    for piece in filter(None, pieces):
        kind = piece[1:-1] if piece in ("<image>", "<video>") else None
        parts.append(_part(waiting[kind].pop(0)) if kind else {"type": "text", "text": piece})
    return parts


def _part(picture: Picture) -> dict[str, Any]:
    """As a message names it."""
    return {"type": picture.kind, picture.kind: picture.source} | ({} if picture.fps is None else {"fps": picture.fps})


def as_pictures(images: Sequence, videos: Sequence) -> list[Picture]:
    """Images and videos given apart; a video may come as (frames, fps)."""
    pictures = [Picture("image", image) for image in images]
    for video in videos:
        pair = isinstance(video, tuple) and len(video) == 2 and isinstance(video[1], int | float | np.number)
        pictures.append(Picture("video", *(video if pair else (video,))))
    return pictures


@dataclasses.dataclass(frozen=True)
class Placed:
    """One prompt's pictures at their places: M-RoPE positions int32 [3, T], what added to a later token's index is its position,
    and the rows of the vision tower for the tokens of each span."""

    positions: np.ndarray
    offset: int
    spans: list[Span]
    rows: list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Vision:
    """What a model that sees has more: its tower, and how its pictures are looked at.

    `read_settings` is called when the first picture comes: errors in processor files do not concern text. `seen`: the tower's
    rows of the last prompts' pictures, by `Visual.digest`: each turn of a chat brings those before it.
    """

    encoder: VisionEncoder
    read_settings: Callable[[], VisionSettings]
    seen: dict[bytes, np.ndarray] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @functools.cached_property
    def settings(self) -> VisionSettings:
        """UserError where the checkpoint's files ask for what is not done here."""
        return self.read_settings()

    def read(self, pictures: Sequence[Picture], **options) -> list[Visual]:
        """Reads, resizes and cuts pictures; options: those of `VisionSettings.changed`. UserError for what is wrong with one."""
        settings = self.settings.changed(**options)
        return [read_picture(p, settings) for p in pictures]

    def place(self, prompts: Sequence[Prepared]) -> list[Placed | None]:
        """Each prompt's pictures through the vision tower, all prompts' together; None for a prompt of text."""
        rows = iter(self.encode([v for p in prompts for v in p.visuals]))
        taken = [[next(rows) for _ in p.visuals] for p in prompts]
        config = self.encoder.model.config
        return [place(p.token_ids, p.visuals, own, config) if own else None for p, own in zip(prompts, taken, strict=True)]

    def encode(self, visuals: Sequence[Visual]) -> list[np.ndarray]:
        """`VisionEncoder.encode`; a picture that stands there twice, or was in the last call with pictures, is taken from there.

        Not with several processes: they run the tower together, and must not each decide by what it has read.
        """
        if not visuals or jax.process_count() > 1:
            return self.encoder.encode(visuals)
        pictures = {v.digest: v for v in visuals}
        for digest in self.seen.keys() - pictures.keys():
            del self.seen[digest]
        new = [digest for digest in pictures if digest not in self.seen]
        self.seen.update(zip(new, self.encoder.encode([pictures[digest] for digest in new]), strict=True))
        return [self.seen[v.digest] for v in visuals]


def place(token_ids: Sequence[int], visuals: Sequence[Visual], rows: list[np.ndarray], config: ModelConfig) -> Placed:
    """`rows` are the tower's, of each visual. UserError where placeholders and visuals do not fit together."""
    queue = frame_queue(visuals, config)
    positions, offset, spans = vision_positions(np.asarray(token_ids), queue, config)
    queue.finish()
    return Placed(positions, offset, spans, rows)


def place_rows(
    tokens: np.ndarray, segments: np.ndarray, visuals: Sequence[Visual], rows: list[np.ndarray], config: ModelConfig
) -> list[Placed]:
    """As `place`, for [B, T] tokens of packed documents: the visuals are those of all rows, in order, and each document's
    positions count from 0."""
    queue, placed = frame_queue(visuals, config), []
    for row, ids in zip(tokens, segments, strict=True):
        positions, spans = np.zeros((3, len(row)), np.int32), []
        for segment in np.unique(ids[ids > 0]):
            (index,) = np.nonzero(ids == segment)
            own, _, found = vision_positions(row[index], queue, config)
            positions[:, index] = own
            spans += [dataclasses.replace(span, start=span.start + int(index[0])) for span in found]
        placed.append(Placed(positions, 0, spans, rows))
    queue.finish()
    return placed


def frame_queue(visuals: Sequence[Visual], config: ModelConfig) -> FrameQueue:
    return FrameQueue([v.kind for v in visuals], [v.grid for v in visuals], config.vision.spatial_merge_size)


def step_arrays(placed: Sequence[Placed | None], batch: int, start: int, length: int, config: ModelConfig) -> dict:
    """The visual argument of a step (see `steps.abstract_visual`) for tokens `start` to `start + length` of each prompt; None is
    a prompt of text. Rows beyond the prompts are dead."""
    arrays = {
        "rows": np.zeros((batch, length, config.hidden_size), jnp.dtype(config.dtype)),
        "mask": np.zeros((batch, length), bool),
        "positions": np.broadcast_to(np.arange(start, start + length, dtype=np.int32), (3, batch, length)).copy(),
        "offset": np.zeros(batch, np.int32),
    }
    for b, prompt in enumerate(placed):
        if prompt is None:
            continue
        part = prompt.positions[:, start : start + length]
        arrays["positions"][:, b, : part.shape[1]] = part
        arrays["offset"][b] = prompt.offset
        for span in prompt.spans:
            first, last = max(span.start, start), min(span.start + span.count, start + length)
            if first < last:
                row = span.row + first - span.start
                arrays["rows"][b, first - start : last - start] = prompt.rows[span.visual][row : row + last - first]
                arrays["mask"][b, first - start : last - start] = True
    return arrays
