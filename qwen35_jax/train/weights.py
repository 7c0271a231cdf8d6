"""Parameters as training keeps them and as the model wants them.

Kept: float32 (in the model's dtype where frozen), units stacked, each leaf cut over all data axes as well (ZeRO-3).
Wanted: the model's dtype, cut over `model` alone, gathered a unit at a time and again in the backward pass.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from qwen35_jax.model import Model, VisionModel
from qwen35_jax.sharding import Sharding
from qwen35_jax.train.fp8 import Fp8Layers
from qwen35_jax.train.lora import merge_lora
from qwen35_jax.train.partition import flatten, join, unflatten

# Trees whose leaves have a leading axis that a scan takes slices of.
STACKED = ("units", "vision/blocks")


def wanted_params(model: Model, tower: VisionModel | None = None) -> dict:
    """ShapeDtypeStructs of the parameters as the models take them, stacked; a vision tower's under "vision"."""
    params = model.abstract_params(stacked=True)
    return params if tower is None else params | {"vision": tower.abstract_params()}


def kept_params(model: Model, tower: VisionModel | None = None) -> dict:
    """ShapeDtypeStructs of the parameters as they are kept: stacked, fully sharded, float32."""

    def leaf(path: str, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=_kept_place(path, x))

    return unflatten({path: leaf(path, x) for path, x in flatten(wanted_params(model, tower)).items()})


def _kept_place(path: str, x: jax.ShapeDtypeStruct) -> NamedSharding:
    """A tower that `model` does not divide is kept in pieces all the same."""
    axes = ("replica", "data", "model") if path.startswith("vision/") else ("replica", "data")
    spec = Sharding(x.sharding.mesh).fully_sharded(x.sharding.spec, x.shape, int(path.startswith(STACKED)), axes)
    return NamedSharding(x.sharding.mesh, spec)


def _node(tree: dict, path: str) -> Any:
    return functools.reduce(lambda node, name: node[name], path.split("/"), tree)


@dataclasses.dataclass(frozen=True)
class Weights:
    """From what training keeps to the parameters that the model's functions take, inside a compiled step."""

    model: Model
    fp8: Fp8Layers | None = None  # which products are FP8
    statistics: bool = False  # gradients of FP8 layers are what `Fp8Layers.report` reads
    tower: VisionModel | None = None  # of a run with pictures

    @functools.cached_property
    def _forms(self) -> dict:
        """Each parameter as it is wanted and as it is kept, a pair."""
        wanted, kept = wanted_params(self.model, self.tower), kept_params(self.model, self.tower)
        return jax.tree.map(lambda *forms: forms, wanted, kept)

    def combine(self, trained: dict, frozen: dict) -> dict:
        """One tree for the methods below: a dict whose "units" have a leading unit axis on every leaf."""
        return join(trained, frozen)

    def top(self, kept: dict) -> dict:
        """Everything but the units and the vision tower, gathered; those two untouched."""
        return {name: tree if name in ("units", "vision") else self._gather(name, tree) for name, tree in kept.items()}

    def unit(self, kept: Any) -> dict:
        """One unit's parameters (no unit axis), gathered."""
        return self._gather("units", kept)

    def vision(self, kept: dict) -> dict:
        """The vision tower but for its blocks, gathered; the blocks untouched."""
        return {name: tree if name == "blocks" else self._gather(f"vision/{name}", tree) for name, tree in kept.items()}

    def block(self, kept: Any) -> dict:
        """One block's parameters (no axis of depth), gathered."""
        return self._gather("vision/blocks", kept)

    def _gather(self, prefix: str, tree: dict) -> dict:
        stacked = int(prefix in STACKED)

        def leaf(x: jax.Array, forms: tuple) -> jax.Array:
            places = (NamedSharding(form.sharding.mesh, P(*form.sharding.spec[stacked:])) for form in forms)
            return _gathered(*places, forms[0].dtype, bool(stacked), x)

        tree = jax.tree.map(leaf, tree, _node(self._forms, prefix))
        return tree if self.fp8 is None else self.fp8.wrap(tree, f"{prefix}/", self.statistics)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraWeights(Weights):
    """Frozen matrices with trained updates of low rank, merged when they are needed."""

    config: ConfigDict
    axes: dict  # of the parameters, as `logical_axes` has them

    def combine(self, trained: dict, frozen: dict) -> dict:
        def pairs(frozen: dict, trained: dict) -> dict:
            return {name: (tree, trained.get(name, {})) for name, tree in frozen.items()}

        combined = pairs(frozen, trained)
        return combined | ({"vision": pairs(*combined["vision"])} if "vision" in combined else {})

    def merged(self, trained: dict, frozen: dict) -> dict:
        """All parameters, stacked, with the updates in them."""
        return merge_lora(frozen, trained, self.config, self.axes, jnp.float32)

    def _gather(self, prefix: str, tree: tuple[dict, dict]) -> dict:
        frozen, factors = tree
        axes = jax.tree.map(lambda a: a.removeprefix("U "), _node(self.axes, prefix))
        return merge_lora(super()._gather(prefix, frozen), factors, self.config, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _gathered(wanted: NamedSharding, kept: NamedSharding, dtype, scanned: bool, x: jax.Array) -> jax.Array:
    """x cast and laid out as wanted; its gradient is laid out as x is kept, so that summing it over the data axes scatters it."""
    if scanned:  # else XLA casts all units before the scan that takes them one by one, and holds both
        x = jax.lax.optimization_barrier(x)
    return jax.lax.with_sharding_constraint(x.astype(dtype), wanted)


def _gathered_forward(wanted, kept, dtype, scanned, x):
    return _gathered(wanted, kept, dtype, scanned, x), jnp.zeros((), x.dtype)


def _gathered_backward(wanted, kept, dtype, scanned, like, gradient):
    return (jax.lax.with_sharding_constraint(gradient, kept).astype(like.dtype),)


_gathered.defvjp(_gathered_forward, _gathered_backward)
