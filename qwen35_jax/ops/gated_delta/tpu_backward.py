"""The gradient of the gated delta rule as a Pallas kernel (Mosaic TPU): one grid step is one chunk, the last chunk first.

In the units of `tpu_kernels.py`, with e = s d_out and dS the gradient of the state after the chunk:

    du = P^T e + b w (k dS);  dR = (I + L)^-T du = dv;  dL = -tril(dR u^T, -1);  dP = e u^T
    dq = a e S^T + Y k, Y = D w dP;  dk = -r a dR S^T + (X + X^T) k + Y^T q + b w u dS^T, X = r D w dL
    dS <- c dS - k^T (r a dR) + q^T (a e)

r and s depend on k and q too, which takes away what is along k and q. g gets the sum of dL * L + dP * P over the spans
that cross each token: the closed form in q.dq - k.dk loses every digit where decay is strong.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from qwen35_jax.ops.gated_delta.tpu_kernels import CHUNK, Decays, Tile, Tokens, dot, index, solve, strictly_lower

BEFORE, WRITTEN = range(2)  # sums over lanes that wait in columns: the gradient of log a, and u.(k dS)
SPANS, WEIGHT = range(2)  # sums over sublanes that wait in rows: the gradients of the decays between tokens, and of w


class _Chunk:
    """The blocks and the scratch of one grid step, by name, and what is computed once."""

    def __init__(self, tile: Tile, refs):
        (self.q, self.k, self.v, self.g, self.beta, self.states, self.inverse, self.updates, self.d_out, self.d_final,
         self.dq, self.dk, self.dv, self.dg, self.dbeta, self.d_first,
         self.d_state, self.lower, self.between, self.scores, self.rights, self.d_tokens,
         self.columns, self.rows) = refs  # fmt: skip
        self.tile, self.heads, self.dtype = tile, range(tile.heads), self.v.dtype
        self.decays = Decays(self.g[...])
        self.tokens = [Tokens(tile, self.q, self.k, j) for j in range(tile.keys)]
        self.owner = [self.tokens[n // tile.group] for n in self.heads]
        self.weights = jnp.concatenate([self.beta[n : n + 1] * self.owner[n].length_row for n in self.heads])
        self.before = {}

    def update(self, n: int) -> jax.Array:
        return self.updates[:, self.tile.value(n)]


def backward_kernel(tile: Tile, *refs):
    """Blocks as in `forward_kernel`, the saved ones among the inputs; outputs dq, dk, dv, dg, dbeta, d_first."""
    chunk = _Chunk(tile, refs)

    @pl.when(pl.program_id(2) == 0)
    def _():
        chunk.d_state[...] = chunk.d_final[...]

    for j, t in enumerate(chunk.tokens):
        scores = dot(t.both, t.k, "ij,kj")
        chunk.scores[j] = jnp.concatenate([scores[:CHUNK] * t.length, scores[CHUNK:]])
        for n in tile.group_of(j):
            chunk.before[n], between = chunk.decays.of(n)
            chunk.between[n] = between
            chunk.lower[n] = strictly_lower(between * chunk.weights[n : n + 1] * chunk.scores[j, :CHUNK])
    _through_state(chunk)
    _through_scores(chunk)
    _write_gates(chunk)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        chunk.d_first[...] = chunk.d_state[...]


def _through_state(chunk: _Chunk) -> None:
    """The products with the state: dv, the state's gradient, and its parts of dk and dq, one above the other [2 C, Hk]."""
    f32, dtype, tile, heads, owner = jnp.float32, chunk.dtype, chunk.tile, chunk.heads, chunk.owner
    written = (chunk.decays.after * chunk.weights).T
    written = [written[:, n : n + 1] for n in heads]
    d_states = [chunk.d_state[n].astype(dtype) for n in heads]
    k_d_states = [dot(owner[n].k, d_states[n]) for n in heads]
    d_updates = []
    for n in heads:
        chunk.columns[:, _slot(chunk, WRITTEN, n)] = _over_lanes(chunk.update(n).astype(f32) * k_d_states[n])
        d_out = (owner[n].scale * chunk.d_out[:, tile.value(n)].astype(f32)).astype(dtype)
        chunk.rights[n, CHUNK:] = d_out
        weighted = chunk.between[n] * chunk.weights[n : n + 1]
        mixing = (weighted * chunk.scores[n // tile.group, CHUNK:]).astype(dtype)
        d_updates.append(dot(mixing, d_out, "ji,jk") + written[n] * k_d_states[n])
    d_rights = solve(chunk.lower, chunk.inverse, d_updates, transposed=True)
    reads = [dot(owner[n].both, chunk.states[n]) for n in heads]
    parts = []
    for n in heads:
        chunk.dv[:, tile.value(n)] = d_rights[n].astype(chunk.dv.dtype)
        chunk.rights[n, :CHUNK] = (-d_rights[n]).astype(dtype)
        before = chunk.before[n]
        d_reads = [-(owner[n].length * before) * d_rights[n], before * chunk.rights[n, CHUNK:].astype(f32)]
        crossed = chunk.decays.across[n : n + 1] * jnp.sum(chunk.states[n].astype(f32) * chunk.d_state[n], axis=0, keepdims=True)
        d_before = _over_lanes(d_reads[0] * reads[n][:CHUNK] + d_reads[1] * reads[n][CHUNK:])
        at_end = jnp.where(index(0)[:, :1] == CHUNK - 1, _over_lanes(crossed), 0)
        chunk.columns[:, _slot(chunk, BEFORE, n)] = d_before + at_end
        d_reads = jnp.concatenate(d_reads).astype(dtype)
        across = chunk.decays.across[n : n + 1]
        chunk.d_state[n] = across * chunk.d_state[n] + dot(owner[n].both, d_reads, "ji,jk")
        d_written = written[n] * dot(chunk.update(n), d_states[n], "ij,kj")
        part = dot(d_reads, chunk.states[n], "ij,kj")
        parts.append(jnp.concatenate([part[:CHUNK] + d_written, part[CHUNK:]]))
    for j in range(tile.keys):
        chunk.d_tokens[j] = sum(parts[n] for n in tile.group_of(j))


def _through_scores(chunk: _Chunk) -> None:
    """The products between tokens; completes and writes dq and dk."""
    earlier = (index(0) < index(1)).astype(chunk.dtype)
    boths = [dot(chunk.rights[n], chunk.update(n), "ij,kj") for n in chunk.heads]
    for j, t in enumerate(chunk.tokens):
        d_kk = d_qk = jnp.zeros((CHUNK, CHUNK), jnp.float32)
        for n in chunk.tile.group_of(j):
            between, weight = chunk.between[n], chunk.weights[n : n + 1]
            d_lower, d_mixing = strictly_lower(boths[n][:CHUNK]) * between, boths[n][CHUNK:] * between
            both = d_lower * chunk.scores[j, :CHUNK] + d_mixing * chunk.scores[j, CHUNK:]
            chunk.rows[_row(chunk, WEIGHT, n)] = _over_sublanes(both)
            crossing = dot((both * weight).astype(chunk.dtype), earlier)
            chunk.rows[_row(chunk, SPANS, n)] = _over_sublanes(jnp.where(index(0) >= index(1), crossing, 0))
            d_kk, d_qk = d_kk + d_lower * weight, d_qk + d_mixing * weight
        d_kk, d_qk = (t.length * d_kk).astype(chunk.dtype), d_qk.astype(chunk.dtype)
        dk = chunk.d_tokens[j, :CHUNK] + dot(jnp.concatenate([d_kk, d_kk.T, d_qk.T], axis=1), jnp.concatenate([t.k, t.k, t.q]))
        dq = chunk.d_tokens[j, CHUNK:] + dot(d_qk, t.k)
        lanes = slice(None), chunk.tile.key(j)
        chunk.dk[lanes] = _across(chunk, dk, t.k, t.length).astype(chunk.dk.dtype)
        chunk.dq[lanes] = _across(chunk, dq, t.q, t.query_length).astype(chunk.dq.dtype)


def _across(chunk: _Chunk, dx: jax.Array, x: jax.Array, inverse_length: jax.Array) -> jax.Array:
    """What of dx is not along x [C, Hk]: its length does not count where it is normalised."""
    if not chunk.tile.normalize:
        return dx
    x = x.astype(jnp.float32)
    return dx - (inverse_length * inverse_length * _over_lanes(x * dx)) * x


def _write_gates(chunk: _Chunk) -> None:
    """dg and dbeta [heads, C]: token t's decay is in every span that crosses t."""
    heads = chunk.tile.heads
    columns, rows = chunk.columns[...].T, chunk.rows[...]
    d_before, written = columns[:heads], columns[heads:]
    from_here, earlier = (index(0) >= index(1)).astype(jnp.float32), (index(0) < index(1)).astype(jnp.float32)
    after = chunk.decays.after
    chunk.dg[...] = rows[:heads] + dot(d_before, from_here) + dot(after * chunk.weights * written, earlier)
    lengths = jnp.concatenate([t.length_row for t in chunk.owner])
    chunk.dbeta[...] = lengths * (rows[heads:] + after * written)


def _slot(chunk: _Chunk, kind: int, n: int) -> slice:
    at = kind * chunk.tile.heads + n
    return slice(at, at + 1)


def _row(chunk: _Chunk, kind: int, n: int):
    return _slot(chunk, kind, n), slice(None)


def _over_lanes(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=1, keepdims=True)


def _over_sublanes(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=0, keepdims=True)
