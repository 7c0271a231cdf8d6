"""The gradient of the gated delta rule once the state's is known, as a Pallas kernel for Hopper (Mosaic GPU).

Nothing is carried from chunk to chunk here: thread blocks go through the chunks of all value heads and fetch the next while
they compute one, since two of them do not fit into a multiprocessor. In the units of
`gpu_chunks.py`, with S the state before the chunk, dS the gradient of the state after it and dR = dv:

    dP = d_out u^T;  dL = -tril(dR u^T, -1);  Y = s D w dP;  X = r D w dL
    dq = s a (d_out S^T) + Y k;  dk = -r a (dR S^T) + b w (u dS^T) + (X + X^T) k + Y^T q

One warpgroup takes the queries, one the keys. The gradient of g is summed over the spans that cross each token, as in
`tpu_backward.py`; `gate_gradients` finishes it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen35_jax.ops.gated_delta.gpu_chunks import (
    AFTER,
    BETA,
    CHUNK,
    OUT,
    READ,
    TOTAL,
    WIDTH,
    WRITE,
    bf16,
    decay_between,
    f32,
    index,
    inverse_length,
    on_columns,
    on_rows,
    per_column,
    per_row,
    strictly_lower,
)
from qwen35_jax.ops.hopper import matrices
from qwen35_jax.ops.hopper.matrices import product, turned
from qwen35_jax.ops.hopper.ring import each

# Rows of the gates' gradients, a pair where queries and keys have parts that are added: spans between tokens, w times 1 / r,
# the decay from the chunk's start; then u.(k dS) r, and sums over rows of S * dS.
SPANS, WEIGHTS, BEFORE, WRITTEN, CROSSED, ROWS = 0, 2, 4, 6, 7, 8
SUMS = 512  # numbers of shared memory by which a warpgroup's warps add up
QUERIES, KEYS = range(2)  # the two warpgroups, and their parts of what comes in pairs


class _Block:
    """The references of one block by name, and what both warpgroups do."""

    def __init__(self, normalize: bool, group: int, refs):
        (self.q_ref, self.k_ref, self.gates_ref, self.scalars_ref, self.updates_ref, self.d_out_ref, self.dv_ref,
         self.states_ref, self.d_states_ref, self.dq_ref, self.dk_ref, self.rows_ref,
         self.all_tokens, self.all_gates, *self.single, self.sums,
         self.tokens_loaded, self.updates_loaded, self.states_loaded, self.rights_loaded, self.together) = refs  # fmt: skip
        self.normalize, self.group = normalize, group
        batch, chunks, heads = self.gates_ref.shape[:3]
        self.sizes, self.total = (batch, chunks, heads), batch * chunks * heads

    def place(self, item):
        """Of a chunk of a value head: its index, its rows of q and k, and of what a value head has."""
        _, chunks, heads = self.sizes
        n, m, b = lax.rem(item, heads), lax.rem(lax.div(item, heads), chunks), lax.div(item, heads * chunks)
        tokens = pl.ds(m * CHUNK, CHUNK)
        return (b, m, n), (b, tokens, lax.div(n, jnp.int32(self.group))), (b, tokens, n)

    def take(self, turn, item) -> None:
        """Makes this the chunk that is computed. The compiler would compute all addresses in shared memory ahead of the loop, and
        spill them, if they did not depend on the turn: `turn >> 20` is zero, which it does not know (tests/aot would show it)."""
        slot = lax.rem(turn, 2)
        self.tokens, self.gates, self.slot = self.all_tokens.at[slot], self.all_gates.at[slot], slot
        self.chunk, _, self.values = self.place(item)
        self.single_at(lax.shift_right_logical(turn, jnp.int32(20)))

    def single_at(self, zero) -> None:
        """Names the buffers of which there is one."""
        (self.scalars, self.updates, self.rights, self.state, self.d_state,
         self.squares, self.earlier, self.lengths, self.rows) = (ref.at[zero] for ref in self.single)  # fmt: skip

    def load_tokens(self, turn, item) -> None:
        slot = lax.rem(turn, 2)
        chunk, keys, _ = self.place(item)
        for source, buffer in (
            (self.q_ref.at[keys], self.all_tokens.at[slot, QUERIES]),
            (self.k_ref.at[keys], self.all_tokens.at[slot, KEYS]),
            (self.gates_ref.at[chunk], self.all_gates.at[slot]),
        ):
            plgpu.copy_gmem_to_smem(source, buffer, self.tokens_loaded.at[slot])

    def load_states(self, item) -> None:
        """The updates, of which the scores are made, and then the states."""
        chunk, *_ = self.place(item)
        plgpu.copy_gmem_to_smem(self.updates_ref.at[chunk], self.updates, self.updates_loaded)
        for source, buffer in (
            (self.states_ref.at[chunk], self.state),
            (self.d_states_ref.at[chunk], self.d_state),
            (self.scalars_ref.at[chunk], self.scalars),
        ):
            plgpu.copy_gmem_to_smem(source, buffer, self.states_loaded)

    def load_right(self, part: int, item) -> None:
        source = (self.d_out_ref, self.dv_ref)[part].at[self.place(item)[2]]
        plgpu.copy_gmem_to_smem(source, self.rights.at[part], self.rights_loaded.at[part])

    def meet(self) -> None:
        plgpu.barrier_arrive(self.together)
        plgpu.barrier_wait(self.together)

    def through_scores(self, part: int, factor: jax.Array) -> None:
        """Leaves Y of queries, X of keys in their square; writes the rows of spans and of weights. factor: s, or -r."""
        between = per_row(factor) * decay_between(self.gates)
        if part == KEYS:
            between = strictly_lower(between)
        scores = product((self.tokens.at[part], turned(self.tokens.at[KEYS])))
        plgpu.barrier_wait(self.updates_loaded)
        plgpu.barrier_wait(self.rights_loaded.at[part])
        d_scores = product((self.rights.at[part], self.updates)) * between
        both = d_scores * scores
        lengths = on_columns(self.lengths)
        weights = per_column(lengths * on_columns(self.gates.at[BETA]))
        self.rows[WEIGHTS + part] = matrices.sum_of_rows(both, self.sums[part]) * lengths
        self.squares[part] = (d_scores * weights).astype(bf16)
        crossing = product(((both * weights).astype(bf16), self.earlier))
        crossing = jnp.where(index(0) >= index(1), crossing, 0.0)
        self.rows[SPANS + part] = matrices.sum_of_rows(crossing, self.sums[part])

    def through_state(self, part: int, factor: jax.Array) -> jax.Array:
        """The part of dq or dk that passes the state before the chunk; factor: s a, or -r a. Writes the row of its decay."""
        d_tokens = product((self.rights.at[part], self.state)) * per_row(factor, WIDTH)
        self.rows[BEFORE + part] = jnp.sum(d_tokens * self.read_tokens(part), axis=1)
        return d_tokens

    def read_tokens(self, part: int) -> jax.Array:
        return plgpu.load(self.tokens.at[part], layout=plgpu.Layout.WGMMA).astype(f32)

    def write(self, part: int, dx: jax.Array, length: jax.Array, ref) -> None:
        """What of dx is not along x, where the length of x does not count, to the head's rows of ref."""
        if self.normalize:
            x = self.read_tokens(part)
            dx -= per_row(length * length * jnp.sum(x * dx, axis=1), WIDTH) * x
        self.rights[part] = dx.astype(bf16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.rights.at[part], ref.at[self.values])

    def finish(self, part: int, following, more) -> None:
        """Waits until what was written has left, and fetches what stands in its place next."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        pl.when(more)(lambda: self.load_right(part, following))
        self.meet()  # all of this chunk has been read


def gradient_kernel(normalize: bool, group: int, *refs):
    """Grid (multiprocessor), each with its share of the chunks of all value heads. q, k [B, T, K, Hk]; gates [B, M, N, 6, C] and
    scalars of `chunk_kernel`; updates [B, M, N, Hv, C]; d_out, dv [B, T, N, Hv]; states and d_states [B, M, N, Hv, Hk] -> dq
    and dk of each value head [B, T, N, Hk] and the rows [B, M, N, ROWS, C] fp32."""
    block = _Block(normalize, group, refs)
    part = lax.axis_index("part")
    first = lax.axis_index("sm")
    block.single_at(0)

    @pl.when(part == QUERIES)
    def _():
        block.load_tokens(0, first)
        block.load_right(QUERIES, first)
        block.load_states(first)
        block.earlier[...] = jnp.where(index(0) < index(1), 1.0, 0.0).astype(bf16)
        _each(block, _queries)

    @pl.when(part == KEYS)
    def _():
        block.single_at(0)  # again: the queries' loop has named them by its own turn
        block.load_right(KEYS, first)
        _each(block, _keys)


def _each(block: _Block, body) -> None:
    """body(block, turn, next one, whether there is one) for each chunk that is this thread block's."""

    def step(item, turn):
        block.take(turn, item)
        following = item + lax.axis_size("sm")
        body(block, turn, following, following < block.total)
        return turn + 1

    each(block.total, step)


