"""The gated delta rule over a few tokens for Hopper (Mosaic GPU): one warpgroup takes a strip of one head's state, all of the
key's width by WIDTH of the value's, advances it by every token in registers, and returns it to where it was.

Decoding moves 128 KiB a head and token through memory and computes little: what counts is that memory is never idle. So
blocks are persistent, and while one strip is advanced, copies (TMA) bring the next ones and take the last one away.
The state is read once:

    u = beta (v - e^g S^T k);  o = e^g S^T q + (q.k) u;  S' = e^g S + k u^T
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen35_jax.compat import HAS_MOSAIC_GPU, store_anyhow
from qwen35_jax.errors import UserError
from qwen35_jax.ops.gated_delta.xla import step_inputs
from qwen35_jax.ops.hopper import ring

KEYS = 128  # the key's width: the rows of the state
WIDTH = 64  # columns of the state that a warpgroup holds: 64 numbers a thread
STAGES = 3  # strips in a block's shared memory: one being advanced, one on its way out, the others on their way in
BLOCKS_PER_SM = 2  # as many as there is room for, 104 KiB each: one computes while another waits
KEY, QUERY, SCALARS, VALUES = range(4)  # rows of what comes with a token and head; the last are as many as it takes
DECAY, BETA, ALONG = range(3)  # its scalars: e^g, beta, q.k
SUMS = 2 * 2**10  # bytes of shared memory in which the warps' sums over the rows meet
# A thread holds four columns of every sixteenth row, eight threads a row: rows of 128 bytes are read whole, without bank
# conflicts, and sums over the rows of 32 columns take 8 shuffles (in the layout of `wgmma`: 24).
LAYOUT = plgpu.Layout.TILED(plgpu.Tiling(((16, 32), (4, 32), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def supports(key_width: int, value_width: int) -> bool:
    """Whether heads of these widths can be run."""
    return key_width == KEYS and value_width % WIDTH == 0


def gated_delta_step(q, k, v, g, beta, state, slots, active, normalize_qk, return_states):
    """See `ops.gated_delta.gated_delta_step`."""
    if not HAS_MOSAIC_GPU:
        raise UserError(f"gated_delta_step: pallas_gpu needs jax 0.11 or newer, this is {jax.__version__}; use xla")
    heads, value_width = v.shape[2:]
    if not supports(q.shape[3], value_width):
        raise UserError(
            f"gated_delta_step: pallas_gpu needs Hk = {KEYS} and Hv in multiples of {WIDTH}, not {q.shape[3]}, {value_width}"
        )
    slots = jnp.arange(q.shape[0], dtype=jnp.int32) if slots is None else slots
    dtype = v.dtype
    q, k, v, g, beta = step_inputs(q, k, v, g, beta, active, normalize_qk)
    q, k = (jnp.repeat(x, heads // q.shape[2], axis=2) for x in (q, k))
    scalars = jnp.stack([jnp.exp(g), beta, jnp.sum(q * k, axis=-1)], axis=-1)
    vectors = jnp.concatenate([_rows(x) for x in (k, q, scalars, v)], axis=3)
    out, *new = advance(slots, vectors, state, return_states)
    return out.astype(dtype), *new


def advance(slots, vectors, state, return_states: bool):
    """The states of the rows' slots, advanced by every token.

    vectors [B, T, N, rows, KEYS] fp32: all that a token and head need beside the state, in the rows named above, padded with
    zeros, so that one copy brings it: each has 128 arrivals at a barrier. Returns out [B, T, N, Hv] fp32, the new state and,
    when asked for, those after each token [B, T, N, Hk, Hv].
    """
    batch, time, heads = vectors.shape[:3]
    value_width = state.shape[3]
    blocks, stages = _room(time, vectors.shape[3])
    outputs = [jax.ShapeDtypeStruct((batch, time, heads, value_width), jnp.float32)]
    if return_states:
        outputs.append(jax.ShapeDtypeStruct((batch, time, *state.shape[1:]), state.dtype))
    items = batch * heads * (value_width // WIDTH)
    kernel = plgpu.kernel(
        functools.partial(_step_kernel, items),
        out_type=outputs,
        scratch_types=[
            plgpu.SMEM((stages, KEYS, WIDTH), jnp.float32),
            plgpu.SMEM((stages, time, *vectors.shape[3:]), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        ],
        grid=(min(ring.SMS * blocks, items),),
        grid_names=("sm",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, reduction_scratch_bytes=SUMS),
        kernel_name="gated_delta_step",
    )
    new = jax.new_ref(state)
    out, *states = kernel(slots, vectors, new)
    return out, jax.freeze(new), *states


def _room(time: int, rows: int) -> tuple[int, int]:
    """Blocks that a multiprocessor has room for, and strips in each, where each of `time` tokens comes with `rows` vectors."""
    for blocks in range(BLOCKS_PER_SM, 0, -1):
        stages = (ring.SHARED_MEMORY // blocks - SUMS) // (4 * KEYS * (WIDTH + time * rows))
        if stages >= 2:
            return blocks, min(STAGES, stages)
    raise UserError(f"gated_delta_step: pallas_gpu has no room for {time} tokens at a time; pass fewer or use xla")


def _rows(x: jax.Array) -> jax.Array:
    """[..., n] -> [..., rows of KEYS numbers, KEYS], padded with zeros."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % KEYS)])
    return x.reshape(*x.shape[:-1], -1, KEYS)


