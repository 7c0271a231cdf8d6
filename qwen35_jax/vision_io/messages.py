"""Pictures in chats: the parts of messages that are images and videos, and the placeholders that stand for them in a prompt."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwen35_jax.config import ModelConfig
from qwen35_jax.errors import UserError
from qwen35_jax.vision_io.images import MAX_BYTES, Copy, check_image_file, describe, is_data_url, local_path, read_image
from qwen35_jax.vision_io.patches import Visual, image_visual, video_visual
from qwen35_jax.vision_io.remote import fetch, is_remote
from qwen35_jax.vision_io.resize import image_size, resize
from qwen35_jax.vision_io.settings import VisionSettings
from qwen35_jax.vision_io.video import check_video_file, is_folder, read_video

START, END = "<|vision_start|>", "<|vision_end|>"
PADS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
MARK = re.compile("|".join(map(re.escape, (START + PADS["video"] + END, PADS["video"], PADS["image"]))))
# What a part may say about its picture; what else qwen-vl-utils knows is refused, not ignored.
ASKED = {"image": ("min_pixels", "max_pixels"), "video": ("min_pixels", "max_pixels", "fps", "max_frames")}
NOT_DONE = (
    *("resized_height", "resized_width", "total_pixels", "nframes", "min_frames", "max_frames", "fps"),
    *("video_start", "video_end", "sample_fps", "raw_fps"),
)
SOURCES = {"image": ("image", "image_url"), "video": ("video", "video_url")}


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image or video as a message names it.

    fps: as `read_video` takes it. The others are limits beside the settings': pixels of an image or of each frame, frames.
    """

    kind: str
    source: Any
    fps: float | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_frames: int | None = None


def collect_pictures(messages: Any) -> tuple[Any, list[Picture]]:
    """(messages whose pictures are bare marks for the template, the pictures in order); without any, the messages as they are.

    A picture is a part of a message's content, as OpenAI and the published templates have it: {"type": "image", "image": X},
    {"type": "image_url", "image_url": {"url": X}}, {"type": "video", "video": X}, or video_url; X is whatever `read_image` and
    `read_video` take, or the Visual that was made of one before. Beside it may stand min_pixels, max_pixels, and beside a video
    fps (as `read_video` has it) and max_frames. UserError, with its place, for a part without a source, and for what else Qwen's
    tools know beside one.
    """
    pictures: list[Picture] = []

    def part(value: Any, where: str) -> Any:
        kind = _kind(value)
        if kind is None:
            return value
        pictures.append(Picture(kind, _source(value, kind, where), **_asked(value, kind, where)))
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


def _asked(part: Mapping, kind: str, where: str) -> dict[str, Any]:
    for name in NOT_DONE:
        if part.get(name) is not None and name not in ASKED[kind]:
            raise UserError(f"{where}: {name} is not done for {kind}s; there are {', '.join(ASKED[kind])}")
    asked = {name: part[name] for name in ASKED[kind] if part.get(name) is not None}
    for name, value in asked.items():
        if name != "fps" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UserError(f"{where}: {name} is {value!r:.60}; expected a whole number, 1 or more")
    if asked.get("min_pixels", 0) > asked.get("max_pixels", math.inf):
        raise UserError(f"{where}: min_pixels is {asked['min_pixels']}, more than max_pixels, {asked['max_pixels']}")
    return asked


def _changed(settings: VisionSettings, picture: Picture) -> VisionSettings:
    """With what the picture asks for: of two limits the smaller one holds."""
    limits = {
        name: min(limit for limit in (getattr(settings, name), getattr(picture, name)) if limit is not None)
        for name in ("max_pixels", "max_frames")
        if getattr(picture, name) is not None
    }
    try:
        return settings.changed(min_pixels=picture.min_pixels, **limits)
    except UserError as error:
        raise UserError(f"{picture.kind} {describe(picture.source)}: {error}") from error


def check_source(picture: Picture, allow_remote_media: bool) -> None:
    """UserError for what is wrong with a picture before it is read: a file that is not there, or is too large, a URL that is not
    fetched, a video file without PyAV."""
    several = isinstance(picture.source, list | tuple)
    film = picture.kind == "video" and not several
    for source in picture.source if several else [picture.source]:
        elsewhere = is_data_url(source) or (allow_remote_media and is_remote(source))
        if elsewhere or not isinstance(source, str | os.PathLike):
            continue
        try:
            path = local_path(source)
            if not film:
                check_image_file(path)
            elif not is_folder(source):
                check_video_file(path)
        except UserError as error:
            raise UserError(f"{picture.kind} {describe(source)}: {error}") from error


def read_picture(picture: Picture, settings: VisionSettings) -> Visual:
    """Reads, resizes and cuts an image or a video, if it is no Visual yet. UserError, one line, for whatever is wrong with it."""
    if isinstance(picture.source, Visual):
        if picture.source.kind != picture.kind:
            raise UserError(f"what is given as {picture.kind} was read as {picture.source.kind}")
        for name in ASKED["video"]:
            if getattr(picture, name) is not None:
                raise UserError(f"{name} is given beside what was read before: say it where the {picture.kind} is read")
        return picture.source
    settings = _changed(settings, picture)
    with _fetched(picture, settings) as source:
        if picture.kind == "video":
            return video_visual(*read_video(source, settings, picture.fps), settings)
        pixels = read_image(source)
    return image_visual(resize(pixels, image_size(*pixels.shape[:2], settings)), settings)


@contextlib.contextmanager
def _fetched(picture: Picture, settings: VisionSettings) -> Iterator[Any]:
    """The picture's source, its URLs, if they may be fetched, replaced by files with what is behind them: together no more bytes
    than one file may have."""
    several = isinstance(picture.source, list | tuple)
    sources = list(picture.source) if several else [picture.source]
    if not settings.allow_remote_media or not any(map(is_remote, sources)):
        yield picture.source
        return
    room = MAX_BYTES
    with tempfile.TemporaryDirectory() as folder:
        for i, source in enumerate(sources):
            if is_remote(source):
                path = pathlib.Path(folder) / str(i)
                try:
                    data = fetch(source, MAX_BYTES)
                    room -= len(data)
                    if room < 0:
                        raise UserError(f"with it the frames have more than {MAX_BYTES:,} bytes, the most that are fetched")
                    path.write_bytes(data)
                except UserError as error:
                    raise UserError(f"{picture.kind} {describe(source)}: {error}") from error
                sources[i] = Copy(str(path), describe(source))
        yield sources if several else sources[0]


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


def check_tokens(token_ids: Sequence[int], visuals: Sequence[Visual], config: ModelConfig) -> None:
    """UserError where the tokenizer's placeholders are not those of the model: with another model's tokenizer."""
    for kind, token in (("image", config.image_token_id), ("video", config.video_token_id)):
        wanted = sum(v.tokens for v in visuals if v.kind == kind)
        if visuals and token_ids.count(token) != wanted:
            raise UserError(
                f"this tokenizer's {PADS[kind]} is not the model's {kind}_token_id ({token}): pictures cannot be placed"
            )
