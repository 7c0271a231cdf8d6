"""Attention over a cache of keys and values; in plain XLA one token (decode) in a few large ops, several in blocks."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from qwen35_jax.ops.attention import gpu_cached, tpu_cached, xla

KERNELS = {"pallas_tpu": tpu_cached.attend, "pallas_gpu": gpu_cached.attend}


def cached_attention(q, k, v, cache_k, cache_v, slots, start, count, implementation):
    """See `ops.attention.cached_attention`."""
    cache_k = append(cache_k, k, slots, start, count)
    cache_v = append(cache_v, v, slots, start, count)
    if implementation in KERNELS:
        out = KERNELS[implementation](q.astype(cache_k.dtype), cache_k, cache_v, slots, start, count)
        return out.astype(q.dtype), cache_k, cache_v
    attend = _attend_token if q.shape[1] == 1 else _attend_tokens
    return attend(q, cache_k, cache_v, slots, start, count), cache_k, cache_v


def append(cache, new, slots, start, count):
    """Write new [B, T, K, H] into cache [S, K, Tc, H] at each row's slot and start; in place if donated."""
    slots = jnp.arange(new.shape[0], dtype=jnp.int32) if slots is None else slots
    # Outside the cache: a scatter drops the whole window of a dead row.
    slots = jnp.where(count > 0, slots, cache.shape[0])
    if new.shape[0] == 1:
        # With a dead row beside it: XLA turns the scatter of a single row into an update that it fuses into each reader
        # of the cache, and XLA:CPU then copies the cache for each.
        slots, start, new = jnp.append(slots, cache.shape[0]), jnp.tile(start, 2), jnp.tile(new, (2, 1, 1, 1))
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2, 3), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, 2)
    )
    return jax.lax.scatter(
        cache,
        jnp.stack([slots, start], axis=-1),
        jnp.swapaxes(new, 1, 2).astype(cache.dtype),
        numbers,
        unique_indices=True,
        mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
    )


def _attend_token(q, cache_k, cache_v, slots, start, count):
    """T = 1: scores over the whole cache, masked, so that there is no loop to run for every token."""
    scores, values = token_scores(q, cache_k, cache_v, slots, start)
    return weighted(jax.nn.softmax(scores, axis=-1), values).reshape(q.shape).astype(q.dtype)


def token_scores(q, cache_k, cache_v, slots, last):
    """Scores [B, K, R, Tc] fp32 of q [B, 1, N, H] with the keys up to index last [B], -inf beyond; and the rows' values."""
    keys, values = (cache_k, cache_v) if slots is None else (cache_k[slots], cache_v[slots])
    queries = xla.split_heads(q, keys.shape[1])[..., 0, :]
    scores = _einsum("bkrh,bksh->bkrs", queries, keys) * q.shape[-1] ** -0.5
    seen = jnp.arange(keys.shape[2]) <= last[:, None]
    return jnp.where(seen[:, None, None], scores, -jnp.inf), values


def weighted(weights, values):
    """Sum of the values [B, K, Tc, H] with weights [B, K, R, Tc]: [B, K, R, H] fp32."""
    return _einsum("bkrs,bksh->bkrh", weights.astype(values.dtype), values)


def _einsum(spec, x, y):
    x = x.astype(y.dtype)
    precision = jax.lax.Precision.HIGHEST if y.dtype == jnp.float32 else None
    return jnp.einsum(spec, x, y, precision=precision, preferred_element_type=jnp.float32)


def _attend_tokens(q, cache_k, cache_v, slots, start, count):
    """T > 1: as `attention`, with the keys of each block read from the cache."""
    positions = start[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)
    # Dead rows and padding must not make the loop longer: their queries see nothing.
    positions = jnp.where(jnp.arange(q.shape[1]) < count[:, None], positions, -1)
    out, _ = attend_cache(q, cache_k, cache_v, slots, positions)
    return xla.joined(out, q.shape[1]).astype(q.dtype)


def attend_cache(q, cache_k, cache_v, slots, positions):
    """`xla.attend` of q [B, T, N, H] to the keys of the cache up to index positions [B, T]."""
    keys = cache_k.shape[2]
    block = min(xla.BLOCK_K, keys)

    def fetch(j):
        begin, index, fresh = xla.key_range(j, block, keys)
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=begin, slice_size=block, axis=2)
        k, v = (cut(cache) if slots is None else cut(cache)[slots] for cache in (cache_k, cache_v))
        return k, v, index, fresh, None

    return xla.attend(q.astype(cache_k.dtype), positions, None, cache_k.shape[1], fetch, block)
