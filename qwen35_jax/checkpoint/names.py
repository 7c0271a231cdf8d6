"""The map between parameters of the model and Hugging Face tensors, in both directions, from one table.

A parameter is a part of one tensor: rows of it, with its axes split (heads, halves) and put in another order. `View`
says which, so that `take` (loading), `put` (exporting) and the FP8 scales all follow from the same line of the table.
Hugging Face linear weights are [out, in]; ours are [in, out] with head axes. The names are those of the published
checkpoints: `model.language_model.…`, `model.visual.…`, `lm_head.weight`, `mtp.…`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np

from qwen35_jax.config import ModelConfig
from qwen35_jax.errors import UserError

BLOCK = 128  # FP8 checkpoints hold one scale for each 128 x 128 block
TEXT = "model.language_model."
VISION = "model.visual."
MTP = "mtp."

Path = tuple[str | int, ...]
Groups = tuple[tuple[int, ...], ...]
Ranges = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class View:
    """parameter = tensor[rows].reshape(split).transpose(order).

    `groups` has one tuple for each axis of the tensor (rows already taken): what that axis is split into; () drops an
    axis of size 1. `rows` is (start, stop) of the tensor's axis `rows_axis` (fused experts: the second, gate above up).
    `fp8`: FP8 checkpoints quantise the tensor. `repeats`, where not (): along each axis, entry i of the tensor that is meant here
    is entry i // repeats of the stored one.
    """

    name: str
    tensor_shape: tuple[int, ...]
    groups: Groups
    order: tuple[int, ...]
    rows: tuple[int, int]
    fp8: bool = False
    rows_axis: int = 0
    repeats: tuple[int, ...] = ()

    @property
    def split(self) -> tuple[int, ...]:
        return tuple(itertools.chain.from_iterable(self.groups))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return tuple(self.split[axis] for axis in self.order)

    def take(self, tensor: np.ndarray) -> np.ndarray:
        """The parameter, from the whole tensor."""
        return self._part(tensor).reshape(self.split).transpose(self.order)

    def put(self, tensor: np.ndarray, parameter: np.ndarray) -> None:
        """Writes the parameter into its part of the tensor."""
        part = self._part(tensor)
        part[...] = np.asarray(parameter).transpose(np.argsort(self.order)).reshape(part.shape)

    def _part(self, tensor: np.ndarray) -> np.ndarray:
        tensor = self.repeated(tensor, tuple((0, n) for n in self.tensor_shape))
        return tensor[(slice(None),) * self.rows_axis + (slice(*self.rows),)]

    def stored(self, ranges: Ranges) -> Ranges:
        """What must be read of the stored tensor for a slice (start, stop per axis) of the tensor."""
        repeats = self.repeats or (1,) * len(ranges)
        return tuple((start // n, -(-stop // n)) for (start, stop), n in zip(ranges, repeats, strict=True))

    def repeated(self, stored: np.ndarray, ranges: Ranges) -> np.ndarray:
        """The slice of the tensor, from what `stored` says of the stored one."""
        for axis, n in enumerate(self.repeats):
            start, stop = ranges[axis]
            if n > 1:
                first = start // n * n
                index = (slice(None),) * axis + (slice(start - first, stop - first),)
                stored = np.repeat(stored, n, axis)[index]
        return stored

    def scales(self) -> View:
        """The same part of the tensor's FP8 scales. UserError where blocks of 128 do not follow the heads.

        Heads that divide a block share its scale: along them, each scale stands for several entries (`repeats`).
        """
        lead = len(self.tensor_shape) - 2  # experts have no blocks over their first axis
        units = [1] * lead + [self._scale_unit(axis) for axis in (lead, lead + 1)]
        if 0 in units:
            what = f"its heads do not follow the {BLOCK} x {BLOCK} blocks"
            raise UserError(f"{self.name} cannot be kept in FP8: {what}; load it dequantised")
        shape = tuple(-(-n // unit) for n, unit in zip(self.tensor_shape, units, strict=True))
        groups = tuple(g[:-1] + (-(-g[-1] // unit),) for g, unit in zip(self.groups, units, strict=True))
        unit = units[self.rows_axis]
        rows = (self.rows[0] // unit, -(-self.rows[1] // unit))
        if halves(self.name) == 2:  # gate and up have blocks of their own
            shape, half = scale_shape(self.tensor_shape, 2), blocks(self.rows[1] - self.rows[0])
            rows = (0, half) if self.rows[0] == 0 else (half, 2 * half)
        repeats = tuple(1 if axis < lead else BLOCK // unit for axis, unit in enumerate(units))
        repeats = repeats if set(repeats) != {1} else ()
        return View(scale_name(self.name), shape, groups, self.order, rows, rows_axis=self.rows_axis, repeats=repeats)

    def _scale_unit(self, axis: int) -> int:
        """How many rows (or columns) an entry of `scales` stands for: a block, a narrower head, or 0 where neither fits."""
        group, cut = self.groups[axis], self.rows if axis == self.rows_axis else (0, self.tensor_shape[axis])
        if halves(self.name) == 2 or cut == (0, self.tensor_shape[axis]):
            cut = (0, 0)
        if all(n % BLOCK == 0 for n in cut) and (math.prod(group[:-1]) == 1 or group[-1] % BLOCK == 0):
            return BLOCK
        return group[-1] if BLOCK % group[-1] == 0 and cut[0] % group[-1] == 0 else 0


def blocks(n: int) -> int:
    return -(-n // BLOCK)


def halves(name: str) -> int:
    """How many matrices lie on top of each other in a tensor's rows, each with blocks of its own (gate and up: 2)."""
    return 2 if name.endswith(".experts.gate_up_proj") else 1


