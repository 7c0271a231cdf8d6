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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterLoad:
    """What load balancing needs to know, as sums over real tokens: assignments [E] and router probabilities [E], float32.

    Sums of several layers, batches or shards (axis 0 of [shards, E]) add up.
    """

    assigned: jax.Array
    probability: jax.Array


def route(logits: jax.Array, k: int, alive: jax.Array) -> tuple[Routing, RouterLoad]:
    """Routing of router logits [B, T, E] float32, and the load [1, E] it makes; alive [B, T] bool marks real tokens."""
    experts = logits.shape[-1]
    probability = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, chosen = jax.lax.top_k(probability, k)
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    alive = alive[..., None]
    chosen = jnp.where(alive, chosen, experts)
    # Not by a scatter: on TPU that sorts all choices first, in a program that alone takes seconds to compile.
    assigned = jnp.sum(chosen[..., None, :] == jnp.arange(experts)[:, None], axis=(0, 1, 3), dtype=jnp.float32)[None]
    load = RouterLoad(assigned, jnp.sum(jnp.where(alive, probability, 0.0), axis=(0, 1))[None])
    return Routing(chosen, jnp.where(alive, weights, 0.0)), load


def balance_loss(load: RouterLoad, k: int) -> jax.Array:
    """E x sum over experts of (share of tokens sent to it) x (mean router probability), over all tokens of all layers.

    `load` [E] summed over the batch and the layers. The form of transformers' `load_balancing_loss_func` (Switch
    Transformer, arXiv 2101.03961, section 2.2, with k experts a token): even routing gives k.
    """
    tokens = jnp.maximum(jnp.sum(load.assigned) / k, 1.0)
    shares = jax.lax.stop_gradient(load.assigned) / tokens
    return load.assigned.shape[-1] * jnp.sum(shares * load.probability / tokens)
