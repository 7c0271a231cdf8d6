"""Which tile of a grouped product covers which rows: a table that follows the rows and not the number of groups."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

# Rows of a tile in shared memory as `wgmma` reads it: a copy to or from one begins at a multiple of it.
ALIGNED = 8


@dataclasses.dataclass(frozen=True)
class Shape:
    """A tile of a product: `rows` x `columns`, made by two warpgroups that each take half of the rows or of the columns;
    `depth` of the summed axis at a time."""

    rows: int
    columns: int
    depth: int
    split_rows: bool = False

    @property
    def part(self) -> tuple[int, int]:
        """Rows and columns of one warpgroup."""
        return (self.rows // 2, self.columns) if self.split_rows else (self.rows, self.columns // 2)

    def corner(self, warpgroup: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where a warpgroup's part begins in the tile."""
        return (warpgroup * self.part[0], 0) if self.split_rows else (0, warpgroup * self.part[1])


def tile_count(rows: int, groups: int, height: int) -> int:
    """The most tiles of `height` rows that `groups` groups and the rows behind them can need."""
    groups = min(groups + 1, rows)
    return (rows + (ALIGNED - 1) * groups) // height + groups


def row_tiles(group_sizes: jax.Array, rows: int, height: int) -> tuple[jax.Array, ...]:
    """Tiles of at most `height` rows of one group: group, start, skip, size int32 [tile_count], and how many there are [1].

    A tile computes rows start .. start + height, all inside the array, of which `size` behind the first `skip` are its own.
    Rows behind the groups form a last one, whose number is that of the groups. `rows` and every start are multiples of ALIGNED.
    """
    sizes = jnp.concatenate([group_sizes, rows - jnp.sum(group_sizes, keepdims=True)]).astype(jnp.int32)
    firsts = jnp.cumsum(sizes) - sizes
    before = firsts % ALIGNED  # rows of other groups that a group's first tile begins with
    counts = jnp.where(sizes > 0, -(-(before + sizes) // height), 0)
    ends = jnp.cumsum(counts)
    tile = jnp.arange(tile_count(rows, group_sizes.shape[0], height), dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(ends, tile, side="right"), sizes.shape[0] - 1).astype(jnp.int32)
    begin = (firsts - before)[group] + (tile - ends[group] + counts[group]) * height
    first, last = jnp.maximum(begin, firsts[group]), jnp.minimum(begin + height, (firsts + sizes)[group])
    start = jnp.minimum(begin, rows - height)
    return group, start, first - start, jnp.maximum(last - first, 0), ends[-1:]
