"""The recurrence as written, one token at a time: slow, obvious, in the widest dtype of its inputs (at least fp32)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen35_jax.ops.segments import segment_index


def gated_delta_rule(q, k, v, g, beta, *, initial_state=None, segment_ids=None, normalize_qk=True):
    """As `ops.gated_delta.gated_delta_rule`; out and final_state come in the dtype of the computation."""
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    q, k, v, g, beta = (x.astype(dtype) for x in (q, k, v, g, beta))
    batch, time, heads, width = v.shape
    if normalize_qk:
        q, k = (x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6) for x in (q, k))
    q, k = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (q * q.shape[-1] ** -0.5, k))
    state = jnp.zeros((batch, heads, k.shape[-1], width), dtype)
    if initial_state is not None:
        state = initial_state.astype(dtype)
    restart = jnp.zeros((batch, time), bool)
    if segment_ids is not None:
        real = (segment_ids != 0)[..., None]
        g, beta = jnp.where(real, g, 0), jnp.where(real, beta, 0)
        restart = jnp.diff(segment_index(segment_ids), axis=1, prepend=0) > 0

    def token(state, inputs):
        q, k, v, g, beta, restart = inputs
        state = jnp.where(restart[:, None, None, None], 0, state) * jnp.exp(g)[..., None, None]
        update = beta[..., None] * (v - jnp.einsum("bnkv,bnk->bnv", state, k, precision="highest"))
        state = state + k[..., None] * update[..., None, :]
        return state, jnp.einsum("bnkv,bnk->bnv", state, q, precision="highest")

    inputs = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, g, beta, restart))
    state, out = jax.lax.scan(token, state, inputs)
    return jnp.moveaxis(out, 0, 1), state
