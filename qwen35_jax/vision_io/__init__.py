"""Images and videos to patches: reading, resizing, sampling, cutting."""

from qwen35_jax.vision_io.images import read_image
from qwen35_jax.vision_io.patches import Visual, image_visual, video_visual
from qwen35_jax.vision_io.resize import image_size, resize, video_size
from qwen35_jax.vision_io.settings import VisionSettings
from qwen35_jax.vision_io.video import patch_seconds, read_video, sample_frames

__all__ = [
    "VisionSettings",
    "Visual",
    "image_size",
    "image_visual",
    "patch_seconds",
    "read_image",
    "read_video",
    "resize",
    "sample_frames",
    "video_size",
    "video_visual",
]
