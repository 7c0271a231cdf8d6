"""The gated delta rule over a few tokens for Hopper (Mosaic GPU): one warpgroup reads a strip of one head's state, all of the
key's width by WIDTH of the value's, advances it by every token in registers, and writes it back to where it was.

Decoding moves 128 KiB a head and token through memory and computes little, so nothing goes through shared memory but the sums
over the key's width, and what hides the memory's latency are the multiprocessor's other warpgroups. The state is read once:

    u = beta (v - e^g S^T k);  o = e^g S^T q + (q.k) u;  S' = e^g S + k u^T
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen35_jax.compat import HAS_MOSAIC_GPU
from qwen35_jax.errors import UserError
from qwen35_jax.ops.gated_delta.xla import step_inputs

KEYS = 128  # the key's width: the rows of the state
WIDTH = 32  # columns of the state that a warpgroup holds: 32 numbers a thread
DECAY, BETA, ALONG = range(3)  # scalars of a token and head: e^g, beta, q.k


def supports(key_width: int, value_width: int) -> bool:
    """Whether heads of these widths can be run."""
    return key_width == KEYS and value_width % WIDTH == 0


def gated_delta_step(q, k, v, g, beta, state, slots, active, normalize_qk, return_states):
    """See `ops.gated_delta.gated_delta_step`."""
    if not HAS_MOSAIC_GPU:
        raise UserError(f"gated_delta_step: pallas_gpu needs jax 0.11 or newer, this is {jax.__version__}; use xla")
    batch, time, keys, key_width = q.shape
    heads, value_width = v.shape[2:]
    if not supports(key_width, value_width):
        raise UserError(
            f"gated_delta_step: pallas_gpu needs Hk = {KEYS} and Hv in multiples of {WIDTH}, not {key_width}, {value_width}"
        )
    slots = jnp.arange(batch, dtype=jnp.int32) if slots is None else slots
    dtype = v.dtype
    q, k, v, g, beta = step_inputs(q, k, v, g, beta, active, normalize_qk)
    along = jnp.repeat(jnp.sum(q * k, axis=-1), heads // keys, axis=2)
    scalars = jnp.stack([jnp.exp(g), beta, along], axis=-1)
    outputs = [jax.ShapeDtypeStruct(v.shape, jnp.float32)]
    if return_states:
        outputs.append(jax.ShapeDtypeStruct((batch, time, *state.shape[1:]), state.dtype))
    kernel = plgpu.kernel(
        functools.partial(_step_kernel, time, heads // keys),
        out_type=outputs,
        grid=(value_width // WIDTH, heads, batch),
        grid_names=("strip", "head", "row"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="gated_delta_step",
    )
    new = jax.new_ref(state)
    out, *states = kernel(slots, q, k, v, scalars, new)
    return out.astype(dtype), jax.freeze(new), *states


def _step_kernel(time: int, group: int, slots, q, k, v, scalars, state, out, states=None):
    """In memory: q, k [B, T, K, Hk], v, out [B, T, N, Hv], scalars [B, T, N, 3], state [S, N, Hk, Hv], fp32."""
    row, head = lax.axis_index("row"), lax.axis_index("head")
    strip = pl.ds(lax.axis_index("strip") * WIDTH, WIDTH)
    mine = state.at[slots[row], head, :, strip]
    matrix = plgpu.load(mine, layout=plgpu.Layout.WGMMA, optimized=False)
    for t in range(time):
        key, query = (_vector(x.at[row, t, head // group], axis=1) for x in (k, q))
        decay, beta, along = (scalars[row, t, head, i] for i in (DECAY, BETA, ALONG))
        columns = _over(key, 0)
        update = beta * (_vector(v.at[row, t, head, strip], axis=0) - decay * jnp.sum(columns * matrix, axis=0))
        out[row, t, head, strip] = decay * jnp.sum(_over(query, 0) * matrix, axis=0) + along * update
        matrix = decay * matrix + columns * _over(update, 1)
        if states is not None:
            states[row, t, head, :, strip] = matrix
    mine[...] = matrix


def _vector(ref, axis: int) -> jax.Array:
    """A vector in memory, laid out as the state is but for `axis`."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(axis), optimized=False)


def _over(x: jax.Array, axis: int) -> jax.Array:
    """x over the rows (axis 0) or columns of the state."""
    return lax.broadcast_in_dim(x, (KEYS, WIDTH), (axis,))
