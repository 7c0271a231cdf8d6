"""The size a picture is brought to (the published smart resize, halves rounded to even as Python does), and bringing it there."""

from __future__ import annotations

import math

import numpy as np

from qwen35_jax.errors import UserError
from qwen35_jax.vision_io.settings import VisionSettings

MAX_ASPECT = 200
CUBIC = -0.5  # the coefficient of the kernel (Keys), as in Pillow
WEIGHT_BITS = 15  # of the largest weight
BLOCK_VALUES = 1 << 22  # floats that are worked on at once


def image_size(height: int, width: int, settings: VisionSettings) -> tuple[int, int]:
    """Height and width that an image of this size is brought to: multiples of the factor, the area within the budget.

    Raises UserError where one side is more than 200 times the other.
    """
    most = min(settings.image_max_pixels, settings.max_pixels or settings.image_max_pixels)
    least = min(settings.min_pixels or settings.image_min_pixels, most)
    size = _fitted(1, 1, height, width, settings.factor, least, most)
    # The published smallest area goes before max_pixels; where that is smaller still, sides are not rounded up beyond it.
    return _capped(size, height, width, settings) if least == most else size


def video_size(frames: int, height: int, width: int, settings: VisionSettings) -> tuple[int, int]:
    """Height and width of the frames of a video; the budget is that of all frames together, and of each where there is one."""
    factor, step = settings.factor, settings.temporal_patch_size
    frames = max(frames, step)  # a single frame is repeated
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    rounded = round(frames / step) * step
    least, most = settings.video_min_pixels, settings.video_max_pixels
    if settings.min_pixels is not None:
        least = settings.min_pixels * frames
    size = _fitted(rounded, frames, height, width, factor, min(least, most), most)
    return _capped(size, height, width, settings)


def check_aspect(height: int, width: int) -> None:
    """UserError where one side is more than 200 times the other."""
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise UserError(f"it is {width} x {height} pixels: one side may be at most {MAX_ASPECT} times the other")


def _fitted(rounded: int, frames: int, height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """The published rule, whose areas are those of all frames together."""
    check_aspect(height, width)
    new_height, new_width = (round(side / factor) * factor for side in (height, width))
    area = frames * height * width
    if rounded * new_height * new_width > most:
        return _shrunk(height, width, factor, math.sqrt(area / most))
    if rounded * new_height * new_width < least:
        grow = math.sqrt(least / area)
        return tuple(math.ceil(side * grow / factor) * factor for side in (height, width))
    return new_height, new_width


def _capped(size: tuple[int, int], height: int, width: int, settings: VisionSettings) -> tuple[int, int]:
    """`size` if its area is at most max_pixels; else height and width divided to that, as the published rule does."""
    most = settings.max_pixels
    if most is None or size[0] * size[1] <= most:
        return size
    return _shrunk(height, width, settings.factor, math.sqrt(height * width / most))


def _shrunk(height: int, width: int, factor: int, divisor: float) -> tuple[int, int]:
    """Both sides divided, rounded down to multiples of the factor: at least one."""
    return tuple(max(factor, math.floor(side / divisor / factor) * factor) for side in (height, width))


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] at (height, width): bicubic, with antialiasing where it shrinks.

    Equal to the last bit to what the published (torchvision) processor computes on the CPU: torch's uint8 kernel, which
    resizes the width first, rounds to uint8 between the two passes, and multiplies by whole numbers. Pillow's differs from it
    by a level in a fifth of the values where it takes the height first.
    """
    height, width = pixels.shape[:2]
    if size[1] != width:
        columns = np.ascontiguousarray(pixels.transpose(1, 0, 2)).reshape(width, -1)
        pixels = np.ascontiguousarray(_pass(columns, size[1]).reshape(size[1], height, -1).transpose(1, 0, 2))
    if size[0] != height:
        pixels = _pass(pixels.reshape(height, -1), size[0]).reshape(*size, -1)
    return pixels


def _pass(lines: np.ndarray, count: int) -> np.ndarray:
    """uint8 lines [N, values] to `count` lines, each a weighted sum of its neighbourhood."""
    first, taps, weights, bits = _weights(len(lines), count)
    # Sums of whole numbers are exact while they fit the mantissa.
    dtype = np.float32 if 255 * np.abs(weights).sum(axis=1).max() < 2**24 else np.float64
    weights, out = weights.astype(dtype), np.empty((count, lines.shape[1]), np.uint8)
    step = max(1, BLOCK_VALUES // len(lines))
    for start in range(0, lines.shape[1], step):
        block = lines[:, start : start + step].astype(dtype)
        for i, (low, n) in enumerate(zip(first, taps, strict=True)):
            total = weights[i, :n] @ block[low : low + n]
            out[i, start : start + step] = np.clip(np.floor((total + (1 << bits - 1)) / (1 << bits)), 0, 255)
    return out


def _weights(old: int, new: int) -> tuple[list[int], list[int], np.ndarray, int]:
    """For each of `new` lines: its first neighbour, how many there are, their whole-number weights [new, most]; and by how many
    bits the weights are scaled."""
    scale = old / new
    stretch = max(scale, 1.0)
    centre = scale * (np.arange(new) + 0.5)
    first = np.maximum((centre - 2 * stretch + 0.5).astype(int), 0)
    taps = np.minimum((centre + 2 * stretch + 0.5).astype(int), old) - first
    index = np.arange(taps.max())
    x = np.abs((index + first[:, None] - centre[:, None] + 0.5) / stretch)
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * CUBIC
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0)) * (index < taps[:, None])
    weights /= weights.sum(axis=1, keepdims=True)
    bits = 0
    while bits < 22 and int(0.5 + weights.max() * (1 << bits + 1)) < 1 << WEIGHT_BITS:
        bits += 1
    whole = np.trunc(weights * (1 << bits) + np.copysign(0.5, weights))
    return first.tolist(), taps.tolist(), whole, bits
