"""Images from every source, and every bad input: read rightly, or one line that says what is wrong."""

from __future__ import annotations

import base64
import io
import os
import urllib.parse
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen35_jax.errors import UserError
from qwen35_jax.vision_io import Picture, VisionSettings, check_source, image_size, read_image, read_video, resize
from qwen35_jax.vision_io import images as images_module

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 40, 3), np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(PIXELS))
    return path


def test_sources(file):
    url = "data:image/png;base64," + base64.b64encode(encoded(PIXELS)).decode()
    for source in (
        file,
        str(file),
        f"file://{file}",
        url,
        encoded(PIXELS),
        bytearray(encoded(PIXELS)),
        Image.fromarray(PIXELS),
        PIXELS,
    ):
        np.testing.assert_array_equal(read_image(source), PIXELS)


def test_file_urls(tmp_path):
    path = tmp_path / "my cat 100%.png"
    path.write_bytes(encoded(PIXELS))
    quoted = urllib.parse.quote(str(path))
    for source in (f"file://{quoted}", f"FILE://LocalHost{quoted}", f"file://{tmp_path}/my cat 100%.png"):
        np.testing.assert_array_equal(read_image(source), PIXELS)
        check_source(Picture("image", source), False)


def test_data_urls():
    """Names in any case, whitespace as mail and YAML break lines, %-encoding, no = at the end."""
    base = base64.b64encode(encoded(PIXELS)).decode()
    assert base.endswith("=") and ("+" in base or "/" in base)
    for url in (
        "DATA:image/PNG;Base64," + base,
        "data:;charset=x;base64," + base.rstrip("="),
        "data:image/png;base64,\n " + "\r\n\t".join(base[i : i + 76] for i in range(0, len(base), 76)),
        "data:image/png;base64," + urllib.parse.quote(base, safe=""),
    ):
        np.testing.assert_array_equal(read_image(url), PIXELS)
        check_source(Picture("image", url), False)
        with pytest.raises(UserError, match="video in a data: URL: "):
            read_video(url[:60], VisionSettings())


def test_formats():
    for kind, options in (("BMP", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("PPM", {}), ("GIF", {})):
        flat = np.full((8, 9, 3), (255, 0, 0), np.uint8)
        np.testing.assert_array_equal(read_image(encoded(flat, kind, **options)), flat, kind)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation):
    """A camera's note on how it was held: the picture comes upright."""
    turned = {
        1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: np.swapaxes(x, 0, 1),
        6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(np.swapaxes(x, 0, 1), 2), 8: np.rot90,
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(read_image(encoded(PIXELS, exif=exif)), turned(PIXELS))


def test_transparency_is_laid_on_white():
    alpha = np.zeros((24, 40, 1), np.uint8)
    alpha[:12], alpha[12:18] = 255, 128
    both = np.concatenate([PIXELS, alpha], axis=2)
    weight = alpha.astype(np.float64) / 255
    expected = PIXELS * weight + 255 * (1 - weight)
    for source in (encoded(both), both):
        np.testing.assert_allclose(read_image(source).astype(np.float64), expected, atol=1)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 200, 10, 20])
    palette.putpixel((1, 2), 1)
    pixels = read_image(encoded(palette, "GIF", transparency=0))
    assert pixels[2, 1].tolist() == [200, 10, 20] and pixels[0, 0].tolist() == [255] * 3


def test_grey_and_deep_and_cmyk():
    grey = RNG.integers(0, 256, (7, 9), np.uint8)
    for source in (grey, encoded(grey)):
        np.testing.assert_array_equal(read_image(source), np.repeat(grey[..., None], 3, axis=2))
    deep = grey.astype(np.uint16) * 257
    np.testing.assert_array_equal(read_image(encoded(deep)), np.repeat(grey[..., None], 3, axis=2))
    for name, values in (("P5", deep.astype(">u2").tobytes()), ("P2", " ".join(map(str, deep.ravel())).encode())):
        pgm = f"{name} 9 7 65535\n".encode() + values
        np.testing.assert_array_equal(read_image(pgm), np.repeat(grey[..., None], 3, axis=2))
    cmyk = Image.new("CMYK", (5, 6), (0, 255, 255, 0))
    assert (read_image(encoded(cmyk, "TIFF")) == [255, 0, 0]).all()


def test_one_pixel():
    assert read_image(np.full((1, 1, 3), 7, np.uint8)).tolist() == [[[7, 7, 7]]]
    assert read_image(encoded(np.full((1, 1, 3), 7, np.uint8))).shape == (1, 1, 3)


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (read_image(data) == [255, 0, 0]).all()


def _bomb(width: int, height: int) -> bytes:
    """A PNG that says it is this large, with a body that says nothing."""
    small = encoded(np.zeros((1, 1, 3), np.uint8))
    head = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + small[24:29]
    return small[:12] + head + zlib.crc32(head).to_bytes(4, "big") + small[33:]


