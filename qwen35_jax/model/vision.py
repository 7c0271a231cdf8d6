"""The vision tower: patches of images and video frames to rows of the text model's width.

Frames are packed into rows of patches: I rows, T patches of a row, in the order of the merger (blocks of 2 x 2 patches, row by
row). A frame is one temporal index of one image or video; frames do not attend to each other, so they are the segments of a
row. N heads and F features are cut over `model` where it divides them; else every device holds the tower, and the rows are
spread over `model` too.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from qwen35_jax.config import ModelConfig
from qwen35_jax.model import params as P
from qwen35_jax.model.inputs import VisionRows
from qwen35_jax.model.params import declare
from qwen35_jax.model.unit import apply_units
from qwen35_jax.ops.attention import attention
from qwen35_jax.ops.forms import Forms
from qwen35_jax.ops.linear import linear
from qwen35_jax.ops.norm import layer_norm
from qwen35_jax.ops.rotary import apply_rotary
from qwen35_jax.ops.segments import segment_ends
from qwen35_jax.sharding import Sharding

ROPE_THETA = 10000.0
# Pixels 0 to 255 become (x - CENTRE) / CENTRE: the processor's rescaling by 1/255, mean 0.5 and deviation 0.5 in one.
CENTRE = 127.5


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the tower lies on the mesh, as axis letters: `rows` of patches, `heads`, `features` (X is never cut)."""

    sharding: Sharding
    rows: str
    heads: str
    features: str

    @classmethod
    def of(cls, config: ModelConfig, sharding: Sharding) -> Layout:
        v = config.vision
        widths = (v.num_heads, v.intermediate_size, v.hidden_size * v.spatial_merge_size**2)
        if all(n % sharding.model == 0 for n in widths):
            return cls(sharding, "B", "N", "F")
        return cls(sharding, "I", "X", "X")

    def axes(self, shape: str) -> str:
        """`shape` in I, T, N, F, … as letters of the mesh."""
        names = {"I": self.rows, "N": self.heads, "F": self.features}
        return " ".join(names.get(letter, letter) for letter in shape.split())

    def constrain(self, x: jax.Array, shape: str) -> jax.Array:
        return self.sharding.constrain(x, self.axes(shape))


