"""The gated delta rule in chunks, in plain XLA, with its closed-form gradient; and the one-token step.

In a chunk, for one value head, with D_ij = exp(g_j+1 + … + g_i) for j <= i in the same document, else 0, and S the state
that enters (a_i, b_j, c: the same decay from the chunk's start to token i, from token j to its end, and over all of it):

    L = tril(beta_i D_ij k_i.k_j, -1);  A = (I + L)^-1;  P = D * q k^T
    R = beta * (v - a * (k S));  U = A R;  o = a * (q S) + P U;  S' = c S + (b * k)^T U

Everything that does not need S is computed for all chunks at once; only five products per chunk are sequential.
Letters of the einsums: m chunk, b row, k key head, r value head of that key head, i and j tokens of a chunk, h and v widths.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen35_jax.ops.gated_delta.inverse import unit_lower_inverse
from qwen35_jax.ops.segments import segment_index

CHUNK = 64
FLOOR = -1000.0  # exp of anything below is 0; keeps the sums of a chunk finite
GRAIN = 64.0  # decays are summed as multiples of 1 / GRAIN plus the rest

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class _Tokens(NamedTuple):
    """A sequence in chunks. q, k [M, B, K, C, H]; v [M, B, K, R, C, V]; g, beta [M, B, K, R, C]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    g: jax.Array
    beta: jax.Array


class _Decays(NamedTuple):
    """Decays of a chunk: between [M, B, K, R, C, C], before and after [M, B, K, R, C], across [M, B, K, R]."""

    between: jax.Array
    before: jax.Array
    after: jax.Array
    across: jax.Array


def gated_delta_rule(q, k, v, g, beta, initial_state, segment_ids, normalize_qk):
    """See `ops.gated_delta.gated_delta_rule`."""
    if initial_state is None:
        # From an input, so that under shard_map the state varies over the mesh as the inputs do.
        initial_state = _zero_state(q, k, v)
    return _rule(q, k, v, g, beta, initial_state, segment_ids, normalize_qk)


