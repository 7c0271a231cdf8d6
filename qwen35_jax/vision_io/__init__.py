"""Images and videos to patches: reading, resizing, sampling, cutting."""

from qwen35_jax.vision_io.images import is_data_url, read_image
from qwen35_jax.vision_io.messages import PADS, Picture, check_source, check_tokens, collect_pictures, expand, read_picture
from qwen35_jax.vision_io.patches import Visual, image_visual, patch_places, video_visual
from qwen35_jax.vision_io.remote import is_remote
from qwen35_jax.vision_io.resize import image_size, resize, video_size
from qwen35_jax.vision_io.settings import VisionSettings
from qwen35_jax.vision_io.video import is_folder, patch_seconds, read_video, sample_frames

__all__ = [
    "PADS",
    "Picture",
    "VisionSettings",
    "Visual",
    "check_source",
    "check_tokens",
    "collect_pictures",
    "expand",
    "image_size",
    "image_visual",
    "is_data_url",
    "is_folder",
    "is_remote",
    "patch_places",
    "patch_seconds",
    "read_image",
    "read_picture",
    "read_video",
    "resize",
    "sample_frames",
    "video_size",
    "video_visual",
]
