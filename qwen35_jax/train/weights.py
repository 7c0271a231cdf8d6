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

from qwen35_jax.model import Model
from qwen35_jax.train.fp8 import Fp8Layers
from qwen35_jax.train.lora import merge_lora
from qwen35_jax.train.partition import join


def kept_params(model: Model, dtype="float32") -> dict:
    """ShapeDtypeStructs of the parameters as they are kept: stacked, fully sharded; every leaf `dtype`."""

    def leaf(x: jax.ShapeDtypeStruct, whole: int):
        place = _kept_place(model, x, whole)
        return jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=place)

    return _by_part(model.abstract_params(stacked=True), leaf)


def _kept_place(model: Model, x: jax.ShapeDtypeStruct, whole: int) -> NamedSharding:
    return NamedSharding(model.sharding.mesh, model.sharding.fully_sharded(x.sharding.spec, x.shape, whole))


def _by_part(params: dict, leaf) -> dict:
    """leaf(x, stacked axes) for every leaf: 1 below "units", else 0."""
    return {name: jax.tree.map(lambda x, n=name: leaf(x, int(n == "units")), tree) for name, tree in params.items()}


@dataclasses.dataclass(frozen=True)
class Weights:
    """From what training keeps to the parameters that the model's functions take, inside a compiled step."""

    model: Model
    fp8: Fp8Layers | None = None  # which products are FP8
    statistics: bool = False  # gradients of FP8 layers are what `Fp8Layers.report` reads

    @functools.cached_property
    def _wanted(self) -> dict:
        return self.model.abstract_params(stacked=True)

    def combine(self, trained: dict, frozen: dict) -> dict:
        """One tree for `top` and `unit`: a dict whose "units" have a leading unit axis on every leaf."""
        return join(trained, frozen)

    def top(self, kept: dict) -> dict:
        """Everything but the units, gathered; the units untouched."""
        return {name: tree if name == "units" else self._gather(name, tree) for name, tree in kept.items()}

    def unit(self, kept: Any) -> dict:
        """One unit's parameters (no unit axis), gathered."""
        return self._gather("units", kept)

    def _gather(self, name: str, tree: dict) -> dict:
        stacked = int(name == "units")

        def leaf(x, w):
            kept = _kept_place(self.model, w, stacked)
            places = [NamedSharding(s.mesh, P(*s.spec[stacked:])) for s in (w.sharding, kept)]
            return _gathered(*places, w.dtype, x)

        tree = jax.tree.map(leaf, tree, self._wanted[name])
        return tree if self.fp8 is None else self.fp8.wrap(tree, f"{name}/", self.statistics)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraWeights(Weights):
    """Frozen matrices with trained updates of low rank, merged when they are needed."""

    config: ConfigDict
    axes: dict  # of the parameters, without the unit axis

    def combine(self, trained: dict, frozen: dict) -> dict:
        return {name: (tree, trained.get(name, {})) for name, tree in frozen.items()}

    def merged(self, trained: dict, frozen: dict) -> dict:
        """All parameters, stacked, with the updates in them."""
        axes = self.axes | {"units": jax.tree.map(lambda a: f"U {a}", self.axes["units"])}
        return merge_lora(frozen, trained, self.config, axes, jnp.float32)

    def _gather(self, name: str, tree: tuple[dict, dict]) -> dict:
        frozen, factors = tree
        return merge_lora(super()._gather(name, frozen), factors, self.config, self.axes[name])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gathered(wanted: NamedSharding, kept: NamedSharding, dtype, x: jax.Array) -> jax.Array:
    """x cast and laid out as wanted; its gradient is laid out as x is kept, so that summing it over the data axes scatters it."""
    return jax.lax.with_sharding_constraint(x.astype(dtype), wanted)


def _gathered_forward(wanted, kept, dtype, x):
    return _gathered(wanted, kept, dtype, x), jnp.zeros((), x.dtype)


def _gathered_backward(wanted, kept, dtype, like, gradient):
    return (jax.lax.with_sharding_constraint(gradient, kept).astype(like.dtype),)


_gathered.defvjp(_gathered_forward, _gathered_backward)
