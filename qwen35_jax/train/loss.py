"""Losses of training: cross entropy that never holds all logits, its shifts for the next and the next but one token."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from qwen35_jax.ops.linear import linear
from qwen35_jax.sharding import Sharding

# The logits of one chunk of tokens, float32, stay below this on each device.
CHUNK_BYTES = 256 * 2**20


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
    pass; V is cut over `model`.
    """
    return _cross_entropy(sharding, hidden, head, targets, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(sharding, hidden, head, targets, weights):
    return _forward(sharding, hidden, head, targets, weights)[0]


def _forward(sharding, hidden, head, targets, weights):
    def local(hidden, head, targets, weights):
        def chunk(_, xs):
            hidden, targets, weights = xs
            logits = linear(hidden, head, "BTD,VD->BTV", out_dtype=jnp.float32)
            hit = _hits(targets, logits.shape[-1])
            peak = jax.lax.pmax(jnp.max(logits, axis=-1), "model")
            total = jax.lax.psum(jnp.sum(jnp.exp(logits - peak[..., None]), axis=-1), "model")
            log_sum = peak + jnp.log(total)
            target = jax.lax.psum(jnp.sum(jnp.where(hit, logits, 0.0), axis=-1), "model")
            return None, (log_sum, jnp.sum(weights * (log_sum - target)), jnp.sum(weights * log_sum**2))

        log_sum, nll, square = jax.lax.scan(chunk, None, _chunks(head, hidden, targets, weights))[1]
        return _joined(log_sum, targets.shape[1]), jnp.sum(nll)[None], jnp.sum(square)[None]

    axes = ("B T D", "V D", "B T", "B T")
    log_sum, nll, square = sharding.shard_map(local, axes, ("B T", "B", "B"))(hidden, head, targets, weights)
    return (jnp.sum(nll), jnp.sum(square)), (hidden, head, targets, weights, log_sum)


def _backward(sharding, residuals, gradients):
    nll_gradient, square_gradient = gradients

    def local(hidden, head, targets, weights, log_sum, nll_gradient, square_gradient):
        def chunk(head_gradient, xs):
            hidden, targets, weights, log_sum = xs
            logits = linear(hidden, head, "BTD,VD->BTV", out_dtype=jnp.float32)
            probability = jnp.exp(logits - log_sum[..., None])
            slope = weights * (nll_gradient + 2 * square_gradient * log_sum)
            hit = _hits(targets, logits.shape[-1])
            logits = slope[..., None] * probability - jnp.where(hit, (weights * nll_gradient)[..., None], 0.0)
            logits = logits.astype(hidden.dtype)
            head_gradient += linear(logits, hidden, "BTV,BTD->VD", out_dtype=jnp.float32)
            return head_gradient, linear(logits, head, "BTV,VD->BTD", out_dtype=jnp.float32)

        start = jnp.zeros(head.shape, jnp.float32)
        head_gradient, hidden_gradient = jax.lax.scan(chunk, start, _chunks(head, hidden, targets, weights, log_sum))
        hidden_gradient = jax.lax.psum(_joined(hidden_gradient, targets.shape[1]), "model")
        return hidden_gradient.astype(hidden.dtype), jax.lax.psum(head_gradient, ("replica", "data")).astype(head.dtype)

    axes = ("B T D", "V D", "B T", "B T", "B T", "", "")
    mapped = sharding.shard_map(local, axes, ("B T D", "V D"))
    hidden_gradient, head_gradient = mapped(*residuals, nll_gradient, square_gradient)
    return hidden_gradient, head_gradient, None, None


_cross_entropy.defvjp(_forward, _backward)


def _hits(targets: jax.Array, width: int) -> jax.Array:
    """Which of this shard's `width` logits is the target: bool [B, T, V]."""
    first = jax.lax.axis_index("model") * width
    return (targets - first)[..., None] == jnp.arange(width)


def _chunks(head: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays [B, T, ...] in chunks of tokens [chunks, B, c, ...]; zeros fill the last one."""
    rows, time = arrays[0].shape[:2]
    width = max(1, min(time, CHUNK_BYTES // (4 * rows * head.shape[0])))

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, -time % width)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, -1, width, *x.shape[2:]), 1, 0)

    return tuple(cut(x) for x in arrays)


def _joined(chunks: jax.Array, time: int) -> jax.Array:
    """[chunks, B, c, ...] -> [B, T, ...]."""
    x = jnp.moveaxis(chunks, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :time]
