"""Videos to a few resized frames with their times. Only the frames that are looked at are kept, each at its final size."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from qwen35_jax.errors import UserError, reachable
from qwen35_jax.text import one_line
from qwen35_jax.vision_io.images import (
    MAX_PIXELS,
    check_file,
    check_pixels,
    data_url_bytes,
    describe,
    is_data_url,
    local_path,
    read_image,
)
from qwen35_jax.vision_io.remote import is_remote
from qwen35_jax.vision_io.resize import resize, video_size
from qwen35_jax.vision_io.settings import VisionSettings

UNKNOWN_FPS = 24.0  # what the published processor takes where nothing says
MAX_FRAMES = 1_000_000  # of a file, looked at or not
MAX_FILE_BYTES = 16 << 30
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


@dataclasses.dataclass(frozen=True)
class Clip:
    """A video before it is sampled: `count` frames at `fps`; `frames(indices)` yields those (rising), uint8 [H, W, 3].

    `wanted` is how many a second are looked at, where that is asked for with the video.
    """

    count: int
    fps: float
    size: tuple[int, int]
    frames: Callable[[Sequence[int]], Iterator[np.ndarray]]
    wanted: float | None = None


class EndsEarlyError(UserError):
    """A video that gives fewer frames than were counted: `count`."""

    def __init__(self, count: int):
        super().__init__(f"it ends after {count} frames: it is damaged")
        self.count = count


def read_video(source: Any, settings: VisionSettings, fps: float | None = None) -> tuple[np.ndarray, tuple[float, ...]]:
    """(frames uint8 [T, H, W, 3] resized, the seconds of each temporal patch) of a video.

    Args:
        source: a path of a file (through PyAV), a base64 data: URL with one, a path of a folder of pictures in the order of their
            names, or frames: uint8 [T, H, W, 3], or a list of images as `read_image` takes them.
        settings: how many frames are looked at, and how large.
        fps: of the source, for frames and folders; default: 24. Beside a file, which knows its own, it is what Qwen's examples
            mean by it: how many frames a second are looked at, in place of settings.fps.

    The frames of a file are turned upright, as its rotation note has it.

    Raises UserError, one line, for what is no video, has no frames, is too large or is damaged.
    """
    name = describe(source)
    try:
        with _on_disk(source) as source:
            clip = _clip(source, fps)
            try:
                frames, indices = _looked_at(clip, settings)
            except EndsEarlyError as end:  # some packets give no frame, which decoding alone tells
                frames, indices = _looked_at(dataclasses.replace(clip, count=end.count), settings)
    except UserError as error:
        raise UserError(f"video {name}: {error}") from error
    except OSError as error:
        raise UserError(f"video {name}: it cannot be read: {_reason(error)}") from error
    except Exception as error:  # decoders of whatever somebody made raise anything
        raise UserError(f"video {name} cannot be decoded: {one_line(error)}") from error
    return frames, patch_seconds(indices, clip.fps, settings.temporal_patch_size)


def _looked_at(clip: Clip, settings: VisionSettings) -> tuple[np.ndarray, list[int]]:
    """(frames uint8 [T, H, W, 3] resized, their numbers) of those of a clip that are looked at."""
    if not clip.count:
        raise UserError("it has no frames")
    check_pixels(*clip.size)
    indices = sample_frames(clip.count, clip.fps, settings.changed(fps=clip.wanted))
    frames = size = None
    for i, frame in enumerate(clip.frames(indices)):
        if frames is None:  # of frames that are turned, the sides are not those of the file
            size = video_size(len(indices), *frame.shape[:2], settings)
            frames = np.empty((len(indices), *size, 3), np.uint8)
        frames[i] = resize(frame, size)
    return frames, indices


def sample_frames(count: int, fps: float, settings: VisionSettings) -> list[int]:
    """Which of `count` frames at `fps` are looked at: evenly from first to last, as many as settings.fps makes of their time."""
    wanted = int(count / fps * settings.fps)
    wanted = min(max(wanted, settings.min_frames), settings.max_frames, count)
    return np.linspace(0, count - 1, wanted).round().astype(int).tolist()


def patch_seconds(indices: Sequence[int], fps: float, step: int) -> tuple[float, ...]:
    """When each temporal patch of `step` frames is: the mean of its first and last frame's times, the last frame repeated."""
    padded = [*indices, *[indices[-1]] * (-len(indices) % step)]
    return tuple((padded[i] / fps + padded[i + step - 1] / fps) / 2 for i in range(0, len(padded), step))


@contextlib.contextmanager
def _on_disk(source: Any) -> Iterator[Any]:
    """The source; what a data: URL holds as a file."""
    if not is_data_url(source):
        yield source
        return
    with tempfile.NamedTemporaryFile() as file:
        file.write(data_url_bytes(source))
        file.flush()
        yield file.name


