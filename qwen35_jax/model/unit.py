"""One decoder layer, and the repeating unit of `full_attention_interval` layers: Gated DeltaNet … Gated DeltaNet, attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qwen35_jax.config import ModelConfig
from qwen35_jax.model.attention import GatedAttention
from qwen35_jax.model.gated_delta_net import GatedDeltaNet
from qwen35_jax.model.inputs import Inputs, StackedState
from qwen35_jax.model.mlp import make_mlp
from qwen35_jax.model.params import declare
from qwen35_jax.ops.forms import Forms
from qwen35_jax.ops.norm import rms_norm
from qwen35_jax.sharding import Sharding

LINEAR_STATE = ("conv_q", "conv_k", "conv_v", "recurrent")
ATTENTION_STATE = ("k", "v")


class RMSNorm(nnx.Module):
    """Zero-centred: the stored scale is an offset from 1."""

    def __init__(self, config: ModelConfig):
        self.scale = declare(config, "D", (config.hidden_size,), "zeros")
        self.eps = config.rms_norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale.get_value(), self.eps)


class DecoderLayer(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, mixer: nnx.Module, sharding: Sharding, forms: Forms):
        self.input_norm = RMSNorm(config)
        self.mixer = mixer
        self.post_norm = RMSNorm(config)
        self.mlp = make_mlp(config, sharding, forms)

    def __call__(self, x: jax.Array, inputs: Inputs, state: dict | None = None):
        """x [B, T, D] -> (x, the mixer's state, the load of the layer's experts or None)."""
        mixed, state = self.mixer(self.input_norm(x), inputs, state)
        x = x + mixed
        y, load = self.mlp(self.post_norm(x), inputs)
        return x + y, state, load


class Unit(nnx.Module):
    """The repeating unit."""

    def __init__(self, config: ModelConfig, sharding: Sharding, forms: Forms):
        count = config.full_attention_interval
        mixers = [GatedDeltaNet(config, sharding, forms) for _ in range(count - 1)]
        mixers.append(GatedAttention(config, sharding, forms))
        self.layers = nnx.Dict({str(i): DecoderLayer(config, m, sharding, forms) for i, m in enumerate(mixers)})

    def __call__(self, x: jax.Array, inputs: Inputs, state: dict | None = None, u: jax.Array | int = 0):
        """x [B, T, D] and the decoding state of all units -> (x after unit u, the state, x after each layer of the unit, the
        load of the unit's experts, or None without experts).

        Each layer's part of a stacked state is sliced out, updated and written back, the pattern that a scan does in place; or
        left in the stack, where the layer's kernel finds it.
        """
        after, loads = [], []
        last = len(self.layers) - 1
        for i in range(last + 1):
            names, index, sizes = (LINEAR_STATE, (u, i), last) if i < last else (ATTENTION_STATE, (u,), 1)
            layer = self.layers[str(i)]
            in_stack = layer.mixer.steps_in_stack(x)
            part = None if state is None else _part({name: state[name] for name in names}, index, sizes, in_stack)
            x, part, load = layer(x, inputs, part)
            if state is not None:
                state = state | _with_part({name: state[name] for name in names}, part, index, sizes)
            after.append(x)
            loads.append(load)
        return x, state, after, jax.tree.map(lambda *parts: sum(parts), *loads)


def _part(state: dict, index: tuple, layers: int, in_stack: bool) -> dict | StackedState:
    """A layer's part of the state, cut out or, where it is stacked, left there."""
    if in_stack and not any(isinstance(x, tuple) for x in state.values()):
        return StackedState(state, jnp.asarray(_flat(index, layers), jnp.int32))
    return {name: _slice(x, index, layers) for name, x in state.items()}


def _with_part(state: dict, part: dict | StackedState, index: tuple, layers: int) -> dict:
    """The state with a layer's new part."""
    if isinstance(part, StackedState):
        return part.parts
    return {name: _write(x, part[name], index, layers) for name, x in state.items()}


def unit_state(state: dict | None, u: int, units: int) -> dict | None:
    """Unit u's part of the decoding state of an unrolled model: the arrays of its layers."""
    if state is None:
        return None
    counts = {name: len(state[name]) // units for name in LINEAR_STATE + ATTENTION_STATE}
    return {name: state[name][u * n : (u + 1) * n] for name, n in counts.items()}


def with_unit_state(state: dict | None, u: int, part: dict | None) -> dict | None:
    """The state with unit u's new part."""
    if state is None:
        return None
    return state | {name: (*state[name][: u * len(x)], *x, *state[name][(u + 1) * len(x) :]) for name, x in part.items()}


def _flat(index: tuple[int, ...], layers: int) -> int:
    """Place of (unit, layer of the unit) in a tuple with one array a layer."""
    return index[0] * layers + sum(index[1:])


def _slice(x: jax.Array | tuple, index: tuple, layers: int) -> jax.Array:
    if isinstance(x, tuple):
        return x[_flat(index, layers)]
    n = len(index)
    return jax.lax.dynamic_slice(x, (*index, *[0] * (x.ndim - n)), (*[1] * n, *x.shape[n:])).reshape(x.shape[n:])


def _write(x: jax.Array | tuple, part: jax.Array, index: tuple, layers: int) -> jax.Array | tuple:
    if isinstance(x, tuple):
        place = _flat(index, layers)
        return (*x[:place], part, *x[place + 1 :])
    n = len(index)
    return jax.lax.dynamic_update_slice(x, part[(None,) * n], (*index, *[0] * (x.ndim - n)))


def apply_units(unit: Callable[[Any, Any, Any], Any], params: Any, carry: Any) -> Any:
    """carry = unit(params of unit u, u, carry) for each unit in order.

    `params` is a tuple of trees (unrolled, see `Model.stacked`) or one tree with a leading unit axis (`lax.scan`: trace and
    compile time do not grow with depth).
    """
    if isinstance(params, tuple):
        for u, unit_params in enumerate(params):
            carry = unit(unit_params, u, carry)
        return carry
    count = jax.tree.leaves(params)[0].shape[0]

    def step(carry, xs):
        return unit(*xs, carry), None

    return jax.lax.scan(step, carry, (params, jnp.arange(count)))[0]
