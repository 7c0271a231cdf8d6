"""The gated delta rule in chunks, in plain XLA, with its closed-form gradient; and the one-token step.

In a chunk, for one value head, with D_ij = exp(g_j+1 + … + g_i) for j <= i in the same document, else 0, and S the
state that enters (a_i, b_j, c: the same decay from the chunk's start to token i, from token j to its end, over all):

    L = tril(beta_i D_ij k_i.k_j, -1);  A = (I + L)^-1;  P = D * q k^T
    R = beta * (v - a * (k S));  U = A R;  o = a * (q S) + P U;  S' = c S + (b * k)^T U

Everything that does not need S is computed for all chunks at once; only five products per chunk are sequential.
Letters of the einsums: r value head of a key head, i and j tokens of a chunk, h and v widths; … chunk, row, key head.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from qwen35_jax.ops.gated_delta.inverse import unit_lower_inverse
from qwen35_jax.ops.gated_delta.kept import INVERSE, STATES
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
    return _forward(q, k, v, g, beta, initial_state, segment_ids, normalize_qk, save=False)[:2]


def _rule_fwd(q, k, v, g, beta, initial_state, segment_ids, normalize_qk):
    out, final, saved = _forward(q, k, v, g, beta, initial_state, segment_ids, normalize_qk, save=True)
    saved = tuple(checkpoint_name(x, name) for x, name in zip(saved, (INVERSE, STATES), strict=True))
    return (out, final), (q, k, v, g, beta, initial_state, segment_ids, saved)


def _forward(q, k, v, g, beta, initial_state, segment_ids, normalize_qk, save: bool):
    """out, final state and, to save for the gradient, A and the state that enters each chunk."""
    tokens = _chunked(q, k, v, g, beta, segment_ids, normalize_qk)
    decays = _decays(tokens.g, segment_ids)
    kk, qk = _scores(tokens)
    inverse = unit_lower_inverse(_strictly_lower(tokens.beta[..., None] * decays.between * kk))

    def chunk(state, inputs):
        tokens, decays, inverse, mixing = inputs
        ks, qs = _read(tokens, state)
        update = _einsum("...ij,...jv->...iv", inverse, _corrections(tokens, decays, ks))
        out = decays.before[..., None] * qs + _einsum("...ij,...jv->...iv", mixing, update)
        written = _einsum("...ih,...riv->...rhv", tokens.k, decays.after[..., None] * update)
        return decays.across[..., None, None] * state + written, (out, state if save else None)

    state = _grouped(initial_state.astype(tokens.v.dtype), q.shape[2])
    inputs = (tokens, decays._replace(between=None), inverse, decays.between * qk)
    final, (out, states) = jax.lax.scan(chunk, state, inputs)
    out = _joined(out, v.shape[1]).astype(v.dtype)
    return out, final.reshape(initial_state.shape).astype(jnp.float32), (inverse, states)


def _rule_bwd(normalize_qk, residuals, cotangents):
    q, k, v, g, beta, initial_state, segment_ids, (inverse, states) = residuals
    d_out, d_final = cotangents

    def prepare(q, k, v, g, beta):
        return _chunked(q, k, v, g, beta, segment_ids, normalize_qk)

    tokens, prepare_vjp = jax.vjp(prepare, q, k, v, g, beta)
    d_out, d_final = _value_chunks(d_out.astype(tokens.v.dtype), q.shape[2]), _grouped(d_final, q.shape[2])
    d_tokens, d_initial = _chunks_bwd(tokens, _decays(tokens.g, segment_ids), inverse, states, d_out, d_final)
    d_initial = d_initial.reshape(initial_state.shape).astype(initial_state.dtype)
    return *prepare_vjp(d_tokens), d_initial, None


_rule.defvjp(_rule_fwd, _rule_bwd)


def _chunks_bwd(tokens: _Tokens, decays: _Decays, inverse, states, d_out, d_final) -> tuple[_Tokens, jax.Array]:
    """Gradients of the chunks' inputs and of the first state.

    The solve needs no derivative of its own: with dU the gradient of U, dR = A^T dU and dL = -tril(dR U^T, -1).
    """
    kk, qk = _scores(tokens)
    lower, mixing = tokens.beta[..., None] * decays.between * kk, decays.between * qk
    ks, qs = _read(tokens, states)
    corrections = _corrections(tokens, decays, ks)
    update = _einsum("...ij,...jv->...iv", inverse, corrections)
    carried = (tokens, decays._replace(between=None), inverse, states, update, d_out)
    d_update = _einsum("...ij,...iv->...jv", mixing, d_out)
    d_first, (d_right, d_k, d_after, d_across) = _scan_bwd(carried, d_update, d_final)

    reads = _reads(tokens, decays, d_right, d_out)
    d_k_read, d_q = _halves(_einsum("...riv,...rhv->...ih", reads, states))
    both = jnp.concatenate([-d_right, d_out], axis=-2)
    d_lower, d_mixing = _halves(_einsum("...iv,...jv->...ij", both, update))
    d_lower = _strictly_lower(d_lower)
    d_kk = jnp.sum(d_lower * tokens.beta[..., None] * decays.between, axis=-3)
    d_qk = jnp.sum(d_mixing * decays.between, axis=-3)
    d_q += _einsum("...ij,...jh->...ih", d_qk, tokens.k)
    d_k += d_k_read + _einsum("...ij,...jh->...ih", d_kk + jnp.swapaxes(d_kk, -1, -2), tokens.k)
    d_k += _einsum("...ij,...ih->...jh", d_qk, tokens.q)
    unread = tokens.v - decays.before[..., None] * ks
    d_beta = jnp.sum(d_right * unread, axis=-1) + jnp.sum(d_lower * decays.between * kk, axis=-1)
    d_before = decays.before * (_dot(d_out, qs) - tokens.beta * _dot(d_right, ks))
    d_g = _decays_bwd(d_lower * lower + _strictly_lower(d_mixing * mixing), d_before, d_after, d_across)
    return _Tokens(d_q, d_k, tokens.beta[..., None] * d_right, d_g, d_beta), d_first


def _scan_bwd(carried, d_update, d_final):
    """The sequential part, last chunk first: gradients of the state, of R, and of what the state was written with."""

    def chunk(d_state, inputs):
        (tokens, decays, inverse, state, update, d_out), d_update = inputs
        written = decays.after[..., None] * update
        k_d_state = _einsum("...ih,...rhv->...riv", tokens.k, d_state)
        d_right = _einsum("...ij,...iv->...jv", inverse, d_update + decays.after[..., None] * k_d_state)
        d_k = _einsum("...riv,...rhv->...ih", written, d_state)
        d_across = decays.across * jnp.sum(state * d_state, axis=(-1, -2))
        both = jnp.concatenate([tokens.k, tokens.q], axis=-2)
        read = _einsum("...ih,...riv->...rhv", both, _reads(tokens, decays, d_right, d_out))
        d_state = decays.across[..., None, None] * d_state + read
        return d_state, (d_right, d_k, _dot(written, k_d_state), d_across)

    return jax.lax.scan(chunk, d_final, (carried, d_update), reverse=True)


def _reads(tokens: _Tokens, decays: _Decays, d_right, d_out):
    """Gradients of k S and of q S, one above the other."""
    d_ks = -(tokens.beta * decays.before)[..., None] * d_right
    return jnp.concatenate([d_ks, decays.before[..., None] * d_out], axis=-2)


def _decays_bwd(d_between, d_before, d_after, d_across):
    """Gradient of g from those of the logs of the decays: token t's decay is part of every span that crosses it.

    Summing over those spans, not over running sums, leaves nothing to cancel: strong decays keep their tiny gradients.
    """
    size = d_before.shape[-1]
    until, beyond = np.tri(size, dtype=d_before.dtype).T, np.tri(size, k=-1, dtype=d_before.dtype)
    spans = jnp.sum(_einsum("ti,...ij->...tj", until, d_between) * beyond, axis=-1)
    ends = _einsum("...i,ti->...t", d_before, until) + _einsum("...j,tj->...t", d_after, beyond)
    return spans + ends + d_across[..., None]


def _dot(x, y):
    return jnp.sum(x * y, axis=-1)


def _halves(x):
    return jnp.split(x, 2, axis=-2)


def _chunked(q, k, v, g, beta, segment_ids, normalize_qk) -> _Tokens:
    """Cast, normalise, scale and cut into chunks. Tokens that are padding, ours or the caller's, have g = beta = 0."""
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    q, k, v, g, beta = (x.astype(dtype) for x in (q, k, v, g, beta))
    if normalize_qk:
        q, k = unit_length(q), unit_length(k)
    if segment_ids is not None:
        real = (segment_ids != 0)[..., None]
        g, beta = jnp.where(real, g, 0), jnp.where(real, beta, 0)
    v, g, beta = (_value_chunks(x, q.shape[2]) for x in (v, jnp.maximum(g, FLOOR), beta))
    q, k = (jnp.transpose(_cut(x), (1, 0, 3, 2, 4)) for x in (q * q.shape[-1] ** -0.5, k))
    return _Tokens(q, k, v, g, beta)


