"""The model: NNX modules, their parameters and their decoding state."""

from qwen35_jax.model.decoder import Model, parameter_counts
from qwen35_jax.model.inputs import Inputs, VisionRows, abstract_state, put_slots, take_slots, take_token, zero_slots
from qwen35_jax.model.positions import FrameQueue, Span, vision_positions
from qwen35_jax.model.vision import VisionModel

__all__ = [
    "FrameQueue",
    "Inputs",
    "Model",
    "Span",
    "VisionModel",
    "VisionRows",
    "abstract_state",
    "parameter_counts",
    "put_slots",
    "take_slots",
    "take_token",
    "vision_positions",
    "zero_slots",
]
