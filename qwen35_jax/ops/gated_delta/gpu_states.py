"""The state of the gated delta rule carried from chunk to chunk, as a Pallas kernel for Hopper (Mosaic GPU).

Everything stands transposed, S^T [Hv, Hk] and u^T [Hv, C]: then what one product leaves in registers is the left operand
of the next, and nothing of the chain through a chunk goes through shared memory:

    R^T = v^T - (S^T k^T) r a;  u^T = R^T (I + L)^-T;  o^T = (S^T q^T) s a + u^T P^T;  S'^T = c S^T + (u^T b w) k
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen35_jax.compat import store_anyhow
from qwen35_jax.ops.gated_delta.gpu_chunks import (
    ACROSS,
    CHUNK,
    INVERSE,
    INVERSE_REST,
    MIXING,
    OUT,
    READ,
    WIDTH,
    WRITE,
    bf16,
    f32,
    on_columns,
    on_rows,
    per_column,
    per_row,
    two_parts,
)
from qwen35_jax.ops.hopper.matrices import products, turned

STAGES = 2  # chunks in shared memory at once
PARTS = 2  # warpgroups, each for half of a value head's width
HALF = WIDTH // PARTS


def load_turned(ref) -> jax.Array:
    """A matrix [n, 64] in shared memory, transposed into registers."""
    return plgpu.layout_cast(plgpu.load(turned(ref), layout=plgpu.Layout.WGMMA_TRANSPOSED), plgpu.Layout.WGMMA)


def widened(x: jax.Array) -> jax.Array:
    """bfloat16 as float32, by its bits: of a number just rounded the compiler makes a conversion at a quarter of the rate."""
    bits = lax.bitcast_convert_type(x, jnp.int16).astype(jnp.int32)
    return lax.bitcast_convert_type(lax.shift_left(bits, jnp.int32(16)), f32)


def store_turned(ref, x: jax.Array) -> None:
    turned(ref)[...] = plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)


def solve(right: jax.Array, inverse, inverse_rest, meanwhile) -> list[jax.Array]:
    """right (I + L)^-1 of [Hv / 2, C], fp32, and what `meanwhile` returns. Both are taken in two parts: where keys repeat, terms
    nearly cancel."""
    high, low = two_parts(right)
    return products([(high, inverse), (high, inverse_rest), (low, inverse)], meanwhile=meanwhile)


class _Ring:
    """Chunks on their way through shared memory, STAGES at once; the first warpgroup asks for them.

    No warpgroup is set apart for that: it would have to hand its registers over (setmaxnreg), which the assembler ignores
    where it links (nvJitLink), and then spills.
    """

    def __init__(self, chunks: int, sources, buffers, loaded, consumed):
        self.chunks, self.sources, self.buffers, self.loaded, self.consumed = chunks, sources, buffers, loaded, consumed

    def _load(self, step, slot) -> None:
        for source, buffer in zip(self.sources(step), self.buffers, strict=True):
            plgpu.copy_gmem_to_smem(source, buffer.at[slot], self.loaded.at[slot])

    def drain(self, body, carry):
        """body(step, chunk in shared memory, load the next, carry) -> carry, for each chunk, in both warpgroups. The body calls
        `load the next` where it would wait for something else."""
        leader = lax.axis_index("part") == 0

        @pl.when(leader)
        def _():
            for step in range(min(STAGES - 1, self.chunks)):
                self._load(step, step)

        def load_next(step):
            ahead = step + STAGES - 1
            slot = lax.rem(ahead, STAGES)

            @pl.when(leader & (ahead < self.chunks))
            def _():
                pl.when(step > 0)(lambda: plgpu.barrier_wait(self.consumed.at[slot]))
                self._load(ahead, slot)

        def take(step, carry):
            slot = lax.rem(step, STAGES)
            plgpu.barrier_wait(self.loaded.at[slot])
            chunk = Chunk(*(buffer.at[slot] for buffer in self.buffers))
            carry = body(step, chunk, functools.partial(load_next, step), carry)
            plgpu.commit_smem()  # the TMA may write what was read here only after a fence
            plgpu.barrier_arrive(self.consumed.at[slot])
            return carry

        return lax.fori_loop(0, self.chunks, take, carry)


class Chunk:
    """One chunk of a head in shared memory: q, k [C, Hk], v or its output's gradient [C, Hv], squares and scalars."""

    def __init__(self, q, k, values, squares, scalars):
        self.q, self.k, self.values, self._squares, self._scalars = q, k, values, squares, scalars

    def square(self, which: int):
        return self._squares.at[pl.ds(which * CHUNK, CHUNK)]

    def per_token(self, which: int) -> jax.Array:
        """A scalar of each token, over the columns of [Hv / 2, C]."""
        return per_column(on_columns(self._scalars.at[which]), HALF)

    def across(self) -> jax.Array:
        return per_row(on_rows(self._scalars.at[ACROSS]), WIDTH)


