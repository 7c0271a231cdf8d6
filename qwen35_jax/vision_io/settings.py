"""How large pictures may be and how many frames of a video are looked at: as a checkpoint's files say, and as a user asks."""

from __future__ import annotations

import dataclasses
from typing import Any

from etils import epath

from qwen35_jax.config import VisionConfig
from qwen35_jax.errors import UserError
from qwen35_jax.text import read_json_object

IMAGE_FILE, VIDEO_FILE = "preprocessor_config.json", "video_preprocessor_config.json"


@dataclasses.dataclass(frozen=True)
class VisionSettings:
    """Sizes in pixels, areas in pixels; the published values where a checkpoint has no processor files.

    A side of a picture becomes a multiple of patch_size x merge_size. `video_min_pixels` and `video_max_pixels` count all frames
    together; `max_pixels`, which no file holds, is the most of one image and of one frame. `fps`, `min_frames` and `max_frames`
    say how many frames of a video are looked at. `allow_remote_media`: whether https URLs are fetched (see `remote.fetch`).
    """

    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    image_min_pixels: int = 65536
    image_max_pixels: int = 16777216
    video_min_pixels: int = 4096
    video_max_pixels: int = 25165824
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
        max_pixels: int | None = None,
        fps: float | None = None,
        max_frames: int | None = None,
        allow_remote_media: bool | None = None,
    ) -> VisionSettings:
        """With what a user asks for; None leaves a value as it is. UserError for what is too small."""
        if max_pixels is not None and max_pixels < self.factor**2:
            raise UserError(
                f"max_pixels is {max_pixels}; it must be at least {self.factor**2}, one {self.factor} x {self.factor} tile"
            )
        if fps is not None and not 0 < fps <= 1000:
            raise UserError(f"fps is {fps}; it must be above 0 and at most 1000")
        if max_frames is not None and max_frames < self.temporal_patch_size:
            raise UserError(f"max_frames is {max_frames}; it must be at least {self.temporal_patch_size}")
        given = {"max_pixels": max_pixels, "fps": fps, "max_frames": max_frames, "allow_remote_media": allow_remote_media}
        return dataclasses.replace(self, **{name: value for name, value in given.items() if value is not None})

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
        for name, kind in ((IMAGE_FILE, "image"), (VIDEO_FILE, "video")):
            raw = None if directory is None else read_json_object(directory, name)
            if raw is None:
                continue
            where = str(epath.Path(directory) / name)
            _check(raw, sizes, where)
            size = raw.get("size") or {}
            for key, field in (("shortest_edge", "min"), ("longest_edge", "max")):
                if key in size:
                    values[f"{kind}_{field}_pixels"] = _whole(size[key], f"{where}: size.{key}")
            for key in ("min_frames", "max_frames") if kind == "video" else ():
                if raw.get(key) is not None:
                    values[key] = _whole(raw[key], f"{where}: {key}")
            if kind == "video" and raw.get("fps") is not None:
                values["fps"] = float(_whole(raw["fps"], f"{where}: fps"))
        return cls(**values)


def _whole(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{where} is {value!r:.60}; expected a whole number, 1 or more")
    return value


def _check(raw: dict, sizes: dict[str, int], where: str) -> None:
    halves = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    for name, expected in (sizes | halves).items():
        if raw.get(name, expected) != expected:
            raise UserError(f"{where}: {name} is {raw[name]!r:.60}; supported: {expected}")
