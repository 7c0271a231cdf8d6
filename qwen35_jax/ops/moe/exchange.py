"""Rows to the devices that want them: an all-to-all of blocks that are filled in part."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from qwen35_jax.ops.fp8 import Fp8Activation, Fp8Weight, dequantize, quantize_activation


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def exchange(rows: jax.Array, sent: jax.Array, received: jax.Array, axis: str) -> jax.Array:
    """The first sent[p] rows of block p go to device p of the mesh axis; what comes from device p stands in block p.

    rows [P, C, ...] with sent, received [P] int32, at most C; received[p] is what p sends here. -> [P, C, ...] of which
    block p holds received[p] rows, then zeros. Runs inside `shard_map`. Its gradient is the exchange backwards.

    On TPU and GPU `ragged_all_to_all`, which moves the rows that are there; XLA:CPU does not implement it and moves whole blocks.
    """
    ragged = functools.partial(ragged_exchange, axis=axis)
    return jax.lax.platform_dependent(rows, sent, received, cpu=functools.partial(padded_exchange, axis=axis), default=ragged)


def _forward(rows, sent, received, axis):
    return exchange(rows, sent, received, axis), (sent, received)


def _backward(axis, sizes, gradient):
    sent, received = sizes
    return exchange(gradient, received, sent, axis), None, None


exchange.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def exchange_activation(rows: jax.Array, sent: jax.Array, received: jax.Array, axis: str) -> Fp8Activation:
    """`exchange` of rows [P, C, D] as e4m3 with their scales, half the bytes of bfloat16: what FP8 products take of them."""
    activation = quantize_activation(rows)
    values, scales = (exchange(a, sent, received, axis) for a in (activation.values, activation.scales))
    return Fp8Activation(dequantize(Fp8Weight(values, scales), rows.dtype), values, scales)


def _activation_forward(rows, sent, received, axis):
    return exchange_activation(rows, sent, received, axis), (sent, received)


def _activation_backward(axis, sizes, gradient):
    """Of rounding to FP8 the gradient is 1, as wherever activations are rounded."""
    return _backward(axis, sizes, gradient.x)


exchange_activation.defvjp(_activation_forward, _activation_backward)


def padded_exchange(rows: jax.Array, sent: jax.Array, received: jax.Array, *, axis: str) -> jax.Array:
    """`exchange` of whole blocks, zeros beyond the rows that are sent."""
    inside = jnp.arange(rows.shape[1]) < sent[:, None]
    rows = jnp.where(inside.reshape(*inside.shape, *[1] * (rows.ndim - 2)), rows, jnp.zeros((), rows.dtype))
    return jax.lax.all_to_all(rows, axis, 0, 0, tiled=True)


def ragged_exchange(rows: jax.Array, sent: jax.Array, received: jax.Array, *, axis: str) -> jax.Array:
    """`exchange` by `ragged_all_to_all`. Every device keeps for me the block of my number, so no offsets need to be exchanged."""
    peers, capacity = rows.shape[:2]
    flat = rows.reshape(peers * capacity, *rows.shape[2:])
    starts = jnp.arange(peers, dtype=jnp.int32) * capacity
    there = jnp.full(peers, jax.lax.axis_index(axis) * capacity, jnp.int32)
    moved = jax.lax.ragged_all_to_all(flat, jnp.zeros_like(flat), starts, sent, there, received, axis_name=axis)
    return moved.reshape(rows.shape)
