"""Attention over a cache whose places are cut over a mesh axis: queries go to all shards, keys stay where they are made.

A prefill of `n * block` tokens is cut into `n` blocks, one a shard, and each shard keeps the keys of its own: block `j` of the
sequence is on shard `j % n`, behind the blocks that came there before. So no key ever moves, and every shard has an equal share
of the context, whatever its length. The queries of a prefill are gathered, each shard attends from all of them to its own
keys, and the partial outputs are added up by their softmax sums and scattered. Per token and layer that is N x H numbers out
and N x H float32 numbers back, whatever the size of a prefill; keys that go round instead move the whole cache in each.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from qwen35_jax.errors import UserError
from qwen35_jax.ops.attention import cached, xla


@dataclasses.dataclass(frozen=True)
class ShardedCache:
    """How a cache lies on the shards of mesh axis `axis`: `block` tokens of the sequence on each in turn.

    tokens_cut: a step's tokens are cut too, `block` a shard, from a multiple of all shards' blocks on (prefill). Else every shard
    has the step's one token (decode).
    """

    axis: str
    block: int
    tokens_cut: bool

    def check(self, tokens: int, places: int) -> None:
        """UserError where a step of so many tokens a shard, on a cache of so many places a shard, does not fit the layout."""
        expected = self.block if self.tokens_cut else 1
        if tokens != expected or self.block < 1 or places % self.block:
            raise UserError(
                f"cached_attention: {tokens} tokens and {places} places a shard; "
                f"the layout takes {expected} tokens, and places in multiples of {self.block}"
            )

    def last_seen(self, position):
        """Index among this shard's keys of the last one at or before `position` of the sequence, -1 where there is none."""
        rank, turn = jax.lax.axis_index(self.axis), self.block * jax.lax.axis_size(self.axis)
        own = jnp.clip(position % turn - rank * self.block + 1, 0, self.block)
        return position // turn * self.block + own - 1


def cached_attention(q, k, v, cache_k, cache_v, slots, start, count, layout: ShardedCache, implementation):
    """See `ops.attention.cached_attention` with a layout."""
    layout.check(q.shape[1], cache_k.shape[2])
    if layout.tokens_cut:
        return _prefill(q, k, v, cache_k, cache_v, slots, start, count, layout, implementation)
    # The shard whose last key a position is counts one more up to it than up to the one before.
    place = layout.last_seen(start)
    owned = jnp.where(place > layout.last_seen(start - 1), count, 0)
    cache_k, cache_v = (cached.append(c, x, slots, place, owned) for c, x in ((cache_k, k), (cache_v, v)))
    if implementation in cached.KERNELS:
        out, log_sum = _by_kernel(implementation, q, cache_k, cache_v, slots, place, count, (0, 1))
    else:
        out, log_sum = _token_by_xla(q, cache_k, cache_v, slots, place)
    return _added(out, log_sum, layout.axis).astype(q.dtype), cache_k, cache_v


def _by_kernel(implementation: str, q, cache_k, cache_v, slots, base, count, cut):
    attend = cached.KERNELS[implementation]
    return attend(q.astype(cache_k.dtype), cache_k, cache_v, slots, base, count, cut, partial=True)


def _token_by_xla(q, cache_k, cache_v, slots, place):
    scores, values = cached.token_scores(q, cache_k, cache_v, slots, place)
    log_sum = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - jnp.where(log_sum == -jnp.inf, 0, log_sum)[..., None])
    return cached.weighted(weights, values).reshape(q.shape), log_sum.reshape(q.shape[:3])


def _prefill(q, k, v, cache_k, cache_v, slots, start, count, layout: ShardedCache, implementation):
    time, axis = q.shape[1], layout.axis
    place = start // jax.lax.axis_size(axis)
    own = jnp.clip(count - jax.lax.axis_index(axis) * time, 0, time)
    cache_k, cache_v = (cached.append(c, x, slots, place, own) for c, x in ((cache_k, k), (cache_v, v)))
    q = jax.lax.all_gather(q, axis, axis=1, tiled=True)
    if implementation in cached.KERNELS:
        # `start` is a multiple of what all shards hold of a step: token t sees, of this one's new keys, those of its own block.
        cut = jax.lax.axis_index(axis) * time, time
        out, log_sum = _by_kernel(implementation, q, cache_k, cache_v, slots, place, count, cut)
    else:
        out, log_sum = _tokens_by_xla(q, cache_k, cache_v, slots, start, count, layout)
    return _added(out, log_sum, axis, scattered=1).astype(q.dtype), cache_k, cache_v


def _tokens_by_xla(q, cache_k, cache_v, slots, start, count, layout: ShardedCache):
    column = jnp.arange(q.shape[1], dtype=jnp.int32)
    last = jnp.where(column < count[:, None], layout.last_seen(start[:, None] + column), -1)
    out, log_sum = cached.attend_cache(q, cache_k, cache_v, slots, last)
    out, log_sum = xla.joined(out, q.shape[1]), xla.joined(log_sum[..., None], q.shape[1])[..., 0]
    return out, jnp.where(log_sum == jnp.inf, -jnp.inf, log_sum)


def _added(out, log_sum, axis: str, scattered: int | None = None):
    """Attention over the keys of all shards, from each one's output [..., H] and log of the softmax's sum (-inf: saw nothing).

    scattered: the dimension of which each shard gets its own part.
    """
    peak = jax.lax.pmax(log_sum, axis)
    weight = jnp.exp(log_sum - jnp.where(peak == -jnp.inf, 0, peak))
    out = out * weight[..., None]
    if scattered is None:
        out, total = jax.lax.psum((out, weight), axis)
    else:
        out, total = (jax.lax.psum_scatter(x, axis, scatter_dimension=scattered, tiled=True) for x in (out, weight))
    return out / jnp.where(total == 0, 1, total)[..., None]