def _zero_state(q, k, v):
    zero = jnp.zeros_like(v[:, 0, :, None, :], dtype=jnp.float32)
    return jnp.broadcast_to(zero, (*zero.shape[:2], k.shape[-1], zero.shape[-1]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _rule(q, k, v, g, beta, initial_state, segment_ids, normalize_qk):
    return _rule_fwd(q, k, v, g, beta, initial_state, segment_ids, normalize_qk)[0]


def _rule_fwd(q, k, v, g, beta, initial_state, segment_ids, normalize_qk):
    tokens = _chunked(q, k, v, g, beta, segment_ids, normalize_qk)
    heads = (v.shape[0], q.shape[2], v.shape[2] // q.shape[2])
    state = initial_state.astype(tokens.v.dtype).reshape(*heads, *initial_state.shape[2:])
    decays = _decays(tokens.g, segment_ids)
    kk, qk = _scores(tokens)
    lower = _strictly_lower(tokens.beta[..., None] * decays.between * kk)
    inverse = unit_lower_inverse(lower)
    mixing = decays.between * qk

    def chunk(state, inputs):
        tokens, decays, inverse, mixing = inputs
        ks, qs = _read(tokens, state)
        update = _einsum("bkrij,bkrjv->bkriv", inverse, _corrections(tokens, decays, ks))
        out = decays.before[..., None] * qs + _einsum("bkrij,bkrjv->bkriv", mixing, update)
        written = _einsum("bkih,bkriv->bkrhv", tokens.k, decays.after[..., None] * update)
        return decays.across[..., None, None] * state + written, (out, state)

    decays_in_scan = decays._replace(between=None)
    final, (out, states) = jax.lax.scan(chunk, state, (tokens, decays_in_scan, inverse, mixing))
    out = _joined(out, v.shape[1]).astype(v.dtype)
    residuals = (q, k, v, g, beta, initial_state, segment_ids, inverse, states)
    return (out, final.reshape(initial_state.shape).astype(jnp.float32)), residuals


def _rule_bwd(normalize_qk, residuals, cotangents):
    raise NotImplementedError


_rule.defvjp(_rule_fwd, _rule_bwd)


def _chunked(q, k, v, g, beta, segment_ids, normalize_qk) -> _Tokens:
    """Cast, normalise, scale and cut into chunks. Tokens that are padding, ours or the caller's, have g = beta = 0."""
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    q, k, v, g, beta = (x.astype(dtype) for x in (q, k, v, g, beta))
    if normalize_qk:
        q, k = unit_length(q), unit_length(k)
    if segment_ids is not None:
        real = (segment_ids != 0)[..., None]
        g, beta = jnp.where(real, g, 0), jnp.where(real, beta, 0)
    group = (q.shape[2], v.shape[2] // q.shape[2])
    v, g, beta = (x.reshape(*x.shape[:2], *group, *x.shape[3:]) for x in (v, g, beta))
    q, k, v, g, beta = (_cut(x) for x in (q * q.shape[-1] ** -0.5, k, v, jnp.maximum(g, FLOOR), beta))
    q, k = (jnp.transpose(x, (1, 0, 3, 2, 4)) for x in (q, k))
    g, beta = (jnp.transpose(x, (1, 0, 3, 4, 2)) for x in (g, beta))
    return _Tokens(q, k, jnp.transpose(v, (1, 0, 3, 4, 2, 5)), g, beta)


def unit_length(x: jax.Array) -> jax.Array:
    """x [..., H] divided by its length; the 1e-6 under the root keeps rows of zeros, and their gradient, at zero."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def _cut(x: jax.Array, mode: str = "constant") -> jax.Array:
    """[B, T, ...] -> [B, M, C, ...], padded at the end. Short sequences get a shorter chunk."""
    time = x.shape[1]
    size = min(CHUNK, 1 << (time - 1).bit_length())
    padded = jnp.pad(x, ((0, 0), (0, -time % size), *((0, 0),) * (x.ndim - 2)), mode=mode)
    return padded.reshape(x.shape[0], -1, size, *x.shape[2:])


def _joined(x: jax.Array, time: int) -> jax.Array:
    """[M, B, K, R, C, V] -> [B, T, N, V]."""
    chunks, batch, keys, group, size, width = x.shape
    x = jnp.transpose(x, (1, 0, 4, 2, 3, 5)).reshape(batch, chunks * size, keys * group, width)
    return x[:, :time]


def _scores(tokens: _Tokens) -> tuple[jax.Array, jax.Array]:
    """k k^T and q k^T of each chunk, [M, B, K, 1, C, C], shared by the value heads of a key head."""
    both = jnp.concatenate([tokens.k, tokens.q], axis=-2)
    scores = _einsum("mbkih,mbkjh->mbkij", both, tokens.k)[:, :, :, None]
    size = tokens.k.shape[-2]
    return scores[..., :size, :], scores[..., size:, :]


def _read(tokens: _Tokens, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """k S and q S of one chunk, [B, K, R, C, V]."""
    both = jnp.concatenate([tokens.k, tokens.q], axis=-2)
    values = _einsum("bkih,bkrhv->bkriv", both, state)
    size = tokens.k.shape[-2]
    return values[..., :size, :], values[..., size:, :]


def _corrections(tokens: _Tokens, decays: _Decays, ks: jax.Array) -> jax.Array:
    return tokens.beta[..., None] * (tokens.v - decays.before[..., None] * ks)


def _strictly_lower(x: jax.Array) -> jax.Array:
    size = x.shape[-1]
    return jnp.where(np.tri(size, k=-1, dtype=bool), x, 0)


def _decays(g: jax.Array, segment_ids: jax.Array | None) -> _Decays:
    """Products of the decays of g [M, B, K, R, C] over spans of tokens; 0 over spans that leave a document.

    A difference of running sums would lose small decays after a strong one, so the sums are kept in two parts:
    multiples of 1 / GRAIN, which fp32 adds exactly, and rests, whose sum stays small.
    """
    size = g.shape[-1]
    coarse = jnp.round(g * GRAIN) / GRAIN
    sums = _einsum("pmbkrj,ij->pmbkri", jnp.stack([coarse, g - coarse]), np.tri(size, dtype=g.dtype))
    between = jnp.sum(sums[..., :, None] - sums[..., None, :], axis=0)
    after = jnp.sum(sums[..., -1:] - sums, axis=0)
    before = jnp.sum(sums, axis=0)
    span = np.tri(size, dtype=bool)
    if segment_ids is None:
        return _Decays(jnp.exp(jnp.where(span, between, -jnp.inf)), jnp.exp(before), jnp.exp(after), jnp.exp(before[..., -1]))
    index = jnp.moveaxis(_cut(segment_index(segment_ids), "edge"), 1, 0)[:, :, None, None]
    entering = jnp.concatenate([jnp.zeros_like(index[:1, ..., -1]), index[:-1, ..., -1]])[..., None]
    span = span & (index[..., :, None] == index[..., None, :])
    first, last = index == entering, index == index[..., -1:]
    masked = [(between, span), (before, first), (after, last), (before[..., -1], first[..., -1])]
    return _Decays(*(jnp.exp(jnp.where(inside, x, -jnp.inf)) for x, inside in masked))


def gated_delta_step(q, k, v, g, beta, state, active, normalize_qk, return_states):
    """See `ops.gated_delta.gated_delta_step`; state [B, N, Hk, Hv] -> (out, state, states or None)."""
    dtype = v.dtype
    q, k, v, g, beta = (x.astype(jnp.float32) for x in (q, k, v, g, beta))
    if active is not None:
        g, beta = (jnp.where(active[..., None], x, 0) for x in (g, beta))
    if normalize_qk:
        q, k = unit_length(q), unit_length(k)
    q = q * q.shape[-1] ** -0.5
    q, k = (jnp.repeat(x, v.shape[2] // x.shape[2], axis=2) for x in (q, k))
    if q.shape[1] == 1:
        state, out = _token(state, tuple(x[:, 0] for x in (q, k, v, jnp.exp(g), beta)))
        return out[:, None].astype(dtype), state, state[:, None] if return_states else None

    def token(state, inputs):
        state, out = _token(state, inputs)
        return state, (out, state if return_states else None)

    inputs = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, jnp.exp(g), beta))
    state, (out, states) = jax.lax.scan(token, state, inputs)
    states = jnp.moveaxis(states, 0, 1) if return_states else None
    return jnp.moveaxis(out, 0, 1).astype(dtype), state, states


def _token(state, inputs):
    """One token. The old state is read once, for k and q together: o = e^g q S + (q.k) u, the state being e^g S + k u^T."""
    q, k, v, decay, beta = inputs
    ks, qs = jnp.moveaxis(_einsum("bnxh,bnhv->bnxv", jnp.stack([k, q], axis=2), state), 2, 0)
    update = beta[..., None] * (v - decay[..., None] * ks)
    out = decay[..., None] * qs + jnp.sum(q * k, axis=-1, keepdims=True) * update
    return decay[..., None, None] * state + k[..., None] * update[..., None, :], out