def _step_kernel(items: int, slots, vectors, state, out, *refs):
    """In memory: vectors [B, T, N, rows, KEYS], state [S, N, Hk, Hv], out [B, T, N, Hv], fp32; states [B, T, N, Hk, Hv] where
    asked for. An item is a strip of a row's head; neighbouring blocks take neighbouring ones."""
    *states, strips_smem, vectors_smem, loaded = refs
    time, heads, value_width = out.shape[1:]
    strips, stages = value_width // WIDTH, loaded.shape[0]
    blocks = lax.axis_size("sm")

    def place(item):
        head = lax.div(item, strips)
        return lax.div(head, heads), lax.rem(head, heads), lax.rem(item, strips)

    def load(item, slot, stage):
        row, head, strip = place(item)
        strip = state.at[slot, head, :, pl.ds(strip * WIDTH, WIDTH)]
        plgpu.copy_gmem_to_smem(strip, strips_smem.at[stage], loaded.at[stage])
        plgpu.copy_gmem_to_smem(vectors.at[row, :, head], vectors_smem.at[stage], loaded.at[stage])

    def step(item, count):
        stage, ahead = lax.rem(count, stages), item + (stages - 1) * blocks
        row, head, strip = place(item)
        columns = pl.ds(strip * WIDTH, WIDTH)
        # Read long before the copies need them.
        slot, slot_ahead = slots[row], slots[place(jnp.minimum(ahead, items - 1))[0]]
        values = VALUES + lax.div(strip * WIDTH, KEYS), pl.ds(lax.rem(strip * WIDTH, KEYS), WIDTH)
        plgpu.barrier_wait(loaded.at[stage])
        buffer = strips_smem.at[stage]
        matrix = plgpu.load(buffer, layout=LAYOUT, optimized=False)
        for t in range(time):
            token = vectors_smem.at[stage, t]
            key, query = (_over(_vector(token.at[i], axis=1), 0) for i in (KEY, QUERY))
            decay, beta, along = (token[SCALARS, i] for i in (DECAY, BETA, ALONG))
            update = beta * (_vector(token.at[values], axis=0) - decay * jnp.sum(key * matrix, axis=0))
            read = decay * jnp.sum(query * matrix, axis=0)
            store_anyhow(out.at[row, t, head, columns], read + along * update)
            matrix = decay * matrix + key * _over(update, 1)
            for ref in states:
                store_anyhow(ref.at[row, t, head, :, columns], matrix)
        store_anyhow(buffer, matrix)
        plgpu.commit_smem()  # copies may read what was written here, and overwrite what was read, only after a fence
        plgpu.copy_smem_to_gmem(buffer, state.at[slot, head, :, columns])
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the strip before has left its buffer

        @pl.when(ahead < items)
        def _():
            load(ahead, slot_ahead, lax.rem(count + stages - 1, stages))

        return count + 1

    for stage in range(stages - 1):
        item = lax.axis_index("sm") + stage * blocks
        pl.when(item < items)(lambda item=item, stage=stage: load(item, slots[place(item)[0]], stage))
    ring.each(items, step)
    plgpu.wait_smem_to_gmem(0)


def _vector(ref, axis: int) -> jax.Array:
    """A vector in shared memory, laid out as the state is but for `axis`."""
    return plgpu.load(ref, layout=LAYOUT.reduce(axis), optimized=False)


def _over(x: jax.Array, axis: int) -> jax.Array:
    """x over the rows (axis 0) or columns of the state."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (KEYS, WIDTH), (axis,)), LAYOUT)
