"""How the kernels that read a cache cut their queries: all query heads of a key head together, for a power of two of tokens."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Tile:
    """A block of queries has ratio heads x tokens as its rows, so that a row's token is its index modulo `tokens`; a block of
    keys is `keys` of the cache's places."""

    ratio: int
    tokens: int
    keys: int
    places: int

    @property
    def rows(self) -> int:
        return self.ratio * self.tokens

    def cut(self, q: jax.Array, groups: int) -> jax.Array:
        """[B, T, N, H] -> [B, K, blocks, R t, H]."""
        batch, time, _, width = q.shape
        q = jnp.pad(q, ((0, 0), (0, -time % self.tokens), (0, 0), (0, 0)))
        q = q.reshape(batch, -1, self.tokens, groups, self.ratio, width)
        return jnp.transpose(q, (0, 3, 1, 4, 2, 5)).reshape(batch, groups, -1, self.rows, width)

    def joined(self, x: jax.Array, time: int) -> jax.Array:
        """The inverse."""
        batch, groups, blocks, _, width = x.shape
        x = x.reshape(batch, groups, blocks, self.ratio, self.tokens, width)
        x = jnp.transpose(x, (0, 2, 4, 1, 3, 5)).reshape(batch, blocks * self.tokens, groups * self.ratio, width)
        return x[:, :time]


def tokens_of_block(ratio: int, time: int, rows: int) -> int:
    """As many as fit `rows` rows, or hold all."""
    tokens = 1
    while tokens < time and 2 * tokens * ratio <= rows:
        tokens *= 2
    return tokens


def end(base, cut, token):
    """How many keys a token sees: see `attend` of the kernels."""
    return base + jnp.clip(token + 1 - cut[0], 0, cut[1])


def seen(tile: Tile, base, count, cut, b, i):
    """How many keys the last token of block i of row b's queries sees."""
    return end(base[b], cut, jnp.minimum((i + 1) * tile.tokens, count[b]) - 1)
