"""Images and videos to patches: reading, resizing, sampling, cutting."""

from qwen35_jax.vision_io.patches import Visual, image_visual, video_visual
from qwen35_jax.vision_io.settings import VisionSettings

__all__ = ["VisionSettings", "Visual", "image_visual", "video_visual"]
