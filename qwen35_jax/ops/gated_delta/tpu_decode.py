"""The gated delta rule over a few tokens for TPU: one grid step reads the state of a few heads of one slot, advances it by every
token and writes it back to where it was.

Decoding moves 128 KiB a head and token through memory and computes little, so the products are elementwise, on the vector
unit, in float32. A state [Hk, Hv] has the key's width on sublanes: what multiplies it from the left is a column, which costs
lane broadcasts and is made once a key head. The state is read once, for k and q together:

    u = beta (v - e^g S^T k);  o = e^g S^T q + (q.k) u;  S' = e^g S + k u^T
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen35_jax.errors import UserError
from qwen35_jax.ops.gated_delta.tpu import LANES, supports
from qwen35_jax.ops.gated_delta.tpu_kernels import Tile

HEADS = 32  # value heads of a grid step, where the heads divide so: 1 MiB of state, whose transfer hides the next step's work
SUBLANES = 8  # a block's heads are a multiple of them, or all
SPARE_VMEM = 8 * 2**20  # for all that is not a state, what the compiler spills included


def gated_delta_step(q, k, v, g, beta, state, slots, active, normalize_qk, return_states):
    """See `ops.gated_delta.gated_delta_step`."""
    batch, time, keys, key_width = q.shape
    heads, value_width = v.shape[2:]
    if not supports(key_width, value_width):
        raise UserError(f"gated_delta_step: pallas_tpu needs Hk, Hv in multiples of {LANES}, not {key_width}, {value_width}")
    slots = jnp.arange(batch, dtype=jnp.int32) if slots is None else slots
    tile = decode_tile(keys, heads, key_width, value_width, normalize_qk)
    g, beta = g.astype(jnp.float32), beta.astype(jnp.float32)
    if active is not None:
        g, beta = (jnp.where(active[..., None], x, 0) for x in (g, beta))
    gates = by_block(jnp.stack([g, beta], axis=2), tile).reshape(batch, -1, 2 * time, tile.heads)
    specs = DecodeSpecs(tile, time)
    inputs = [specs.keys, specs.keys, specs.values, specs.rows(2 * time), specs.state]
    outputs, shapes = [specs.values, specs.state], [jax.ShapeDtypeStruct(v.shape, v.dtype), state]
    if return_states:
        outputs.append(specs.states)
        shapes.append(jax.ShapeDtypeStruct((batch, time, *state.shape[1:]), state.dtype))
    kernel = functools.partial(_step_kernel, tile, time)
    return tuple(call(kernel, "gated_delta_step", specs, (slots,), (q, k, v, gates, state), inputs, outputs, shapes, {5: 1}))


def decode_tile(keys: int, heads: int, key_width: int, value_width: int, normalize: bool) -> Tile:
    """What a grid step works on: the fewest key heads with HEADS value heads, among those that blocks can have."""
    group = heads // keys
    sizes = [n for n in range(SUBLANES, keys, SUBLANES) if keys % n == 0 and n * group >= HEADS]
    return Tile(min(sizes, default=keys), group, key_width, value_width, normalize)


def by_block(x: jax.Array, tile: Tile) -> jax.Array:
    """[B, ..., N] -> [B, blocks, ..., heads]: a block's lanes must be all of an axis."""
    x = x.reshape(*x.shape[:-1], -1, tile.heads)
    return jnp.moveaxis(x, -2, 1)


class DecodeSpecs:
    """Blocks on the grid (row, head block); the slots of the rows are known before the grid starts."""

    def __init__(self, tile: Tile, time: int):
        square = (tile.heads, tile.key_width, tile.value_width)
        self.tile, self.time = tile, time
        self._heads = {"k": (tile.keys, tile.key_width), "v": (tile.heads, tile.value_width)}
        self.keys, self.values = self._tokens("k"), self._tokens("v")
        self.state = pl.BlockSpec((None, *square), lambda b, h, slots, *_: (slots[b], h, 0, 0))
        self.states = pl.BlockSpec((None, time, *square), lambda b, h, *_: (b, 0, h, 0, 0))

    def _tokens(self, kind: str) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.time, *self._heads[kind]), lambda b, h, *_: (b, 0, h, 0))

    def rows(self, count: int, shared: bool = False) -> pl.BlockSpec:
        """`count` scalars a head: [B, blocks, count, heads], or [1, blocks, count, heads] for all rows."""
        return pl.BlockSpec((None, None, count, self.tile.heads), lambda b, h, *_: (0 if shared else b, h, 0, 0))

    def weight(self, taps: int, kind: str) -> pl.BlockSpec:
        """[taps, heads, width] of key ("k") or value ("v") heads."""
        return pl.BlockSpec((taps, *self._heads[kind]), lambda b, h, *_: (0, h, 0))

    def window(self, tokens: int, kind: str) -> pl.BlockSpec:
        """[S, tokens, heads, width] of key ("k") or value ("v") heads."""
        return pl.BlockSpec((None, tokens, *self._heads[kind]), lambda b, h, slots, *_: (slots[b], 0, h, 0))


