"""Parameters are declared once, inside the modules, as shape + dtype + logical axes + initialiser.

Abstract trees, shardings, random initialisation and counts are derived here; the Hugging Face names are in `checkpoint/names.py`.
A module is split into its (static) graph and a nested dict of parameters, `nnx.split` and `nnx.merge` being the door between.
"""

from __future__ import annotations

import functools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from qwen35_jax.config import ModelConfig
from qwen35_jax.ops.fp8 import Fp8Weight
from qwen35_jax.sharding import Sharding

# The sides of a weight that FP8 scales cover in blocks of 128; the other letters (heads, experts, halves) keep their size.
BLOCKED_AXES = frozenset("DHF")
FP8_BLOCK = 128


def declare(config: ModelConfig, axes: str, shape: tuple[int, ...], init: str = "normal", *, dtype=None, fp8=False) -> nnx.Param:
    """One parameter: `axes` names its dimensions, `init` is normal | zeros | ones | a_log; `fp8`: FP8 checkpoints quantise it."""
    value: Any = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype or config.dtype))
    if fp8 and config.fp8_weights:
        letters = axes.split()
        blocks = tuple(-(-n // FP8_BLOCK) if a in BLOCKED_AXES else n for a, n in zip(letters, shape, strict=True))
        value = Fp8Weight(jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn), jax.ShapeDtypeStruct(blocks, jnp.bfloat16))
    return nnx.Param(value, axes=axes, init=init, fp8=fp8)


def declarations(module: nnx.Module) -> dict:
    """The module's parameters as a nested dict of nnx.Param."""
    tree: dict = {}
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = variable
    return tree


def _is_param(x: Any) -> bool:
    return isinstance(x, nnx.Param)


def abstract(tree: dict, sharding: Sharding, units: int | None = None) -> dict:
    """ShapeDtypeStructs with shardings, in the structure of the declarations; with a leading axis of `units` where stacked."""

    def leaf(p: nnx.Param):
        value = p.get_value()
        spec = sharding.parameter_spec(p.axes, *(x.shape for x in jax.tree.leaves(value)))
        lead, spec = ((units,), (None, *spec)) if units else ((), spec)
        place = NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(lead + x.shape, x.dtype, sharding=place), value)

    return jax.tree.map(leaf, tree, is_leaf=_is_param)


def scatter(tree: Any, sharding: Sharding, whole: int) -> Any:
    """Abstract parameters, cut over the data axes as well; their first `whole` dimensions (stacked units) stay as they are."""

    def leaf(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        place = NamedSharding(sharding.mesh, sharding.fully_sharded(x.sharding.spec, x.shape, whole))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return jax.tree.map(leaf, tree)


def without_units(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """A stacked abstract parameter as one unit has it."""
    place = NamedSharding(x.sharding.mesh, jax.sharding.PartitionSpec(*x.sharding.spec[1:]))
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=place)


def gather(params: dict, wanted: dict, sharding: Sharding) -> dict:
    """The inverse, of arrays inside a compiled step: laid out as the abstract `wanted`."""
    kept = scatter(wanted, sharding, 0)

    def leaf(x, place, want):
        # Named twice, so that what is gathered is this slice and not the stack that it was taken from.
        x = jax.lax.with_sharding_constraint(x, place.sharding)
        return jax.lax.with_sharding_constraint(x, want.sharding)

    return jax.tree.map(leaf, params, kept, wanted)


def initialise(tree: dict, places: dict, seed: int, scale: float, unit: int | None = None) -> dict:
    """Random arrays for the declarations, made on the devices that hold them: `places` is the abstract tree.

    A parameter's numbers depend on `seed`, its path and its unit alone: stacked, unrolled and sharded trees are equal.
    """

    def leaf(path, p: nnx.Param, place):
        name = zlib.crc32(f"{unit} {jax.tree_util.keystr(path)}".encode())
        value = p.get_value()
        if not isinstance(value, Fp8Weight):
            return _random(p.init, value, scale, seed, name, place.sharding)
        # e4m3 numbers of unit variance under one scale: the distribution of the unquantised weight.
        values = _random("normal", value.values, 1.0, seed, name, place.values.sharding)
        return Fp8Weight(values, _place(np.full(value.scales.shape, scale, value.scales.dtype), place.scales.sharding))

    return jax.tree_util.tree_map_with_path(leaf, tree, places, is_leaf=lambda x: isinstance(x, nnx.Param | Fp8Weight))


def stack(trees: tuple, places: Any) -> Any:
    """One tree with a leading unit axis, for `lax.scan`, from a tuple of trees; `places` is the abstract stacked tree."""
    shardings = jax.tree.map(lambda x: x.sharding, places)
    return jax.jit(lambda *t: jax.tree.map(lambda *x: jnp.stack(x), *t), out_shardings=shardings)(*trees)


def _random(init: str, value: jax.ShapeDtypeStruct, scale: float, seed: int, name: int, place: NamedSharding) -> jax.Array:
    shape, dtype = value.shape, value.dtype
    if init in ("zeros", "ones"):
        return _place(np.full(shape, init == "ones", dtype), place)
    if math.prod(shape) > HOST_ELEMENTS:
        key = jax.random.fold_in(jax.random.key(seed), name & 0x7FFFFFFF)
        return _normal_on_device(shape, dtype, place)(key, scale)
    draw = np.random.Generator(np.random.Philox(key=[seed, name]))
    if init == "a_log":  # in float32: bfloat16 can round the uniform to 0, and the logarithm to -inf
        return _place(np.log(draw.uniform(0.01, 16.0, shape)).astype(dtype), place)
    return _place((draw.standard_normal(shape, np.float32) * np.float32(scale)).astype(dtype), place)


# Up to this size the host draws: compiling a generator for yet another shape takes longer than drawing does.
HOST_ELEMENTS = 1 << 22


def _place(x: np.ndarray, place: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(x.shape, place, lambda index: x[index])


@functools.lru_cache
def _normal_on_device(shape: tuple[int, ...], dtype, place: NamedSharding):
    def draw(key, scale):
        return (jax.random.normal(key, shape, jnp.float32) * scale).astype(dtype)

    return jax.jit(draw, out_shardings=place)


def count(tree: dict) -> int:
    """Number of parameters of a tree of declarations; scales of FP8 weights are no parameters."""

    def size(p: nnx.Param) -> int:
        value = p.get_value()
        return math.prod((value.values if isinstance(value, Fp8Weight) else value).shape)

    return sum(size(p) for p in jax.tree.leaves(tree, is_leaf=_is_param))