def _queries(block: _Block, turn, following, more) -> None:
    pl.when(more)(lambda: block.load_tokens(turn + 1, following))
    plgpu.barrier_wait(block.tokens_loaded.at[block.slot])
    length = inverse_length(block.tokens.at[QUERIES], block.normalize)
    plgpu.commit_smem()
    block.meet()  # the lengths of keys, and `earlier`
    block.through_scores(QUERIES, length * WIDTH**-0.5)
    plgpu.commit_smem()
    plgpu.barrier_wait(block.states_loaded)
    block.rows[CROSSED] = _crossed(block)
    dq = block.through_state(QUERIES, on_rows(block.scalars.at[OUT]))
    plgpu.commit_smem()
    block.meet()  # the rows, and Y; the states have been read
    pl.when(more)(lambda: block.load_states(following))
    dq += product((block.squares.at[QUERIES], block.tokens.at[KEYS]))
    block.write(QUERIES, dq, length, block.dq_ref)
    plgpu.copy_smem_to_gmem(block.rows, block.rows_ref.at[block.chunk])
    block.finish(QUERIES, following, more)


def _crossed(block: _Block) -> jax.Array:
    """S * dS summed to 64 numbers; their sum is what counts."""
    total = None
    for half in range(WIDTH // CHUNK):
        rows = pl.ds(half * CHUNK, CHUNK)
        x, y = (plgpu.load(ref.at[rows], layout=plgpu.Layout.WGMMA) for ref in (block.state, block.d_state))
        sums = jnp.sum(x.astype(f32) * y.astype(f32), axis=1)
        total = sums if total is None else total + sums
    return total


def _keys(block: _Block, turn, following, more) -> None:
    plgpu.barrier_wait(block.tokens_loaded.at[block.slot])
    length = inverse_length(block.tokens.at[KEYS], block.normalize)
    block.lengths[...] = length
    block.meet()
    block.through_scores(KEYS, -length)
    plgpu.barrier_wait(block.states_loaded)
    written = product((turned(block.updates), block.d_state))
    block.rows[WRITTEN] = length * jnp.sum(written * block.read_tokens(KEYS), axis=1)
    dk = per_row(on_rows(block.scalars.at[WRITE]), WIDTH) * written
    dk += block.through_state(KEYS, -on_rows(block.scalars.at[READ]))
    plgpu.commit_smem()
    block.meet()
    lower, mixing = block.squares.at[KEYS], block.squares.at[QUERIES]
    keys, queries = block.tokens.at[KEYS], block.tokens.at[QUERIES]
    dk += product((lower, keys), (turned(lower), keys), (turned(mixing), queries))
    block.write(KEYS, dk, length, block.dk_ref)
    block.finish(KEYS, following, more)


def gate_gradients(rows: jax.Array, gates: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradients of g and beta [B, M, N, C] from the kernel's rows [B, M, N, ROWS, C] and the gates [B, M, N, 6, C].

    Token t's decay is in every span that crosses t: in those from the chunk's start to t or later, and in those to its end
    from before t.
    """

    def pair(which: int):
        return rows[..., which, :] + rows[..., which + 1, :]

    written = gates[..., AFTER, :] * rows[..., WRITTEN, :]
    d_beta = pair(WEIGHTS) + written
    d_after = gates[..., BETA, :] * written
    from_here = lax.cumsum(pair(BEFORE), axis=3, reverse=True)
    # Of the tokens before: shifted, since taking the token's own part away from a sum that holds it would lose small ones.
    earlier = jnp.cumsum(jnp.pad(d_after[..., :-1], [(0, 0)] * 3 + [(1, 0)]), axis=-1)
    crossed = gates[..., TOTAL, :] * jnp.sum(rows[..., CROSSED, :], axis=-1, keepdims=True)
    return pair(SPANS) + from_here + earlier + crossed, d_beta