def _value_chunks(x: jax.Array, keys: int) -> jax.Array:
    """[B, T, N, ...] -> [M, B, K, R, C, ...]."""
    x = _cut(x.reshape(*x.shape[:2], keys, x.shape[2] // keys, *x.shape[3:]))
    return jnp.transpose(x, (1, 0, 3, 4, 2, *range(5, x.ndim)))


def _grouped(state: jax.Array, keys: int) -> jax.Array:
    """[B, N, H, V] -> [B, K, R, H, V]."""
    return state.reshape(state.shape[0], keys, -1, *state.shape[2:])


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
    kk, qk = _halves(_einsum("...ih,...jh->...ij", both, tokens.k))
    return kk[..., None, :, :], qk[..., None, :, :]


def _read(tokens: _Tokens, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """k S and q S, [..., B, K, R, C, V], of one chunk or of all."""
    both = jnp.concatenate([tokens.k, tokens.q], axis=-2)
    return _halves(_einsum("...ih,...rhv->...riv", both, state))


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
    tri = np.tri(size, dtype=g.dtype)
    coarse = jnp.round(g * GRAIN) / GRAIN
    coarse, rest = _einsum("p...j,ij->p...i", jnp.stack([coarse, g - coarse]), tri)
    between = (coarse[..., :, None] - coarse[..., None, :]) + (rest[..., :, None] - rest[..., None, :])
    before, after = coarse + rest, between[..., -1, :]
    span = tri.astype(bool)
    if segment_ids is None:
        return _Decays(_exp(between, span), jnp.exp(before), jnp.exp(after), jnp.exp(before[..., -1]))
    index = jnp.moveaxis(_cut(segment_index(segment_ids), "edge"), 1, 0)[:, :, None, None]
    entering = jnp.concatenate([jnp.zeros_like(index[:1, ..., -1]), index[:-1, ..., -1]])[..., None]
    span = span & (index[..., :, None] == index[..., None, :])
    first, last = index == entering, index == index[..., -1:]
    across = _exp(before[..., -1], first[..., -1])
    return _Decays(_exp(between, span), _exp(before, first), _exp(after, last), across)


def _exp(x: jax.Array, inside: jax.Array | np.ndarray) -> jax.Array:
    """exp where inside, else 0. Masked first: the exponents of spans that run backwards are large."""
    return jnp.exp(jnp.where(inside, x, -jnp.inf))


def gated_delta_step(q, k, v, g, beta, state, slots, active, normalize_qk, return_states):
    """See `ops.gated_delta.gated_delta_step`."""
    rows = state if slots is None else state[slots]
    out, last, states = _steps(q, k, v, g, beta, rows, active, normalize_qk, return_states)
    new = last if slots is None else state.at[slots].set(last)
    return (out, new, states) if return_states else (out, new)


def step_inputs(q, k, v, g, beta, active, normalize_qk) -> tuple[jax.Array, ...]:
    """All in fp32: q and k normalised where asked, q scaled, g and beta 0 for tokens that are not active."""
    q, k, v, g, beta = (x.astype(jnp.float32) for x in (q, k, v, g, beta))
    if active is not None:
        g, beta = (jnp.where(active[..., None], x, 0) for x in (g, beta))
    if normalize_qk:
        q, k = unit_length(q), unit_length(k)
    return q * q.shape[-1] ** -0.5, k, v, g, beta


def _steps(q, k, v, g, beta, state, active, normalize_qk, return_states):
    """state [B, N, Hk, Hv], a row each -> (out, state, states or None)."""
    dtype = v.dtype
    q, k, v, g, beta = step_inputs(q, k, v, g, beta, active, normalize_qk)
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
    """One token. The old state is read once, for k and q: o = e^g q S + (q.k) u, as the new one is e^g S + k u^T."""
    q, k, v, decay, beta = inputs
    ks, qs = jnp.moveaxis(_einsum("bnxh,bnhv->bnxv", jnp.stack([k, q], axis=2), state), 2, 0)
    update = beta[..., None] * (v - decay[..., None] * ks)
    out = decay[..., None] * qs + jnp.sum(q * k, axis=-1, keepdims=True) * update
    return decay[..., None, None] * state + k[..., None] * update[..., None, :], out
