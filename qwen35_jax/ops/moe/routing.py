"""The router: softmax over all experts in float32, the top k of it, renormalised."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """experts [B, T, k] int32, weights [B, T, k] float32. A dead token has expert id E (nowhere) and weight 0."""

    experts: jax.Array
    weights: jax.Array


def route(logits: jax.Array, k: int, alive: jax.Array) -> Routing:
    """Routing of router logits [B, T, E] float32; alive [B, T] bool marks real tokens."""
    weights, experts = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), k)
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    alive = alive[..., None]
    return Routing(jnp.where(alive, experts, logits.shape[-1]), jnp.where(alive, weights, 0.0))
