"""Losses of training: cross entropy that never holds all logits, its shifts for the next and the next but one token."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from qwen35_jax.ops.linear import linear
from qwen35_jax.sharding import Sharding

# The logits of one chunk of tokens, float32, stay below this on each device; and no chunk has more tokens.
CHUNK_BYTES = 256 * 2**20
CHUNK_TOKENS = 1024


def target_weights(batch: dict, ahead: int) -> tuple[jax.Array, jax.Array]:
    """What position i predicts: the token at i + `ahead`, and with which weight; both [B, T].

    The weight is that of the target, and 0 where a document ends between the two.
    """
    tokens, same = next_tokens(batch, ahead)
    return tokens, jnp.where(same, _ahead(batch["loss_weights"], ahead), 0.0)


def next_tokens(batch: dict, ahead: int = 1) -> tuple[jax.Array, jax.Array]:
    """The token at i + `ahead` of every position, and whether it is one of the same document: int32, bool [B, T]."""
    segments = batch["segment_ids"]
    return _ahead(batch["tokens"], ahead), (segments == _ahead(segments, ahead)) & (segments > 0)


def _ahead(x: jax.Array, ahead: int) -> jax.Array:
    return jnp.pad(x[:, ahead:], ((0, 0), (0, ahead)))


def cross_entropy(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, sharding: Sharding):
    """Sums over tokens of weight x -log softmax(hidden head^T)[target], and of weight x (log of the softmax's sum)^2.

    hidden [B, T, D], head [V, D] of the same dtype, targets and weights [B, T] -> two float32 scalars (the second one is
    the z-loss of PaLM, arXiv 2204.02311). Logits are made in chunks of tokens, float32, and made again in the backward
    pass, of the tokens that have a weight alone: a prompt costs nothing here. V is cut over `model`.
    """
    return _cross_entropy(sharding, hidden, head, targets, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(sharding, hidden, head, targets, weights):
    return _forward(sharding, hidden, head, targets, weights)[0]


def _forward(sharding, hidden, head, targets, weights):
    def local(hidden, head, targets, weights):
        chunks, count, _ = _chunks(head, hidden, targets, weights)

        def chunk(i, carry):
            log_sums, nll, square = carry
            hidden, targets, weights = (x[i] for x in chunks)
            logits = linear(hidden, head, "TD,VD->TV", out_dtype=jnp.float32)
            peak = jax.lax.pmax(jnp.max(logits, axis=-1), "model")
            total = jax.lax.psum(jnp.sum(jnp.exp(logits - peak[:, None]), axis=-1), "model")
            log_sum = peak + jnp.log(total)
            target = jax.lax.psum(jnp.sum(jnp.where(_hits(targets, logits.shape[-1]), logits, 0.0), axis=-1), "model")
            nll += jnp.sum(weights * (log_sum - target))
            return log_sums.at[i].set(log_sum), nll, square + jnp.sum(weights * log_sum**2)

        zero = jnp.zeros((), jnp.float32)
        log_sums, nll, square = jax.lax.fori_loop(0, count, chunk, (jnp.zeros(chunks[1].shape, jnp.float32), zero, zero))
        return log_sums[None], nll[None], square[None]

    axes = ("B T D", "V D", "B T", "B T")
    log_sums, nll, square = sharding.shard_map(local, axes, ("J X C", "J", "J"))(hidden, head, targets, weights)
    return (jnp.sum(nll), jnp.sum(square)), (hidden, head, targets, weights, log_sums)


def _backward(sharding, residuals, gradients):
    nll_gradient, square_gradient = gradients

    def local(hidden, head, targets, weights, log_sums, nll_gradient, square_gradient):
        chunks, count, order = _chunks(head, hidden, targets, weights)

        def chunk(i, carry):
            hidden_gradient, head_gradient = carry
            hidden, targets, weights = (x[i] for x in chunks)
            log_sum = log_sums[0, i]
            logits = linear(hidden, head, "TD,VD->TV", out_dtype=jnp.float32)
            probability = jnp.exp(logits - log_sum[:, None])
            slope = weights * (nll_gradient + 2 * square_gradient * log_sum)
            hit = _hits(targets, logits.shape[-1])
            logits = slope[:, None] * probability - jnp.where(hit, (weights * nll_gradient)[:, None], 0.0)
            logits = logits.astype(hidden.dtype)
            head_gradient += linear(logits, hidden, "TV,TD->VD", out_dtype=jnp.float32)
            return hidden_gradient.at[i].set(linear(logits, head, "TV,VD->TD", out_dtype=jnp.float32)), head_gradient

        start = (jnp.zeros(chunks[0].shape, jnp.float32), jnp.zeros(head.shape, jnp.float32))
        hidden_gradient, head_gradient = jax.lax.fori_loop(0, count, chunk, start)
        hidden_gradient = hidden_gradient.reshape(-1, hidden.shape[-1])[: order.size]
        hidden_gradient = jnp.zeros_like(hidden_gradient).at[order].set(hidden_gradient, unique_indices=True)
        hidden_gradient = jax.lax.psum(hidden_gradient.reshape(hidden.shape), "model")
        return hidden_gradient.astype(hidden.dtype), jax.lax.psum(head_gradient, ("replica", "data")).astype(head.dtype)

    axes = ("B T D", "V D", "B T", "B T", "J X C", "", "")
    mapped = sharding.shard_map(local, axes, ("B T D", "V D"))
    hidden_gradient, head_gradient = mapped(*residuals, nll_gradient, square_gradient)
    return hidden_gradient, head_gradient, None, None


_cross_entropy.defvjp(_forward, _backward)


def _hits(targets: jax.Array, width: int) -> jax.Array:
    """Which of this shard's `width` logits is the target: bool [T, V]."""
    first = jax.lax.axis_index("model") * width
    return (targets - first)[:, None] == jnp.arange(width)


def _chunks(head: jax.Array, hidden: jax.Array, targets: jax.Array, weights: jax.Array):
    """The tokens of all rows in chunks, those with a weight first: arrays [chunks, c, ...], of which zeros fill the last one.

    Also returns how many chunks have to be done, the most of any device, and the order of the tokens, [B * T].
    """
    size = max(1, min(weights.size, CHUNK_TOKENS, CHUNK_BYTES // (4 * head.shape[0])))
    order = jnp.argsort(weights.reshape(-1) == 0, stable=True)

    def cut(x):
        x = x.reshape(-1, *x.shape[2:])[order]
        x = jnp.pad(x, [(0, -order.size % size)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, size, *x.shape[1:])

    # The same on all devices, since the sums over `model` inside the loop wait for each other.
    count = jax.lax.pmax((jnp.count_nonzero(weights) + size - 1) // size, ("replica", "data"))
    return tuple(cut(x) for x in (hidden, targets, weights)), count, order
