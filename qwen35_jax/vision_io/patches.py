"""Pictures cut into patches, in the order in which the vision tower merges them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib

import numpy as np

from qwen35_jax.vision_io.settings import VisionSettings


@dataclasses.dataclass(frozen=True)
class Visual:
    """An image or a video, ready for the vision tower.

    kind: image | video. patches: uint8 [N, channels * frames * height * width], pixels of each patch. grid: temporal patches, and
    patches of a frame's height and width. seconds: of a video, when each temporal patch is, as its prompt says it.
    """

    kind: str
    patches: np.ndarray
    grid: tuple[int, int, int]
    merge: int
    seconds: tuple[float, ...] = ()

    @property
    def frame_tokens(self) -> int:
        """Placeholders of one temporal patch."""
        return self.grid[1] * self.grid[2] // self.merge**2

    @functools.cached_property
    def digest(self) -> bytes:
        """Of all that the vision tower sees."""
        seen = hashlib.blake2b(repr((self.grid, self.merge, self.patches.shape)).encode(), digest_size=16)
        seen.update(np.ascontiguousarray(self.patches))
        return seen.digest()

    @property
    def tokens(self) -> int:
        """Placeholders in the prompt."""
        return self.grid[0] * self.frame_tokens


def image_visual(pixels: np.ndarray, settings: VisionSettings) -> Visual:
    """A resized image, uint8 [H, W, 3]: it counts as a video of two equal frames."""
    return Visual("image", *_patches(pixels[None], settings), settings.merge_size)


def video_visual(frames: np.ndarray, seconds: tuple[float, ...], settings: VisionSettings) -> Visual:
    """Resized frames, uint8 [T, H, W, 3]; the last is repeated where their number is odd."""
    return Visual("video", *_patches(frames, settings), settings.merge_size, seconds)


def _patches(frames: np.ndarray, settings: VisionSettings) -> tuple[np.ndarray, tuple[int, int, int]]:
    step, merge, side = settings.temporal_patch_size, settings.merge_size, settings.patch_size
    missing = -len(frames) % step
    frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    time, height, width = len(frames) // step, frames.shape[1] // side, frames.shape[2] // side
    x = frames.reshape(time, step, height // merge, merge, side, width // merge, merge, side, frames.shape[3])
    x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return x.reshape(time * height * width, -1), (time, height, width)


def patch_places(height: int, width: int, merge: int) -> np.ndarray:
    """int32 [height * width, 4]: row and column of each patch in the merger's order, height and width."""
    place = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), axis=-1)
    place = place.reshape(height // merge, merge, width // merge, merge, 2).transpose(0, 2, 1, 3, 4).reshape(-1, 2)
    return np.concatenate([place, np.broadcast_to([height, width], place.shape)], axis=1).astype(np.int32)
