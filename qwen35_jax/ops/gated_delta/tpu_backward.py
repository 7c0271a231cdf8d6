"""The gradient of the gated delta rule as a Pallas kernel (Mosaic TPU): one grid step is one chunk, the last chunk first.

In the units of `tpu_kernels.py`, with P = D * q k^T, e = s d_out and dS the gradient of the state after the chunk:

    du = P^T e + b (k dS);  dR = (I + L)^-T du;  dL = -tril(dR u^T, -1);  dP = e u^T
    dq = a e S^T + (D * dP) k;  dk = -w a dR S^T + (X + X^T) k + (D * dP)^T q + b u dS^T, X = w D * dL
    dS <- c dS + k^T (-w a dR) + q^T (a e)

r and s depend on k and q too, which subtracts what is along k and q. g gets the sum of dL * L + dP * P over the spans
that cross each token: the closed form in q.dq - k.dk loses every digit where decay is strong.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from qwen35_jax.ops.gated_delta.tpu_kernels import CHUNK, Decays, Tile, Tokens, dot, index, solve, strictly_lower

# Gradients of a head's scalars [C, 1] wait in columns of one array: of a, b, the spans, r beta (then of beta), and w.
BEFORE, AFTER, SPANS, BETA, WEIGHT = range(5)


class _Chunk:
    """The blocks and the scratch of one grid step, by name, and what is computed once."""

    def __init__(self, tile: Tile, refs):
        self.tile = tile
        (self.q, self.k, self.v, self.g, self.beta, self.states, self.inverse, self.updates, self.d_out, self.d_final,
         self.dq, self.dk, self.dv, self.dg, self.dbeta, self.d_first,
         self.d_state, self.lower, self.between, self.scores, self.rights, self.d_tokens, self.columns) = refs  # fmt: skip
        self.dtype = self.v.dtype

    def column(self, kind: int, n: int):
        at = kind * self.tile.heads + n
        return slice(None), slice(at, at + 1)


def backward_kernel(tile: Tile, *refs):
    """Blocks as in `forward_kernel`, the saved ones among the inputs; outputs dq, dk, dv, dg, dbeta, d_first."""
    chunk = _Chunk(tile, refs)

    @pl.when(pl.program_id(2) == 0)
    def _():
        chunk.d_state[...] = chunk.d_final[...]

    decays = Decays(chunk.g[...], chunk.beta[...])
    tokens = [Tokens(tile, chunk.q, chunk.k, j) for j in range(tile.keys)]
    for j, t in enumerate(tokens):
        chunk.scores[j] = dot(t.both, t.k, "ij,kj")
        for n in tile.group_of(j):
            chunk.between[n] = decays.between(n)
            weight = decays.beta(n) * t.length * t.length
            chunk.lower[n] = strictly_lower(chunk.between[n] * chunk.scores[j, :CHUNK] * weight)
    for j, t in enumerate(tokens):
        chunk.d_tokens[j] = sum(_through_state(chunk, decays, t, j, n) for n in tile.group_of(j))
    for j, t in enumerate(tokens):
        _through_scores(chunk, decays, t, j)
    _write_gates(chunk)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        chunk.d_first[...] = chunk.d_state[...]


def _through_state(chunk: _Chunk, decays: Decays, t: Tokens, j: int, n: int) -> jax.Array:
    """The products with the state of value head n; returns its part of dk and dq, one above the other [2 C, Hk]."""
    f32, value = jnp.float32, (slice(None), chunk.tile.value(n))
    before, after, across = decays.before(n), decays.after(n), decays.across[n : n + 1]
    weight = decays.beta(n) * t.length * t.length
    update, state, d_state = chunk.updates[value], chunk.states[n], chunk.d_state[n]
    low_d_state = d_state.astype(chunk.dtype)
    d_out = (t.scale * chunk.d_out[value].astype(f32)).astype(chunk.dtype)
    mixing = (chunk.between[n] * chunk.scores[j, CHUNK:]).astype(chunk.dtype)
    k_d_state = after * dot(t.k, low_d_state)
    d_right = solve(chunk.lower[n], chunk.inverse[n], dot(mixing, d_out, "ji,jk") + k_d_state, transposed=True)
    chunk.rights[n] = jnp.concatenate([-d_right.astype(chunk.dtype), d_out])
    chunk.dv[value] = (decays.beta(n) * t.length * d_right).astype(chunk.dtype)

    read = dot(t.both, state)
    d_reads = jnp.concatenate([-(weight * before) * d_right, before * d_out.astype(f32)])
    d_before = _rows(d_reads * read)
    crossed = across * jnp.sum(state.astype(f32) * d_state, axis=(0, 1), keepdims=True)
    at_end = jnp.where(index(0)[:, :1] == CHUNK - 1, crossed, 0)
    chunk.columns[chunk.column(BEFORE, n)] = d_before[:CHUNK] + d_before[CHUNK:] + at_end
    chunk.columns[chunk.column(AFTER, n)] = _rows(update.astype(f32) * k_d_state)
    chunk.columns[chunk.column(BETA, n)] = _rows(d_right * chunk.v[value].astype(f32))
    chunk.columns[chunk.column(WEIGHT, n)] = -before * _rows(d_right * read[:CHUNK])

    d_reads = d_reads.astype(chunk.dtype)
    chunk.d_state[n] = across * d_state + dot(t.both, d_reads, "ji,jk")
    written = (after * update.astype(f32)).astype(chunk.dtype)
    d_written = dot(written, low_d_state, "ij,kj")
    return dot(d_reads, state, "ij,kj") + jnp.concatenate([d_written, jnp.zeros_like(d_written)])


def _through_scores(chunk: _Chunk, decays: Decays, t: Tokens, j: int) -> None:
    """The products between tokens of key head j; completes and writes its dq and dk."""
    kk, qk = chunk.scores[j, :CHUNK], chunk.scores[j, CHUNK:]
    until = (index(0) <= index(1)).astype(chunk.dtype)
    d_kk, d_qk, d_length = 0.0, 0.0, 0.0
    for n in chunk.tile.group_of(j):
        between, update = chunk.between[n], chunk.updates[:, chunk.tile.value(n)]
        both = dot(chunk.rights[n], update, "ij,kj")
        d_lower, d_mixing = strictly_lower(both[:CHUNK]) * between, both[CHUNK:] * between
        weight = decays.beta(n) * t.length * t.length
        d_kk, d_qk = d_kk + weight * d_lower, d_qk + d_mixing
        crossing = dot(until, (d_lower * (weight * kk) + d_mixing * qk).astype(chunk.dtype))
        chunk.columns[chunk.column(SPANS, n)] = _rows(strictly_lower(crossing))
        d_weight = chunk.columns[chunk.column(WEIGHT, n)] + _rows(d_lower * kk)
        d_scaled_beta = chunk.columns[chunk.column(BETA, n)]
        chunk.columns[chunk.column(BETA, n)] = t.length * (t.length * d_weight + d_scaled_beta)
        d_length += decays.beta(n) * (2 * t.length * d_weight + d_scaled_beta)
    d_kk, d_qk = (d_kk + d_kk.T).astype(chunk.dtype), d_qk.astype(chunk.dtype)
    dk = chunk.d_tokens[j, :CHUNK] + dot(d_kk, t.k) + dot(d_qk, t.q, "ji,jk")
    dq = chunk.d_tokens[j, CHUNK:] + dot(d_qk, t.k)
    if chunk.tile.normalize:
        q, k = t.q.astype(jnp.float32), t.k.astype(jnp.float32)
        dk -= (t.length * t.length * t.length * d_length) * k
        dq -= (t.query_length * t.query_length * _rows(q * dq)) * q
    lanes = slice(None), chunk.tile.key(j)
    chunk.dk[lanes], chunk.dq[lanes] = dk.astype(chunk.dk.dtype), dq.astype(chunk.dq.dtype)


def _write_gates(chunk: _Chunk) -> None:
    """dg and dbeta [heads, C]: token t's decay is in every span that crosses t."""
    heads = chunk.tile.heads
    rows = chunk.columns[...].T
    before, after, spans, beta = (rows[kind * heads : (kind + 1) * heads] for kind in (BEFORE, AFTER, SPANS, BETA))
    from_here, earlier = (index(0) >= index(1)).astype(jnp.float32), (index(0) < index(1)).astype(jnp.float32)
    chunk.dg[...] = spans + dot(before, from_here) + dot(after, earlier)
    chunk.dbeta[...] = beta


def _rows(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=-1, keepdims=True)