BAD = {
    "truncated JPEG": (encoded(PIXELS, "JPEG", quality=95)[:1500], "cannot be decoded: .*truncated"),
    "truncated PNG": (encoded(PIXELS)[:400], "cannot be decoded"),
    "text": (b"not a picture at all", "is no image that can be read"),
    "empty": (b"", "it is empty"),
    "bomb": (_bomb(60_000, 60_000), r"cannot be decoded: Image size \(3600000000 pixels\) exceeds limit"),
    "nearly a bomb": (_bomb(12_000, 10_000), r"12000 x 10000 pixels; at most 67,108,864 are decoded"),
    "large": (_bomb(9000, 8000), r"9000 x 8000 pixels; at most 67,108,864 are decoded"),
    "strip": (np.zeros((10, 30_000, 3), np.uint8), "30000 x 10 pixels: one side may be at most 200 times the other"),
    "encoded strip": (encoded(np.zeros((30_000, 10, 3), np.uint8)), "10 x 30000 pixels: one side"),
    "no file": ("/nowhere/a.png", "there is no such file"),
    "directory": ("/", "that is a directory"),
    "remote": ("https://example.com/a.png", "remote URLs are not fetched"),
    "other protocol": ("ftp://example.com/a.png", "remote URLs are not fetched"),
    "data URL": ("data:image/png,abc", "not base64"),
    "damaged base64": ("data:image/png;base64,@@@@", "base64 is damaged"),
    "no multiple of four": ("data:image/png;base64,AAAAA", "base64 is damaged"),
    "what base64 lacks": ("data:image/png;base64,AAä=", "base64 is damaged"),
    "another host's file": ("file://host/a.png", "the file: URL names the host 'host': write file:///PATH"),
    "malformed file URL": ("file://[x/a.png", "the file: URL is malformed"),
    "file URL with a query": ("file:///a?b.png", "write them %3F and %23"),
    "zero byte": ("a\0b", "zero byte"),
    "no path": ("", "path is empty"),
    "floats": (np.zeros((4, 4, 3)), r"must be uint8 \[H, W, 3\], not float64 \[4, 4, 3\]"),
    "two channels": (np.zeros((4, 4, 2), np.uint8), r"must be uint8"),
    "nothing in it": (np.zeros((0, 4, 3), np.uint8), "has no pixels"),
    "a number": (7, "give a path"),
    "32 bits": (Image.new("F", (4, 4)), "32 bits"),
    "whole numbers of 32 bits": (encoded(Image.new("I", (4, 4)), "TIFF"), "32 bits"),
    "script": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no image"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_images(name, recwarn):
    source, message = BAD[name]
    with pytest.raises(UserError, match=message) as error:
        read_image(source)
    assert "\n" not in str(error.value) and len(str(error.value)) < 250
    assert not recwarn.list


def test_text_in_a_file_named_png(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("hello")
    with pytest.raises(UserError, match=r"a\.png is no image that can be read"):
        read_image(path)


def test_resizing_is_that_of_the_published_processor():
    """To the bit, where both sides grow, shrink, or one of each; from torch, by tests/oracle/make_golden.py."""
    with np.load(Path(__file__).parents[1] / "golden" / "resize.npz") as file:
        for name in set(file) - {"pixels"}:
            size = tuple(int(n) for n in name.split("x"))
            np.testing.assert_array_equal(resize(file["pixels"], size), file[name], name)


def test_sizes():
    """Halves are rounded to even, areas fitted to the budget, a single pixel made large enough."""
    settings = VisionSettings()
    for given, expected in (
        ((784, 816), (768, 832)),
        ((1, 1), (256, 256)),
        ((9000, 9000), (4096, 4096)),
        ((10, 2000), (32, 3648)),
    ):
        assert image_size(*given, settings) == expected
    assert image_size(480, 640, settings.changed(max_pixels=10_000)) == (64, 96)
    assert image_size(100, 100, settings.changed(max_pixels=10_000)) == (96, 96)
    assert image_size(10, 10, settings.changed(max_pixels=10_000)) == (96, 96)


def test_what_has_no_end_is_not_read(tmp_path, monkeypatch):
    """Pipes and devices, whose length is 0, and files that hold more than they say."""
    os.mkfifo(tmp_path / "pipe")
    for source in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(UserError, match="it is no regular file"):
            read_image(source)
        with pytest.raises(UserError, match="it is no regular file"):
            check_source(Picture("image", source), False)
    monkeypatch.setattr(images_module, "MAX_BYTES", 10)
    with pytest.raises(UserError, match="it has 11 bytes; at most 10 are read"):
        read_image("/proc/self/status")


def test_large_files_are_not_read(monkeypatch, file):
    """The size is looked at before the content: of files, and of data URLs before they are decoded."""
    monkeypatch.setattr(images_module, "MAX_BYTES", 100)
    for source in (file, encoded(PIXELS), "data:image/png;base64," + "A" * 200):
        with pytest.raises(UserError, match="at most 100 are read"):
            read_image(source)