def _clip(source: Any, fps: float | None) -> Clip:
    if fps is not None and not (isinstance(fps, int | float | np.number) and 0 < fps <= 1e6):
        raise UserError(f"its fps is {fps!r:.40}; it must be above 0")
    if isinstance(source, str | os.PathLike):
        path = local_path(source)
        if is_folder(source):
            with reachable(path):
                frames = _in_order(path)
            return _pictures(frames, fps or UNKNOWN_FPS)
        return dataclasses.replace(_file_clip(path), wanted=fps)
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 4 or source.shape[3] != 3:
            raise UserError(f"frames must be uint8 [T, H, W, 3], not {source.dtype} {list(source.shape)}")
        return Clip(len(source), fps or UNKNOWN_FPS, source.shape[1:3], lambda indices: (source[i] for i in indices))
    if isinstance(source, list | tuple):
        return _pictures(list(source), fps or UNKNOWN_FPS)
    raise UserError("give a file, a folder of pictures, a list of images or a uint8 array [T, H, W, 3]")


def _in_order(folder: epath.Path) -> list[epath.Path]:
    """The pictures of a folder; numbers in their names count as numbers."""

    def key(path: epath.Path) -> list:
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]

    return sorted((p for p in folder.iterdir() if p.suffix.lower() in PICTURES), key=key)


def _pictures(sources: list, fps: float) -> Clip:
    """Frames that are images of their own."""
    if len(sources) > MAX_FRAMES:
        raise UserError(f"it has {len(sources):,} frames; at most {MAX_FRAMES:,} are possible")
    size = read_image(sources[0]).shape[:2] if sources else (0, 0)

    def frames(indices: Iterable[int]) -> Iterator[np.ndarray]:
        for i in indices:
            pixels = read_image(sources[i])
            if pixels.shape[:2] != size:
                shape = f"{pixels.shape[1]} x {pixels.shape[0]}"
                raise UserError(f"frame {i} is {shape} pixels, the first is {size[1]} x {size[0]}")
            yield pixels

    return Clip(len(sources), fps, size, frames)


def is_folder(source: Any) -> bool:
    """Whether a video is a folder of frames, which have no rate of their own. UserError where that cannot be found out."""
    if not isinstance(source, str | os.PathLike) or is_remote(source) or is_data_url(source):
        return False
    path = local_path(source)
    with reachable(path):
        return path.is_dir()


def check_video_file(path: epath.Path) -> None:
    """UserError where there is no such file, or one that is too large, and where there is nothing to read it with."""
    if "://" in os.fspath(path):
        raise UserError("video files are read from local disks: copy it here first")
    _pyav()
    check_file(path, MAX_FILE_BYTES)


def _file_clip(path: epath.Path) -> Clip:
    check_video_file(path)
    av = _pyav()
    try:
        with _opened(av, path) as container:
            stream = container.streams.video[0]
            fps, size = stream.average_rate or stream.guessed_rate, (stream.height, stream.width)
            if not all(size):
                raise UserError(f"its frames have no size, or more than {MAX_PIXELS:,} pixels, the most that are decoded")
            check_pixels(*size)
            count = _count(container, stream)
    except (av.FFmpegError, UnicodeError) as error:
        raise UserError(f"it cannot be read: {_reason(error)}") from error
    return Clip(count, float(fps or UNKNOWN_FPS), size, lambda indices: _decoded(av, path, indices, size))


def _pyav():
    try:
        return importlib.import_module("av")
    except ImportError as error:
        raise UserError("reading video files needs PyAV: pip install 'qwen35_jax[video]', or give a folder of frames") from error


def _opened(av, path: epath.Path):
    """The container, which has a video stream. Only local files: FFmpeg would follow what a playlist names.

    No frame may be larger than MAX_PIXELS, neither of those that FFmpeg decodes to find out what is in the file.
    """
    limit = {"max_pixels": str(MAX_PIXELS)}
    container = av.open(f"file:{os.fspath(path)}", options={"protocol_whitelist": "file"} | limit)
    streams = container.streams.video
    if streams and streams[0].codec_context is not None:
        streams[0].codec_context.options = limit
        return container
    container.close()
    raise UserError("its video is of a kind that this FFmpeg has no decoder for" if streams else "it has no video in it")


def _count(container, stream) -> int:
    """Frames of a file, counted without decoding: what its header says need not be true.

    What an edit list has cut off is decoded for what follows it, but not shown.
    """
    count = 0
    for packet in container.demux(stream):
        count += packet.size > 0 and not packet.is_discard
        if count > MAX_FRAMES:
            raise UserError(f"it has more than {MAX_FRAMES:,} frames")
    return count


def _decoded(av, path: epath.Path, indices: Sequence[int], size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Frames `indices` (rising) as uint8 [H, W, 3], upright: in quarter turns, as the file notes it with the first one.

    EndsEarlyError where the file has fewer.
    """
    wanted, turns = iter(indices), None
    target, i = next(wanted), -1
    try:
        with _opened(av, path) as container:
            container.streams.video[0].thread_type = "AUTO"
            for i, frame in enumerate(container.decode(video=0)):
                if (frame.height, frame.width) != size:
                    raise UserError(f"frame {i} is {frame.width} x {frame.height} pixels, the first {size[1]} x {size[0]}")
                turns = round(frame.rotation / 90) if turns is None else turns  # counterclockwise, as NumPy's
                while i == target:
                    yield np.rot90(frame.to_ndarray(format="rgb24"), turns)
                    target = next(wanted, -1)
                if target < 0:
                    return
        raise EndsEarlyError(i + 1)
    except (av.FFmpegError, UnicodeError) as error:
        raise UserError(f"it cannot be decoded: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or one_line(error)
