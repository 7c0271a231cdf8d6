"""How large pictures may be and how many frames of a video are looked at: as a checkpoint's files say, and as a user asks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from qwen35_jax.config import VisionConfig
from qwen35_jax.errors import UserError
from qwen35_jax.text import read_json_object

# The published files, and the one in which transformers has written both of them since 5.3.
FILES = {"image": "preprocessor_config.json", "video": "video_preprocessor_config.json"}
BOTH_FILE, BOTH_KEYS = "processor_config.json", {"image": "image_processor", "video": "video_processor"}
# Settings that are done as published, or not at all; a file that lacks one, or has null, means the same.
PUBLISHED = {
    "do_resize": True,
    "resample": 3,  # bicubic
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
PUBLISHED_OF_VIDEOS = {"do_sample_frames": True, "num_frames": None, "cap_pixels_per_frame": False}


@dataclasses.dataclass(frozen=True)
class VisionSettings:
    """Sizes in pixels, areas in pixels; the published values where a checkpoint has no processor files.

    A side of a picture becomes a multiple of patch_size x merge_size. `video_min_pixels` and `video_max_pixels` count all frames
    together; `min_pixels` and `max_pixels`, which no file holds, are the least and the most of one image and of one frame (the
    most goes first). `fps`, `min_frames` and `max_frames` say how many frames of a video are looked at. `allow_remote_media`:
    whether https URLs are fetched (see `remote.fetch`).
    """

    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    image_min_pixels: int = 65536
    image_max_pixels: int = 16777216
    video_min_pixels: int = 4096
    video_max_pixels: int = 25165824
    min_pixels: int | None = None
    max_pixels: int | None = None
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    allow_remote_media: bool = False

    @property
    def factor(self) -> int:
        """The sides of a resized picture are multiples of it."""
        return self.patch_size * self.merge_size

    def changed(
        self,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        fps: float | None = None,
        max_frames: int | None = None,
        allow_remote_media: bool | None = None,
    ) -> VisionSettings:
        """With what a user asks for; None leaves a value as it is. UserError for what is too small, or no number."""
        whole = {"min_pixels": min_pixels, "max_pixels": max_pixels, "max_frames": max_frames}
        whole = {name: _whole(value, name) for name, value in whole.items() if value is not None}
        if max_pixels is not None and max_pixels < self.factor**2:
            raise UserError(
                f"max_pixels is {max_pixels}; it must be at least {self.factor**2}, one {self.factor} x {self.factor} tile"
            )
        fps = None if fps is None else _rate(fps, "fps")
        if max_frames is not None and max_frames < self.temporal_patch_size:
            raise UserError(f"max_frames is {max_frames}; it must be at least {self.temporal_patch_size}")
        other = {"fps": fps, "allow_remote_media": allow_remote_media}
        return dataclasses.replace(self, **whole, **{name: value for name, value in other.items() if value is not None})

    @classmethod
    def from_directory(cls, directory: epath.PathLike | None, vision: VisionConfig) -> VisionSettings:
        """Of a checkpoint directory, if there is one; `vision` is its model's.

        Raises UserError where the files ask for what is not done here.
        """
        sizes = {
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "merge_size": vision.spatial_merge_size,
        }
        values: dict[str, Any] = dict(sizes)
        for kind, raw, where in [] if directory is None else _processors(directory):
            _check(raw, sizes | PUBLISHED | (PUBLISHED_OF_VIDEOS if kind == "video" else {}), where)
            for key, value in _areas(raw, kind, where).items():
                values[f"{kind}_{key}_pixels"] = value
            if kind == "video":
                for key in ("min_frames", "max_frames"):
                    if raw.get(key) is not None:
                        values[key] = _whole(raw[key], f"{where}: {key}")
                if raw.get("fps") is not None:
                    values["fps"] = _rate(raw["fps"], f"{where}: fps")
        return cls(**values)


def _processors(directory: epath.PathLike) -> Iterator[tuple[str, dict, str]]:
    """(image | video, its processor's settings, where they are) of those that a directory describes."""
    both = read_json_object(directory, BOTH_FILE) or {}
    for kind, name in FILES.items():
        key = BOTH_KEYS[kind]
        if both.get(key) is None:
            raw, where = read_json_object(directory, name), str(epath.Path(directory) / name)
        else:
            raw, where = both[key], f"{epath.Path(directory) / BOTH_FILE}: {key}"
            if not isinstance(raw, dict):
                raise UserError(f"{where} is {raw!r:.60}; expected an object")
        if raw is not None:
            yield kind, raw, where


def _areas(raw: dict, kind: str, where: str) -> dict[str, int]:
    """The areas `min` and `max` that a processor's settings name."""
    size = raw.get("size")
    size = {} if size is None else size
    if not isinstance(size, dict) or any(size[key] is not None for key in size.keys() - {"shortest_edge", "longest_edge"}):
        raise UserError(f"{where}: size is {size!r:.60}; expected the areas shortest_edge and longest_edge")
    found = {"min": ("size.shortest_edge", size.get("shortest_edge")), "max": ("size.longest_edge", size.get("longest_edge"))}
    if kind == "image":  # the older names, which go first; the published processor of videos does not look at them
        for key in found:
            if raw.get(f"{key}_pixels") is not None:
                found[key] = (f"{key}_pixels", raw[f"{key}_pixels"])
    return {key: _whole(value, f"{where}: {name}") for key, (name, value) in found.items() if value is not None}


def _whole(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise UserError(f"{where} is {value!r:.60}; expected a whole number, 1 or more")
    return int(value)


def _rate(value: Any, where: str) -> float:
    """Frames a second."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not 0 < value <= 1000:
        raise UserError(f"{where} is {value!r:.60}; it must be above 0 and at most 1000")
    return float(value)


def _check(raw: dict, supported: dict[str, Any], where: str) -> None:
    for name, expected in supported.items():
        if raw.get(name) not in (None, expected):
            raise UserError(f"{where}: {name} is {raw[name]!r:.60}; supported: {expected}")