def call(kernel, name: str, specs: DecodeSpecs, scalars, operands, inputs, outputs, shapes, aliases):
    """Runs the kernel on every row and head block. scalars: the slots, and what else is known before the grid starts; operands
    begin with q, k, v; aliases: of inputs, scalars included, to the outputs that take their place."""
    batch, time, heads, width = operands[2].shape
    states = batch * heads * specs.tile.key_width * width
    in_place = [i - len(scalars) for i in aliases]
    operands = [_in_hbm(x) if i in in_place else x for i, x in enumerate(operands)]
    kept = aliases.values()
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars), grid=(batch, heads // specs.tile.heads), in_specs=inputs, out_specs=outputs
        ),
        out_shape=[(pltpu.HBM if i in kept else jax.ShapeDtypeStruct)(x.shape, x.dtype) for i, x in enumerate(shapes)],
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=_vmem_bytes(specs, len(outputs) > len(aliases) + 1)
        ),
        cost_estimate=pl.CostEstimate(
            flops=7 * time * states,
            bytes_accessed=8 * states + 2 * sum(math.prod(x.shape) * x.dtype.itemsize for x in operands[:3]),
            transcendentals=batch * time * heads,
        ),
        name=name,
    )(*scalars, *operands)


def _vmem_bytes(specs: DecodeSpecs, every_state: bool) -> int:
    """What a grid step needs: two buffers of each block. XLA keeps the rest of VMEM for weights and activations."""
    tile = specs.tile
    state = 4 * tile.heads * tile.key_width * tile.value_width
    return 2 * (2 + (specs.time if every_state else 0)) * state + SPARE_VMEM


def _in_hbm(x: jax.Array) -> jax.Array:
    """Keeps XLA from moving the array into VMEM and back: only a few blocks of it are touched, and each once."""
    return pltpu.with_memory_space_constraint(x, pltpu.HBM)


def _step_kernel(tile: Tile, time: int, _, q, k, v, gates, state, out, new, states=None):
    """Blocks q, k [T, keys, Hk]; v, out [T, heads, Hv]; gates [2 T, heads], g and beta of each token; state [heads, Hk, Hv]."""
    columns = gates[...].T
    for t in range(time):
        token = [x[t].astype(jnp.float32) for x in (q, k, v)]
        decay, beta = jnp.exp(columns[:, 2 * t : 2 * t + 1]), columns[:, 2 * t + 1 : 2 * t + 2]
        out[t] = advance(tile, *token, decay, beta, state if t == 0 else new, new).astype(out.dtype)
        if states is not None:
            states[t] = new[...]


def advance(tile: Tile, q, k, v, decay, beta, state, new) -> jax.Array:
    """One token of all heads: q, k [keys, Hk], v [heads, Hv], decay, beta [heads, 1] fp32; `new` gets the state after it.

    Each stage is written for all heads before the next, so that no head waits for its own sums.
    """
    if tile.normalize:
        q, k = (x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6) for x in (q, k))
    q = q * tile.key_width**-0.5
    along = jnp.sum(q * k, axis=-1, keepdims=True)
    columns = jnp.concatenate([k, q]).T
    k_state, q_state = [], []
    for j in range(tile.keys):
        key, query = (_column(columns, at, tile) for at in (j, tile.keys + j))
        for n in tile.group_of(j):
            k_state.append(jnp.sum(key * state[n], axis=0, keepdims=True))
            q_state.append(jnp.sum(query * state[n], axis=0, keepdims=True))
    along = jnp.concatenate([along[n // tile.group : n // tile.group + 1] for n in range(tile.heads)])
    update = beta * (v - decay * jnp.concatenate(k_state))
    for j in range(tile.keys):
        key = _column(columns, j, tile)
        for n in tile.group_of(j):
            new[n] = decay[n : n + 1] * state[n] + key * update[n : n + 1]
    return decay * jnp.concatenate(q_state) + along * update


def _column(columns: jax.Array, at: int, tile: Tile) -> jax.Array:
    return jnp.broadcast_to(columns[:, at : at + 1], (tile.key_width, tile.value_width))
