"""The size a picture is brought to (the published smart resize, halves rounded to even as Python does), and bringing it there."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from qwen35_jax.errors import UserError
from qwen35_jax.vision_io.settings import VisionSettings

MAX_ASPECT = 200


def image_size(height: int, width: int, settings: VisionSettings) -> tuple[int, int]:
    """Height and width that an image of this size is brought to: multiples of the factor, the area within the budget.

    Raises UserError where one side is more than 200 times the other.
    """
    most = min(settings.image_max_pixels, settings.max_pixels or settings.image_max_pixels)
    return _fitted(1, 1, height, width, settings.factor, min(settings.image_min_pixels, most), most)


def video_size(frames: int, height: int, width: int, settings: VisionSettings) -> tuple[int, int]:
    """Height and width of the frames of a video; the budget is that of all frames together, and of each where there is one."""
    factor, step = settings.factor, settings.temporal_patch_size
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    most = settings.video_max_pixels
    if settings.max_pixels is not None:
        most = min(most, settings.max_pixels * frames)
    rounded = round(frames / step) * step
    return _fitted(rounded, frames, height, width, factor, min(settings.video_min_pixels, most), most)


def _fitted(rounded: int, frames: int, height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise UserError(f"it is {width} x {height} pixels: one side may be at most {MAX_ASPECT} times the other")
    new_height, new_width = (round(side / factor) * factor for side in (height, width))
    area = frames * height * width
    if rounded * new_height * new_width > most:
        shrink = math.sqrt(area / most)
        return tuple(max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    if rounded * new_height * new_width < least:
        grow = math.sqrt(least / area)
        return tuple(math.ceil(side * grow / factor) * factor for side in (height, width))
    return new_height, new_width


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] at (height, width): bicubic, with antialiasing where it shrinks."""
    if pixels.shape[:2] == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BICUBIC))
