"""What every layer is told about the tokens of a step, and the decoding state that it reads and writes."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from qwen35_jax.config import ModelConfig
from qwen35_jax.sharding import Sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """One step's tokens as the layers see them.

    cos, sin: [B, T, R] float32 rotary angles. segment_ids: [B, T] int32, non-decreasing over real tokens, 0 = padding.
    With a decoding state: start [B] int32 tokens already cached, and slots [B] int32 (None: row b is slot b), counted within the
    device's own share of the slots. chunk: with context parallelism, the tokens of each prefill, by which the cache is laid out
    (see `ops.attention.ShardedCache`).
    """

    cos: jax.Array
    sin: jax.Array
    segment_ids: jax.Array
    start: jax.Array | None = None
    slots: jax.Array | None = None
    chunk: int = dataclasses.field(default=0, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackedState:
    """A layer's part of the decoding state, left in the stacks of all layers' for a kernel to read and write in place.

    parts: arrays [U, L, S, ...] by name, or [U, S, ...] of one layer a unit. place: int32 [], the layer's own among the U * L.
    """

    parts: dict
    place: jax.Array

    def joined(self, layers: int, slots: jax.Array | None) -> tuple[dict, jax.Array]:
        """(the parts with their `layers` axes of layers and the one of slots as one, the layer's `slots` in it; None: all)."""
        count = next(iter(self.parts.values())).shape[layers]
        slots = self.place * count + (jnp.arange(count, dtype=jnp.int32) if slots is None else slots)
        return {name: x.reshape(-1, *x.shape[layers + 1 :]) for name, x in self.parts.items()}, slots

    def updated(self, joined: dict) -> StackedState:
        """The inverse, with new numbers."""
        parts = {name: joined[name].reshape(x.shape) for name, x in self.parts.items()}
        return dataclasses.replace(self, parts=parts)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VisionRows:
    """What takes the place of a step's placeholders: rows [B, T, D] of the vision tower, at the tokens of mask [B, T] bool."""

    rows: jax.Array
    mask: jax.Array


# Logical axes of the decoding state: U units, L Gated DeltaNet layers of a unit, S slots, P places of the cache, W the three
# tokens of a window.
STATE_AXES = {
    "k": "U S K P H",
    "v": "U S K P H",
    "conv_q": "U L S W K H",
    "conv_k": "U L S W K H",
    "conv_v": "U L S W N H",
    "recurrent": "U L S N H H",
    "length": "S",
    "rotary_offset": "S",
}


def abstract_state(config: ModelConfig, sharding: Sharding, slots: int, capacity: int, *, stacked: bool = True) -> dict:
    """Shapes, dtypes and shardings of the state of `slots` sequences of at most `capacity` tokens.

    Stacked like the units' parameters, or as tuples with one array a layer: unrolled, XLA:CPU copies a stack to update it.
    """
    units, layers = config.num_units, config.full_attention_interval - 1
    kv = (units, slots, sharding.heads(config.num_key_value_heads), capacity, config.head_dim)
    keys, values = (sharding.heads(n) for n in (config.linear_num_key_heads, config.linear_num_value_heads))
    dk, dv = config.linear_key_head_dim, config.linear_value_head_dim
    window = (units, layers, slots, config.linear_conv_kernel_dim - 1)
    # XLA:CPU updates a bfloat16 array by converting all of it to float32 and back; keys and values are exact in either.
    cpu = sharding.mesh.devices.flat[0].platform == "cpu"
    dtype = "float32" if cpu else config.dtype
    shapes = {
        "k": (kv, dtype),
        "v": (kv, dtype),
        "conv_q": ((*window, keys, dk), config.dtype),
        "conv_k": ((*window, keys, dk), config.dtype),
        "conv_v": ((*window, values, dv), config.dtype),
        "recurrent": ((units, layers, slots, values, dk, dv), "float32"),
        "length": ((slots,), "int32"),
        "rotary_offset": ((slots,), "int32"),
    }

    def leaf(name: str):
        shape, dtype = shapes[name]
        axes = STATE_AXES[name].split()
        lead = 0 if stacked else axes.index("S")
        place = NamedSharding(sharding.mesh, sharding.spec(" ".join(axes[lead:])))
        value = jax.ShapeDtypeStruct(shape[lead:], jnp.dtype(dtype), sharding=place)
        return (value,) * math.prod(shape[:lead]) if lead else value

    return {name: leaf(name) for name in shapes}


def zero_slots(state: dict, reset: jax.Array) -> dict:
    """The state with the slots of `reset` [S] bool emptied, so that they can be used again. Keys and values need no clearing:
    nothing reads beyond `length`."""

    def clear(x: jax.Array, axis: int) -> jax.Array:
        mask = reset.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
        return jnp.where(mask, jnp.zeros((), x.dtype), x)

    def part(name: str, x):
        if name in ("k", "v"):
            return x
        if isinstance(x, tuple):
            return tuple(clear(a, 0) for a in x)
        return clear(x, STATE_AXES[name].split().index("S"))

    return {name: part(name, x) for name, x in state.items()}


def take_slots(sharding: Sharding, x: jax.Array, slots: jax.Array) -> jax.Array:
    """Rows x[slots] of x [S, ...], slots [B] counted within each device's own share."""
    axes = " ".join(["S", *"D" * (x.ndim - 1)])
    return sharding.shard_map(lambda x, slots: x[slots], (axes, "B"), axes.replace("S", "B"))(x, slots)


def put_slots(sharding: Sharding, x: jax.Array, slots: jax.Array, rows: jax.Array) -> jax.Array:
    """x [S, ...] with x[slots] replaced by rows [B, ...]."""
    axes = " ".join(["S", *"D" * (x.ndim - 1)])
    put = sharding.shard_map(lambda x, slots, rows: x.at[slots].set(rows), (axes, "B", axes.replace("S", "B")), axes)
    return put(x, slots, rows)


def take_token(sharding: Sharding, x: jax.Array, index: jax.Array) -> jax.Array:
    """Row x[b, index[b]] of each sequence of x [B, T, D]: [B, D]. index [B] counts over the whole sequence."""
    axis = sharding.context_axis

    def local(x, index):
        if axis is None:
            return jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]
        index = index - jax.lax.axis_index(axis) * x.shape[1]
        here = (index >= 0) & (index < x.shape[1])
        row = jnp.take_along_axis(x, jnp.clip(index, 0, x.shape[1] - 1)[:, None, None], axis=1)[:, 0]
        return jax.lax.psum(jnp.where(here[:, None], row, jnp.zeros((), x.dtype)), axis)

    return sharding.shard_map(local, ("B T D", "B"), "B D")(x, index)
