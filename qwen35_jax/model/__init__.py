"""The model: NNX modules, their parameters and their decoding state."""

from qwen35_jax.model.decoder import Model, parameter_counts
from qwen35_jax.model.inputs import Inputs, abstract_state, put_slots, take_slots, zero_slots
from qwen35_jax.model.vision import VisionModel

__all__ = ["Inputs", "Model", "VisionModel", "abstract_state", "parameter_counts", "put_slots", "take_slots", "zero_slots"]
