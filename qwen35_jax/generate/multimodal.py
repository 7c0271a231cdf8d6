"""Prompts with pictures: from chat messages to token ids and patches, and from the tower's rows to the arrays of a step."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from qwen35_jax.config import ModelConfig
from qwen35_jax.errors import UserError
from qwen35_jax.generate.vision import VisionEncoder
from qwen35_jax.model import FrameQueue, Span, vision_positions
from qwen35_jax.vision_io import VisionSettings, Visual, image_size, image_visual, read_image, read_video, resize, video_visual

START, END = "<|vision_start|>", "<|vision_end|>"
VISION_OPTIONS = ("max_pixels", "fps", "max_frames")
PADS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
MARK = re.compile("|".join(map(re.escape, (START + PADS["video"] + END, PADS["video"], PADS["image"]))))
SOURCES = {"image": ("image", "image_url"), "video": ("video", "video_url")}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prompt ready for the model: token ids with the placeholders of all pictures, and the pictures in their order."""

    token_ids: list[int]
    visuals: tuple[Visual, ...] = ()


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image or video as a message names it. fps: of the source, where it is frames."""

    kind: str
    source: Any
    fps: float | None = None


def collect_pictures(messages: Any) -> tuple[Any, list[Picture]]:
    """(messages whose pictures are bare marks for the template, the pictures in order); without any, the messages as they are.

    A picture is a part of a message's content, as OpenAI and the published templates have it: {"type": "image", "image": X},
    {"type": "image_url", "image_url": {"url": X}}, {"type": "video", "video": X, "fps": of frames}, or video_url; X is
    whatever `read_image` and `read_video` take.
    """
    pictures: list[Picture] = []

    def part(value: Any, where: str) -> Any:
        kind = _kind(value)
        if kind is None:
            return value
        pictures.append(Picture(kind, _source(value, kind, where), value.get("fps") if kind == "video" else None))
        return {"type": kind}

    def message(value: Any, where: str) -> Any:
        content = value.get("content") if isinstance(value, Mapping) else None
        if not isinstance(content, list | tuple):
            return value
        return {**value, "content": [part(p, f"{where}.content[{i}]") for i, p in enumerate(content)]}

    if not isinstance(messages, list | tuple):
        return messages, []
    bare = [message(m, f"messages[{i}]") for i, m in enumerate(messages)]
    return (bare, pictures) if pictures else (messages, [])


def _kind(part: Any) -> str | None:
    """image | video | None, as the templates tell them apart."""
    if not isinstance(part, Mapping):
        return None
    for kind, names in SOURCES.items():
        if part.get("type") in names or any(name in part for name in names):
            return kind
    return None


def _source(part: Mapping, kind: str, where: str) -> Any:
    source = next((part[name] for name in SOURCES[kind] if part.get(name) is not None), part.get("url"))
    if isinstance(source, Mapping):
        source = source.get("url")
    if source is None:
        raise UserError(f"{where} holds no {kind}: give one under {' or '.join(map(repr, SOURCES[kind]))}")
    return source


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
    parts = [{"type": p.kind, p.kind: p.source} for p in unmarked]
    for piece in filter(None, pieces):
        kind = piece[1:-1] if piece in ("<image>", "<video>") else None
        parts.append({"type": kind, kind: waiting[kind].pop(0).source} if kind else {"type": "text", "text": piece})
    return parts


def as_pictures(images: Sequence, videos: Sequence) -> list[Picture]:
    """Images and videos given apart; a video may come as (frames, fps)."""
    pictures = [Picture("image", image) for image in images]
    for video in videos:
        pair = isinstance(video, tuple) and len(video) == 2 and isinstance(video[1], int | float | np.number)
        pictures.append(Picture("video", *(video if pair else (video,))))
    return pictures


def _read(picture: Picture, settings: VisionSettings) -> Visual:
    if picture.kind == "video":
        return video_visual(*read_video(picture.source, settings, picture.fps), settings)
    pixels = read_image(picture.source)
    return image_visual(resize(pixels, image_size(*pixels.shape[:2], settings)), settings)


def expand(text: str, visuals: Sequence[Visual]) -> str:
    """The prompt with each mark of the template replaced by the placeholders of its picture.

    An image's <|image_pad|> is repeated. A video's <|vision_start|><|video_pad|><|vision_end|> becomes, for each temporal patch,
    its time and such a triple with as many pads as the patch has tokens. UserError for more or fewer marks than pictures.
    """
    waiting = {kind: [v for v in visuals if v.kind == kind] for kind in PADS}
    for kind, pad in PADS.items():
        marks, given = text.count(pad), len(waiting[kind])
        if marks != given:
            raise UserError(f"the prompt has {marks} marks for {kind}s ({pad}), but of {kind}s {given} are given")

    def placeholders(match: re.Match) -> str:
        if match[0] == PADS["image"]:
            return PADS["image"] * waiting["image"].pop(0).tokens
        video = waiting["video"].pop(0)
        triple = START + PADS["video"] * video.frame_tokens + END
        return "".join(f"<{seconds:.1f} seconds>{triple}" for seconds in video.seconds)

    return MARK.sub(placeholders, text)


@dataclasses.dataclass(frozen=True)
class Placed:
    """One prompt's pictures at their places: M-RoPE positions int32 [3, T], what added to a later token's index is its position,
    and the rows of the vision tower for the tokens of each span."""

    positions: np.ndarray
    offset: int
    spans: list[Span]
    rows: list[np.ndarray]


def check_tokens(token_ids: Sequence[int], visuals: Sequence[Visual], config: ModelConfig) -> None:
    """UserError where the tokenizer's placeholders are not those of the model: with another model's tokenizer."""
    for kind, token in (("image", config.image_token_id), ("video", config.video_token_id)):
        wanted = sum(v.tokens for v in visuals if v.kind == kind)
        if visuals and token_ids.count(token) != wanted:
            raise UserError(
                f"this tokenizer's {PADS[kind]} is not the model's {kind}_token_id ({token}): pictures cannot be placed"
            )


@dataclasses.dataclass(frozen=True)
class Vision:
    """What a model that sees has more: its tower, and the sizes its pictures are brought to."""

    encoder: VisionEncoder
    settings: VisionSettings

    def read(self, pictures: Sequence[Picture], **options) -> list[Visual]:
        """Reads, resizes and cuts pictures; options: those of `VisionSettings.changed`. UserError for what is wrong with one."""
        settings = self.settings.changed(**options)
        return [_read(p, settings) for p in pictures]

    def place(self, prompts: Sequence[Prepared]) -> list[Placed | None]:
        """Each prompt's pictures through the vision tower, all prompts' together; None for a prompt of text."""
        rows = iter(self.encoder.encode([v for p in prompts for v in p.visuals]))
        taken = [[next(rows) for _ in p.visuals] for p in prompts]
        config = self.encoder.model.config
        return [place(p.token_ids, p.visuals, own, config) if own else None for p, own in zip(prompts, taken, strict=True)]


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