def _ring(chunks: int, group: int, backwards: bool, q_ref, k_ref, values_ref, squares_ref, scalars_ref, buffers, barriers):
    b, n = lax.axis_index("batch"), lax.axis_index("head")

    def sources(step):
        m = chunks - 1 - step if backwards else step
        tokens, j = pl.ds(m * CHUNK, CHUNK), lax.div(n, jnp.int32(group))
        keys = b, tokens, j
        return q_ref.at[keys], k_ref.at[keys], values_ref.at[b, tokens, n], squares_ref.at[b, m, n], scalars_ref.at[b, m, n]

    return _Ring(chunks, sources, buffers, *barriers)


def _load_state(ref) -> jax.Array:
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)


def forward_kernel(chunks: int, group: int, q_ref, k_ref, v_ref, squares_ref, scalars_ref, first_ref, out_ref, final_ref,
                   *refs):  # fmt: skip
    """Grid (head, batch). first, final [B, N, Hv, Hk] fp32; saved where asked for: states [B, M, N, Hv, Hk], the state
    before each chunk, and updates [B, M, N, Hv, C], u^T."""
    *saved, buffers, out_smem, state_smem, barriers = refs
    ring = _ring(chunks, group, False, q_ref, k_ref, v_ref, squares_ref, scalars_ref, buffers, barriers)
    b, n, part = (lax.axis_index(name) for name in ("batch", "head", "part"))
    rows = pl.ds(part * HALF, HALF)

    def step(m, chunk, load_next, state):
        low = state.astype(bf16)

        def behind_reads():
            load_next()
            if saved:
                _send(low, state_smem.at[part], saved[0].at[b, m, n, rows])
            return load_turned(chunk.values.at[:, rows]), chunk.per_token(READ)

        reads = [(low, turned(chunk.k))], [(low, turned(chunk.q))]
        k_read, q_read, values, read = products(*reads, meanwhile=behind_reads)

        def behind_solve():
            return chunk.per_token(OUT) * q_read, chunk.per_token(WRITE)

        inverse = (turned(chunk.square(i)) for i in (INVERSE, INVERSE_REST))
        update, out, write = solve(values.astype(f32) - read * k_read, *inverse, behind_solve)
        update = update.astype(bf16)
        written = (write * widened(update)).astype(bf16)

        def send_update():
            if saved:
                _send(update, out_smem.at[part], saved[1].at[b, m, n, rows])

        sums = [(written, chunk.k)], [(update, turned(chunk.square(MIXING)))]
        gained, out = products(*sums, totals=[None, out], meanwhile=send_update)
        _send_turned(out.astype(bf16), out_smem.at[part], out_ref.at[b, pl.ds(m * CHUNK, CHUNK), n, rows])
        return chunk.across() * state + gained

    state = ring.drain(step, _load_state(first_ref.at[b, n, rows]))
    store_anyhow(final_ref.at[b, n, rows], state)
    plgpu.wait_smem_to_gmem(0)


def reverse_kernel(chunks: int, group: int, q_ref, k_ref, d_out_ref, squares_ref, scalars_ref, d_final_ref,
                   dv_ref, d_first_ref, d_states_ref, buffers, dv_smem, state_smem, barriers):  # fmt: skip
    """The gradient of the state, last chunk first; grid (head, batch). Shapes as in `forward_kernel`: dv as out, d_states as
    states, the gradient of the state after each chunk.

        du = P^T d_out + b w (k dS);  dv = (I + L)^-T du;  dS <- c dS - k^T (r a dv) + q^T (s a d_out)
    """
    ring = _ring(chunks, group, True, q_ref, k_ref, d_out_ref, squares_ref, scalars_ref, buffers, barriers)
    b, n, part = (lax.axis_index(name) for name in ("batch", "head", "part"))
    rows = pl.ds(part * HALF, HALF)

    def step(i, chunk, load_next, d_state):
        m = chunks - 1 - i
        low, d_out = d_state.astype(bf16), load_turned(chunk.values.at[:, rows])

        def behind_reads():
            load_next()
            _send(low, state_smem.at[part], d_states_ref.at[b, m, n, rows])
            return [chunk.per_token(WRITE)]

        reads = [(d_out, chunk.square(MIXING))], [(low, turned(chunk.k))]
        mixed, k_d_state, write = products(*reads, meanwhile=behind_reads)

        def behind_solve():
            return (chunk.per_token(OUT) * d_out.astype(f32)).astype(bf16), -chunk.per_token(READ)

        inverse = (chunk.square(i) for i in (INVERSE, INVERSE_REST))
        dv, d_q_read, read = solve(mixed + write * k_d_state, *inverse, behind_solve)
        d_k_read = (read * dv).astype(bf16)

        def send_dv():
            _send_turned(dv.astype(bf16), dv_smem.at[part], dv_ref.at[b, pl.ds(m * CHUNK, CHUNK), n, rows])

        (gained,) = products([(d_k_read, chunk.k), (d_q_read, chunk.q)], meanwhile=send_dv)
        return chunk.across() * d_state + gained

    d_state = ring.drain(step, _load_state(d_final_ref.at[b, n, rows]))
    store_anyhow(d_first_ref.at[b, n, rows], d_state)
    plgpu.wait_smem_to_gmem(0)


def _send(x: jax.Array, buffer, destination) -> None:
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    buffer[...] = x
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffer, destination)


def _send_turned(x: jax.Array, buffer, destination) -> None:
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    store_turned(buffer, x)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffer, destination)
