"""Images from wherever they are to uint8 RGB pixels. Sizes are checked before anything is decoded."""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import io
import os
import re
import warnings
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import numpy as np
from etils import epath
from PIL import Image, ImageOps

from qwen35_jax.errors import UserError, reachable
from qwen35_jax.text import one_line
from qwen35_jax.vision_io.resize import check_aspect

MAX_BYTES = 256 << 20  # of a file
MAX_PIXELS = 1 << 26  # of a decoded image: 8192 x 8192, 200 MB as RGB
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
DATA_URL = re.compile(r"data:(?P<kind>[\w.+-]+/[\w.+-]+)?(;[\w.+-]+=[\w.+-]+)*;base64,", re.ASCII | re.IGNORECASE)
SHOWN = 160  # characters of a source in an error


@dataclasses.dataclass(frozen=True)
class Copy:
    """The path of a file with what another source holds; errors name that source."""

    path: str
    name: str

    def __fspath__(self) -> str:
        return self.path


def read_image(source: Any) -> np.ndarray:
    """uint8 [H, W, 3] of an image.

    Args:
        source: a path (local or gs://), a file:// or base64 data: URL, the bytes of a file, a PIL image, or an array: uint8
            [H, W] (grey), [H, W, 3] or [H, W, 4].

    Of an animation the first frame is taken. The orientation that a camera notes (EXIF) is applied; what is transparent is
    laid on white. Raises UserError, one line, for what is no image, is too large (checked before decoding) or is damaged, for
    sides that differ more than 200 times, and for remote URLs.
    """
    if isinstance(source, np.ndarray):
        return _checked_array(source)
    name = describe(source)
    try:
        return _pixels(source if isinstance(source, Image.Image) else _opened(source, name))
    except UserError as error:
        raise UserError(f"image {name}: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise UserError(f"image {name} is no image that can be read ({', '.join(FORMATS)})") from error
    except Exception as error:  # decoders of whatever somebody made raise anything
        raise UserError(f"image {name} cannot be decoded: {one_line(error)}") from error


def is_data_url(source: object) -> bool:
    """Whether a source is a URL that holds its content itself."""
    return isinstance(source, str) and source[:5].lower() == "data:"


def describe(source: Any) -> str:
    """A short name of a source for errors."""
    if isinstance(source, Copy):
        return source.name
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        if is_data_url(source):
            return "in a data: URL"
        return text if len(text) <= SHOWN and text.isprintable() else f"{text[:SHOWN]!r}…"
    if isinstance(source, bytes | bytearray | memoryview):
        return f"of {len(source)} bytes"
    return f"({type(source).__name__})"


def local_path(source: str | os.PathLike) -> epath.Path:
    """The path that a text names. UserError for URLs of other hosts: nothing is fetched from the network here."""
    text = os.fspath(source)
    if text[:7].lower() == "file://":
        text = _path_of_url(text)
    elif re.match(r"(?!gs:|s3:)[A-Za-z][A-Za-z0-9+.-]+://", text):
        raise UserError("remote URLs are not fetched unless allow_remote_media is set, and then of https alone: give the file")
    if not text or "\0" in text:
        raise UserError("the path is empty" if not text else "the path holds a zero byte")
    return epath.Path(text)


def _path_of_url(url: str) -> str:
    """Of a file: URL, its %-encoding undone. UserError where it is none of this machine."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise UserError(f"the file: URL is malformed: {one_line(error)}") from error
    if parts.netloc.lower() not in ("", "localhost"):
        raise UserError(f"the file: URL names the host {parts.netloc[:SHOWN]!r}: write file:///PATH for a file of this one")
    if "?" in url or "#" in url:
        raise UserError("the file: URL has a ? or a #: of a file's name write them %3F and %23")
    return unquote(parts.path, errors="surrogateescape")


def _opened(source: Any, name: str) -> Image.Image:
    if is_data_url(source):
        data = data_url_bytes(source)
    elif isinstance(source, str | os.PathLike):
        data = _file(local_path(source))
    elif isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
    else:
        raise UserError("give a path, a data: URL, bytes, a PIL image or a uint8 array [H, W, 3]")
    if not data:
        raise UserError("it is empty")
    _check_bytes(len(data), MAX_BYTES)
    with warnings.catch_warnings():  # Pillow's limits are wider: of what it warns of, `check_pixels` says what is wrong
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(data), formats=FORMATS)


def check_image_file(path: epath.Path) -> None:
    """UserError where there is no such file, or one that is too large to be an image."""
    with readable(path):
        if path.is_dir():
            raise UserError("that is a directory; give a file (frames of a video go behind --video)")
    check_file(path, MAX_BYTES)


def check_file(path: epath.Path, most: int) -> None:
    """UserError where there is no such file, or one of more than `most` bytes, or what may have no end: a pipe, a device."""
    with readable(path):
        length = path.stat().length
        if "://" not in os.fspath(path) and not os.path.isfile(path):
            raise UserError("it is no regular file: write what it gives to one first")
    _check_bytes(length, most)


def _file(path: epath.Path) -> bytes:
    """The content, of which no more is read than may be there, whatever the file's length is said to be."""
    check_image_file(path)
    with readable(path), path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


@contextlib.contextmanager
def readable(path: epath.Path) -> Iterator[None]:
    """UserError where what is inside fails because the path leads to nothing that can be read."""
    with reachable(path):
        try:
            yield
        except FileNotFoundError as error:
            raise UserError("there is no such file") from error
        except OSError as error:
            raise UserError(f"it cannot be read: {error.strerror or one_line(error)}") from error


def data_url_bytes(url: str) -> bytes:
    """What a base64 data: URL holds: its characters may be %-encoded, with whitespace between and without the = at the end.
    UserError where it is another kind of URL, too large or damaged."""
    head = DATA_URL.match(url)
    if head is None:
        raise UserError("the data: URL is not base64 (such as data:image/png;base64,…)")
    _check_bytes((len(url) - head.end()) // 4 * 3, MAX_BYTES)
    try:
        text = unquote_to_bytes(url[head.end() :]).translate(None, b" \t\n\f\r")
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"its base64 is damaged: {one_line(error)}") from error


def _check_bytes(count: int, most: int) -> None:
    if count > most:
        raise UserError(f"it has {count:,} bytes; at most {most:,} are read")


def check_pixels(height: int, width: int) -> None:
    """UserError for a picture of no pixels, of too many, or of sides that differ too much."""
    if height * width > MAX_PIXELS:
        raise UserError(f"it is {width} x {height} pixels; at most {MAX_PIXELS:,} are decoded")
    if not height * width:
        raise UserError("it has no pixels")
    check_aspect(height, width)


def _pixels(image: Image.Image) -> np.ndarray:
    check_pixels(image.height, image.width)
    deep = image.mode.startswith("I;16") or (image.format, image.mode) == ("PPM", "I")  # of which Pillow makes 16 bits
    image = ImageOps.exif_transpose(image)
    if deep:
        return np.repeat((np.asarray(image, np.uint16) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise UserError(f"its values have 32 bits (mode {image.mode}): convert it to 8 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))


def _checked_array(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
        raise UserError(f"an image array must be uint8 [H, W, 3], not {pixels.dtype} {list(pixels.shape)}")
    try:
        check_pixels(*pixels.shape[:2])
    except UserError as error:
        raise UserError(f"image array {list(pixels.shape)}: {error}") from error
    return np.ascontiguousarray(pixels) if pixels.shape[2:] == (3,) else _pixels(Image.fromarray(pixels))
