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

HEADS = 16  # value heads of a grid step, where the heads divide so: 1 MiB of state, whose transfer hides the next step's work
SUBLANES = 8  # a block's heads are a multiple of them, or all
VMEM_BYTES = 48 * 2**20


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
    return tuple(call(kernel, "gated_delta_step", specs, slots, (q, k, v, gates, state), inputs, outputs, shapes, {5: 1}))


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
        self.tile = tile
        self.keys = pl.BlockSpec((None, time, tile.keys, tile.key_width), lambda b, h, *_: (b, 0, h, 0))
        self.values = pl.BlockSpec((None, time, tile.heads, tile.value_width), lambda b, h, *_: (b, 0, h, 0))
        self.state = pl.BlockSpec((None, *square), lambda b, h, slots, *_: (slots[b], h, 0, 0))
        self.states = pl.BlockSpec((None, time, *square), lambda b, h, *_: (b, 0, h, 0, 0))

    def rows(self, count: int) -> pl.BlockSpec:
        """`count` scalars a head: [B, blocks, count, heads]."""
        return pl.BlockSpec((None, None, count, self.tile.heads), lambda b, h, *_: (b, h, 0, 0))


def call(kernel, name: str, specs: DecodeSpecs, slots, operands, inputs, outputs, shapes, aliases):
    """Runs the kernel on every row and head block; `aliases`: input (counting the slots) to the output that takes its place."""
    batch, time, heads, width = operands[2].shape
    states = batch * heads * specs.tile.key_width * width
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(batch, heads // specs.tile.heads), in_specs=inputs, out_specs=outputs
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes],
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=pl.CostEstimate(
            flops=7 * time * states,
            bytes_accessed=8 * states + 2 * sum(math.prod(x.shape) * x.dtype.itemsize for x in operands[:3]),
            transcendentals=batch * time * heads,
        ),
        name=name,
    )(slots, *operands)


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