class Affine(nnx.Module):
    """x W + b over the last axes of x; the bias is added before the one rounding."""

    def __init__(self, config: ModelConfig, axes: str, shape: tuple[int, ...], spec: str, inputs: int = 1):
        self.weight = declare(config, axes, shape)
        self.bias = declare(config, " ".join(axes.split()[inputs:]), shape[inputs:], "zeros")
        self.spec = spec

    def __call__(self, x: jax.Array) -> jax.Array:
        y = linear(x, self.weight.get_value(), self.spec, out_dtype=jnp.float32)
        return (y + self.bias.get_value().astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Mean and variance of the last axis, a scale and a bias."""

    def __init__(self, config: ModelConfig, width: int):
        self.weight = declare(config, "D", (width,), "ones")
        self.bias = declare(config, "D", (width,), "zeros")

    def __call__(self, x: jax.Array) -> jax.Array:
        return layer_norm(x, self.weight.get_value(), self.bias.get_value())


class PatchEmbedding(nnx.Module):
    """Pixels of a patch times one matrix (the published Conv3d, whose stride is its kernel), and where the patch lies."""

    def __init__(self, config: ModelConfig, layout: Layout):
        v = config.vision
        patch = (v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
        self.proj = Affine(config, "X X X X D", (*patch, v.hidden_size), "ITcthw,cthwD->ITD", inputs=4)
        self.positions = declare(config, "X D", (v.num_position_embeddings, v.hidden_size))
        self.patch, self.side, self.layout = patch, math.isqrt(v.num_position_embeddings), layout
        self.dtype = config.dtype

    @jax.named_scope("patch_embedding")
    def __call__(self, patches: jax.Array, places: jax.Array) -> jax.Array:
        """patches uint8 [I, T, channels * frames * height * width], places int32 [I, T, 4] -> [I, T, D]."""
        pixels = ((patches.astype(jnp.float32) - CENTRE) / CENTRE).astype(self.dtype)
        x = self.proj(pixels.reshape(*pixels.shape[:2], *self.patch))
        return self.layout.constrain(x + self._interpolated(places).astype(x.dtype), "I T D")

    def _interpolated(self, places: jax.Array) -> jax.Array:
        """The square table of positions stretched over the frame, corner on corner: bilinear, [I, T, D] float32."""
        table, last = self.positions.get_value(), self.side - 1
        at = places[..., :2] * (jnp.float32(last) / jnp.maximum(places[..., 2:] - 1, 1))
        low = jnp.minimum(jnp.floor(at).astype(jnp.int32), last)
        high, part = jnp.minimum(low + 1, last), at - low
        total = 0.0
        for row, down in ((low, 1 - part), (high, part)):
            for column, right in ((low, 1 - part), (high, part)):
                weight = down[..., :1] * right[..., 1:]
                total += table[row[..., 0] * self.side + column[..., 1]].astype(jnp.float32) * weight
        return total


class VisionBlock(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), all with biases."""

    def __init__(self, config: ModelConfig, layout: Layout, forms: Forms):
        v = config.vision
        d, n, f = v.hidden_size, v.num_heads, v.intermediate_size
        heads = (layout.axes("D N H"), (d, n, d // n), "ITD,DNH->ITNH")
        self.norm1 = LayerNorm(config, d)
        self.q, self.k, self.v = (Affine(config, *heads) for _ in range(3))
        self.proj = Affine(config, layout.axes("N H D"), (n, d // n, d), "ITNH,NHD->ITD", inputs=2)
        self.norm2 = LayerNorm(config, d)
        self.fc1 = Affine(config, layout.axes("D F"), (d, f), "ITD,DF->ITF")
        self.fc2 = Affine(config, layout.axes("F D"), (f, d), "ITF,FD->ITD")
        self.layout, self.forms = layout, forms

    @jax.named_scope("vision_block")
    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array, segment_ids: jax.Array, ends: jax.Array) -> jax.Array:
        """x [I, T, D]; cos, sin [I, T, H/2] float32; ends int32 [I, T], the last patch of each patch's frame."""
        y, place = self.norm1(x), self.layout.constrain
        q, k, v = (place(layer(y), "I T N H") for layer in (self.q, self.k, self.v))
        y = self._attend(apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v, segment_ids, ends)
        x = place(x + self.proj(y), "I T D")
        y = place(_gelu(self.fc1(self.norm2(x)), approximate=True), "I T F")
        return place(x + self.fc2(y), "I T D")

    def _attend(self, q, k, v, segment_ids, ends) -> jax.Array:
        """Each patch sees its whole frame: as a query it stands at the frame's last patch, of which causal attention that does
        not cross segments sees everything."""

        def local(q, k, v, segment_ids, ends):
            form = self.forms.vision_attention
            return attention(q, k, v, q_positions=ends, segment_ids=segment_ids, implementation=form)

        heads, tokens = self.layout.axes("I T N H"), self.layout.axes("I T")
        mapped = self.layout.sharding.shard_map(local, (heads, heads, heads, tokens, tokens), heads)
        return mapped(q, k, v, segment_ids, ends)


class PatchMerger(nnx.Module):
    """Four patches that form a square, normed one by one, become one row of the text model's width."""

    def __init__(self, config: ModelConfig, layout: Layout):
        v = config.vision
        self.merged = v.hidden_size * v.spatial_merge_size**2
        self.norm = LayerNorm(config, v.hidden_size)
        self.fc1 = Affine(config, layout.axes("D F"), (self.merged, self.merged), "ITD,DF->ITF")
        self.fc2 = Affine(config, layout.axes("F D"), (self.merged, v.out_hidden_size), "ITF,FD->ITD")
        self.layout = layout

    @jax.named_scope("patch_merger")
    def __call__(self, x: jax.Array) -> jax.Array:
        """[I, T, D] of patches -> [I, T / merge^2, D] of the text model."""
        x = self.norm(x).reshape(x.shape[0], -1, self.merged)
        x = self.layout.constrain(_gelu(self.fc1(x), approximate=False), "I T F")
        return self.layout.constrain(self.fc2(x), "I T D")


def _gelu(x: jax.Array, *, approximate: bool) -> jax.Array:
    return jax.nn.gelu(x.astype(jnp.float32), approximate=approximate).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class VisionModel:
    """Everything static about the tower of `config.vision`, as `Model` is for the text model. `params` is a nested dict: embed,
    blocks (one tree with a leading axis of depth, for `lax.scan`), merger."""

    config: ModelConfig
    sharding: Sharding
    forms: Forms = Forms()

    @functools.cached_property
    def layout(self) -> Layout:
        return Layout.of(self.config, self.sharding)

    @functools.cached_property
    def _modules(self) -> dict[str, nnx.Module]:
        c, layout = self.config, self.layout
        blocks = VisionBlock(c, layout, self.forms)
        return {"embed": PatchEmbedding(c, layout), "blocks": blocks, "merger": PatchMerger(c, layout)}

    @functools.cached_property
    def _graphs(self) -> dict:
        return {name: nnx.graphdef(module) for name, module in self._modules.items()}

    def declarations(self) -> dict:
        """nnx.Param declarations by module; `blocks` is one block."""
        return {name: P.declarations(module) for name, module in self._modules.items()}

    def count(self) -> int:
        """Number of parameters."""
        counts = {name: P.count(tree) for name, tree in self.declarations().items()}
        return sum(counts.values()) + (self.config.vision.depth - 1) * counts["blocks"]

    def abstract_params(self) -> dict:
        """ShapeDtypeStructs with shardings in the structure of `params`."""
        tree = self.declarations()
        depth = self.config.vision.depth
        return {name: P.abstract(part, self.sharding, depth if name == "blocks" else None) for name, part in tree.items()}

    def init_params(self, seed: int = 0, places: dict | None = None) -> dict:
        """Random parameters, made on their devices; the numbers depend on `seed` alone.

        places: where they are to lie, in the structure of `abstract_params`, which is where they lie by default.
        """
        tree, scale, places = self.declarations(), self.config.initializer_range, places or self.abstract_params()
        blocks, stacked = tree.pop("blocks"), places["blocks"]
        block = jax.tree.map(P.without_units, stacked)
        trees = tuple(P.initialise(blocks, block, seed, scale, b) for b in range(self.config.vision.depth))
        params = P.initialise(tree, {name: places[name] for name in tree}, seed, scale)
        return params | {"blocks": P.stack(trees, stacked)}

    def __call__(
        self,
        params: dict,
        patches: jax.Array,
        places: jax.Array,
        segment_ids: jax.Array,
        wrap: Callable[[Callable], Callable] = lambda block: block,
    ) -> jax.Array:
        """Rows of the text model's width for packed frames.

        Args:
            params: see above.
            patches: uint8 [I, T, channels * frames * height * width], pixels of each patch.
            places: int32 [I, T, 4], row and column of the patch and height and width of its frame, in patches.
            segment_ids: int32 [I, T], the patch's frame, non-decreasing; 0 = padding at the end.
            wrap: put around the function of one block, (its parameters, x) -> x; for training.

        Returns [I, T / merge^2, out_hidden_size] in the config's dtype; rows of padding mean nothing.
        """
        modules = {name: functools.partial(nnx.merge, graph) for name, graph in self._graphs.items()}
        x = modules["embed"](params["embed"])(patches, places)
        cos, sin = self._angles(places)
        ends = jnp.where(segment_ids > 0, segment_ends(segment_ids), -1)

        block = wrap(lambda block_params, x: modules["blocks"](block_params)(x, cos, sin, segment_ids, ends))
        x = apply_units(lambda block_params, _, x: block(block_params, x), params["blocks"], x)
        return modules["merger"](params["merger"])(x)

    def laid(self, rows: jax.Array, index: jax.Array, text: Sharding) -> VisionRows:
        """The tower's rows [I, P, D] where tokens want them: index int32 [B, T], counted over all I x P, or -1, and `text` says
        how tokens lie on the mesh.

        Rows of the tower are spread over devices as they come, whatever text they belong to: each device gathers them all, and
        takes those of its own tokens. Their gradients are summed on the way back.
        """
        names = self.sharding.rules[self.layout.rows]

        def local(rows, index):
            rows = jax.lax.all_gather(rows, names, tiled=True)
            return rows.reshape(-1, rows.shape[-1])[jnp.maximum(index, 0)]

        specs = self.sharding.spec(self.layout.axes("I T D")), text.spec("B T")
        mapped = jax.shard_map(local, mesh=text.mesh, in_specs=specs, out_specs=text.spec("B T D"), check_vma=False)
        return VisionRows(mapped(rows, index), index >= 0)

    def _angles(self, places: jax.Array) -> tuple[jax.Array, jax.Array]:
        """cos and sin [I, T, H/2] float32: the first half of the pairs turns with the row, the second with the column."""
        pairs = self.config.vision.hidden_size // self.config.vision.num_heads // 4
        inverse = 1.0 / ROPE_THETA ** (jnp.arange(pairs, dtype=jnp.float32) / pairs)
        angles = places[..., :2, None].astype(jnp.float32) * inverse
        angles = angles.reshape(*places.shape[:2], 2 * pairs)
        return jnp.cos(angles), jnp.sin(angles)