def scale_name(name: str) -> str:
    return name + "_scale_inv"  # "….weight" -> "….weight_scale_inv", "…gate_up_proj" -> "…gate_up_proj_scale_inv"


def scale_shape(shape: tuple[int, ...], halves: int) -> tuple[int, ...]:
    """Shape of the scales of an FP8 tensor [..., rows, columns]."""
    return (*shape[:-2], halves * blocks(shape[-2] // halves), blocks(shape[-1]))


def block_rows(rows: int, halves: int) -> np.ndarray:
    """For each row of an FP8 tensor, the row of its scales: int [rows]."""
    half = rows // halves
    return np.concatenate([np.arange(half) // BLOCK + h * blocks(half) for h in range(halves)])


def _view(name: str, groups: Groups, order: tuple[int, ...] | None = None, *, fp8=False, rows=None, total=None) -> View:
    shape = tuple(math.prod(group) for group in groups)
    rows = rows or (0, shape[0])
    order = tuple(range(sum(map(len, groups)))) if order is None else order
    return View(name, (total or shape[0], *shape[1:]), groups, order, rows, fp8)


def _transposed(name: str, outputs: tuple[int, ...], inputs: tuple[int, ...], **more) -> View:
    """[out, in] -> [in, out], either side split into heads."""
    o, i = len(outputs), len(inputs)
    return _view(name, (outputs, inputs), (*range(o, o + i), *range(o)), **more)


def _gated_delta_net(c: ModelConfig, base: str) -> dict[str, View]:
    d, k, n = c.hidden_size, c.linear_num_key_heads, c.linear_num_value_heads
    hk, hv, taps = c.linear_key_head_dim, c.linear_value_head_dim, c.linear_conv_kernel_dim
    total = 2 * k * hk + n * hv
    parts = {"q": ((k, hk), 0), "k": ((k, hk), k * hk), "v": ((n, hv), 2 * k * hk)}
    views = {}
    for part, (heads, start) in parts.items():
        rows = (start, start + math.prod(heads))
        views[part] = _transposed(f"{base}in_proj_qkv.weight", heads, (d,), fp8=True, rows=rows, total=total)
        views[f"conv_{part}"] = _view(f"{base}conv1d.weight", (heads, (), (taps,)), rows=rows, total=total)
    return views | {
        "z": _transposed(f"{base}in_proj_z.weight", (n, hv), (d,), fp8=True),
        "b": _transposed(f"{base}in_proj_b.weight", (n,), (d,)),
        "a": _transposed(f"{base}in_proj_a.weight", (n,), (d,)),
        "A_log": _view(f"{base}A_log", ((n,),)),
        "dt_bias": _view(f"{base}dt_bias", ((n,),)),
        "norm": _view(f"{base}norm.weight", ((hv,),)),
        "out": _transposed(f"{base}out_proj.weight", (d,), (n, hv), fp8=True),
    }


def _attention(c: ModelConfig, base: str) -> dict[str, View]:
    d, n, k, h = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
    return {
        "q_gate": _transposed(f"{base}q_proj.weight", (n, 2, h), (d,), fp8=True),
        "k": _transposed(f"{base}k_proj.weight", (k, h), (d,), fp8=True),
        "v": _transposed(f"{base}v_proj.weight", (k, h), (d,), fp8=True),
        "q_norm": _view(f"{base}q_norm.weight", ((h,),)),
        "k_norm": _view(f"{base}k_norm.weight", ((h,),)),
        "out": _transposed(f"{base}o_proj.weight", (d,), (n, h), fp8=True),
    }


def _dense(d: int, f: int, base: str) -> dict[str, View]:
    return {
        "gate": _transposed(f"{base}gate_proj.weight", (f,), (d,), fp8=True),
        "up": _transposed(f"{base}up_proj.weight", (f,), (d,), fp8=True),
        "down": _transposed(f"{base}down_proj.weight", (d,), (f,), fp8=True),
    }


def _mlp(c: ModelConfig, base: str) -> dict:
    d, e, f = c.hidden_size, c.num_experts, c.moe_intermediate_size
    if not e:
        return _dense(d, c.intermediate_size, base)
    return {
        "router": _transposed(f"{base}gate.weight", (e,), (d,)),
        "experts": {
            "gate": _expert_half(f"{base}experts.gate_up_proj", (e, f, d), 0),
            "up": _expert_half(f"{base}experts.gate_up_proj", (e, f, d), 1),
            "down": _view(f"{base}experts.down_proj", ((e,), (d,), (f,)), (0, 2, 1), fp8=True),
        },
        "shared": _dense(d, c.shared_expert_intermediate_size, f"{base}shared_expert."),
        "shared_gate": _view(f"{base}shared_expert_gate.weight", ((), (d,))),
    }


def _expert_half(name: str, shape: tuple[int, int, int], half: int) -> View:
    """Gate (0) or up (1) of the fused experts [E, 2F, D], as [E, D, F]."""
    e, f, d = shape
    return View(name, (e, 2 * f, d), ((e,), (f,), (d,)), (0, 2, 1), (half * f, half * f + f), True, rows_axis=1)


def _layer(c: ModelConfig, base: str, full: bool) -> dict:
    mixer = _attention(c, f"{base}self_attn.") if full else _gated_delta_net(c, f"{base}linear_attn.")
    return {
        "input_norm": _norm(c, f"{base}input_layernorm"),
        "mixer": mixer,
        "post_norm": _norm(c, f"{base}post_attention_layernorm"),
        "mlp": _mlp(c, f"{base}mlp."),
    }


def _norm(c: ModelConfig, name: str) -> dict[str, View]:
    return {"scale": _view(f"{name}.weight", ((c.hidden_size,),))}


def _unit(c: ModelConfig, unit: int) -> dict:
    interval = c.full_attention_interval
    names = [f"{TEXT}layers.{unit * interval + i}." for i in range(interval)]
    return {"layers": {str(i): _layer(c, name, i == interval - 1) for i, name in enumerate(names)}}


def _mtp(c: ModelConfig) -> dict:
    d = c.hidden_size
    return {
        "fc": _view("mtp.fc.weight", ((d,), (2, d)), (1, 2, 0)),
        "embedding_norm": _norm(c, "mtp.pre_fc_norm_embedding"),
        "hidden_norm": _norm(c, "mtp.pre_fc_norm_hidden"),
        "layer": _layer(c, "mtp.layers.0.", full=True),
        "norm": _norm(c, "mtp.norm"),
    }


def parameter_views(config: ModelConfig, *, mtp: bool = True) -> dict[Path, View]:
    """The view of each parameter by its path in the unrolled tree, as ("units", 0, "layers", "1", "mixer", "q")."""
    vocabulary = ((config.vocab_size,), (config.hidden_size,))
    tree: dict = {"embed": {"embedding": _view(f"{TEXT}embed_tokens.weight", vocabulary)}}
    tree["units"] = {u: _unit(config, u) for u in range(config.num_units)}
    tree["final_norm"] = _norm(config, f"{TEXT}norm")
    if not config.tie_word_embeddings:
        tree["lm_head"] = {"kernel": _view("lm_head.weight", vocabulary)}
    if mtp:
        tree["mtp"] = _mtp(config)
    return dict(_flatten(tree))


def _flatten(tree: dict, prefix: Path = ()):
    for key, value in tree.items():
        path = (*prefix, key)
        yield from [(path, value)] if isinstance(value, View) else _flatten(value, path)


def tensor_parts(config: ModelConfig, *, mtp: bool = True, vision: bool = False) -> dict[str, list[tuple[Path, View]]]:
    """For every Hugging Face tensor the parameters that together fill it: what an export joins with `View.put`.

    `vision`: those of the vision tower too, whose paths begin with "vision".
    """
    parts: dict[str, list[tuple[Path, View]]] = {}
    views = parameter_views(config, mtp=mtp)
    if vision:
        views |= {("vision", *path): view for path, view in vision_views(config).items()}
    for path, view in views.items():
        parts.setdefault(view.name, []).append((path, view))
    return parts


def vision_views(config: ModelConfig) -> dict[Path, View]:
    """The view of each parameter of the vision tower by its path, as ("blocks", 0, "q", "weight"); empty without one."""
    v = config.vision
    if v is None:
        return {}
    d, merged = v.hidden_size, v.hidden_size * v.spatial_merge_size**2
    patch = (v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    proj = {
        "weight": _view(f"{VISION}patch_embed.proj.weight", ((d,), *((n,) for n in patch)), (1, 2, 3, 4, 0)),
        "bias": _view(f"{VISION}patch_embed.proj.bias", ((d,),)),
    }
    tree = {
        "embed": {"proj": proj, "positions": _view(f"{VISION}pos_embed.weight", ((v.num_position_embeddings,), (d,)))},
        "blocks": {b: _vision_block(config, f"{VISION}blocks.{b}.") for b in range(v.depth)},
        "merger": {
            "norm": _affine(f"{VISION}merger.norm", (d,)),
            "fc1": _affine(f"{VISION}merger.linear_fc1", (merged,), (merged,)),
            "fc2": _affine(f"{VISION}merger.linear_fc2", (v.out_hidden_size,), (merged,)),
        },
    }
    return dict(_flatten(tree))


def _vision_block(config: ModelConfig, base: str) -> dict:
    v = config.vision
    d, f = v.hidden_size, v.intermediate_size
    heads = (v.num_heads, d // v.num_heads)
    parts = {name: {"rows": (i * d, (i + 1) * d), "total": 3 * d} for i, name in enumerate("qkv")}
    return {
        "norm1": _affine(f"{base}norm1", (d,)),
        **{name: _affine(f"{base}attn.qkv", heads, (d,), **part) for name, part in parts.items()},
        "proj": _affine(f"{base}attn.proj", (d,), heads),
        "norm2": _affine(f"{base}norm2", (d,)),
        "fc1": _affine(f"{base}mlp.linear_fc1", (f,), (d,)),
        "fc2": _affine(f"{base}mlp.linear_fc2", (d,), (f,)),
    }


def _affine(name: str, outputs: tuple[int, ...], inputs: tuple[int, ...] = (), **part) -> dict[str, View]:
    """Weight and bias of a linear layer, or (without `inputs`) of a norm; `part`: the rows of a fused tensor."""
    weight = _transposed(f"{name}.weight", outputs, inputs, **part) if inputs else _view(f"{name}.weight", (outputs,))
    return {"weight": weight, "bias": _view(f"{name}.bias", (outputs,), **part)}


def vision_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the vision tower's tensors; empty for a text-only configuration."""
    return {view.name: view.tensor_shape for view in vision_views(config).values()}
