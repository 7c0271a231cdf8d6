"""The parameters of the vision tower, for counts and checkpoints. Its forward pass does not exist yet."""

from __future__ import annotations

from flax import nnx

from qwen35_jax.config import ModelConfig, VisionConfig
from qwen35_jax.model.params import declare


class Affine(nnx.Module):
    """A weight and a bias."""

    def __init__(self, config: ModelConfig, axes: str, shape: tuple[int, ...], bias: int, init: str = "normal"):
        self.weight = declare(config, axes, shape, init)
        self.bias = declare(config, "H", (bias,), "zeros")


class VisionBlock(nnx.Module):
    """Pre-norm attention and MLP, all with biases."""

    def __init__(self, config: ModelConfig, v: VisionConfig):
        d, f = v.hidden_size, v.intermediate_size
        self.norm1 = Affine(config, "D", (d,), d, "ones")
        self.qkv = Affine(config, "D H", (d, 3 * d), 3 * d)
        self.proj = Affine(config, "D H", (d, d), d)
        self.norm2 = Affine(config, "D", (d,), d, "ones")
        self.fc1 = Affine(config, "D H", (d, f), f)
        self.fc2 = Affine(config, "H D", (f, d), d)


class VisionTower(nnx.Module):
    """Patch embedding, position table, blocks and merger of `config.vision`."""

    def __init__(self, config: ModelConfig):
        v = config.vision
        d, merged = v.hidden_size, v.hidden_size * v.spatial_merge_size**2
        patch = v.in_channels * v.temporal_patch_size * v.patch_size**2
        self.patch_embed = Affine(config, "D H", (patch, d), d)
        self.pos_embed = declare(config, "H D", (v.num_position_embeddings, d))
        self.blocks = nnx.Dict({str(i): VisionBlock(config, v) for i in range(v.depth)})
        self.merger_norm = Affine(config, "D", (d,), d, "ones")
        self.merger_fc1 = Affine(config, "D H", (merged, merged), merged)
        self.merger_fc2 = Affine(config, "D H", (merged, v.out_hidden_size), v.out_hidden_size)
