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
from flax import nnx
from jax.sharding import NamedSharding

from qwen35_jax.config import ModelConfig
from qwen35_jax.ops.fp8 import Fp8Weight
from qwen35_jax.sharding import Sharding

# The sides of a weight that FP8 scales cover in blocks of 128; the other letters (heads, experts, halves) keep their size.
BLOCKED_AXES = frozenset("DHF")
FP8_BLOCK = 128


def declare(config: ModelConfig, axes: str, shape: tuple[int, ...], init: str = "normal", *, dtype=None, fp8=False) -> nnx.Param:
    """One parameter: `axes` names its dimensions, `init` is normal | zeros | ones | a_log, `fp8` that FP8 checkpoints quantise it."""
    value: Any = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype or config.dtype))
    if fp8 and config.fp8_weights:
        letters = axes.split()
        blocks = tuple(-(-n // FP8_BLOCK) if a in BLOCKED_AXES else n for a, n in zip(letters, shape, strict=True))
        value = Fp8Weight(jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn), jax.ShapeDtypeStruct(blocks, jnp.bfloat16))
    return nnx.Param(value, axes=axes, init=init)


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


def initialise(tree: dict, sharding: Sharding, key: jax.Array, scale: float, units: int | None = None) -> Any:
    """Random arrays for the declarations, made on the devices that hold them.

    A parameter's numbers depend on its path, the unit and `key` alone: stacked, unrolled and sharded trees are equal.
    With `units` returns a tuple of that many trees (see `stack`).
    """

    def leaf(key, path, p: nnx.Param):
        name = zlib.crc32(jax.tree_util.keystr(path).encode()) & 0x7FFFFFFF
        return _random(jax.random.fold_in(key, name), p, scale)

    def build(key):
        return jax.tree_util.tree_map_with_path(functools.partial(leaf, key), tree, is_leaf=_is_param)

    places = jax.tree.map(lambda x: x.sharding, abstract(tree, sharding))
    build = jax.jit(build, out_shardings=places)
    return build(key) if units is None else tuple(build(jax.random.fold_in(key, u)) for u in range(units))


def stack(trees: tuple, places: Any) -> Any:
    """One tree with a leading unit axis, for `lax.scan`, from a tuple of trees; `places` is the abstract stacked tree."""
    shardings = jax.tree.map(lambda x: x.sharding, places)
    return jax.jit(lambda *t: jax.tree.map(lambda *x: jnp.stack(x), *t), out_shardings=shardings)(*trees)


def _random(key: jax.Array, p: nnx.Param, scale: float) -> Any:
    value = p.get_value()
    if isinstance(value, Fp8Weight):
        # e4m3 numbers of unit variance under one scale: the distribution of the unquantised weight.
        values = jax.random.normal(key, value.values.shape, jnp.bfloat16).astype(value.values.dtype)
        return Fp8Weight(values, jnp.full(value.scales.shape, scale, value.scales.dtype))
    if p.init == "normal":
        return (jax.random.normal(key, value.shape, jnp.float32) * scale).astype(value.dtype)
    if p.init == "a_log":  # in float32: bfloat16 can round the uniform to 0, and the logarithm to -inf
        return jnp.log(jax.random.uniform(key, value.shape, jnp.float32, 0.01, 16.0)).astype(value.dtype)
    return {"zeros": jnp.zeros, "ones": jnp.ones}[p.init](value.shape, value.dtype)


def count(tree: dict) -> int:
    """Number of parameters of a tree of declarations; scales of FP8 weights are no parameters."""

    def size(p: nnx.Param) -> int:
        value = p.get_value()
        return math.prod((value.values if isinstance(value, Fp8Weight) else value).shape)

    return sum(size(p) for p in jax.tree.leaves(tree, is_leaf=_is_param))
