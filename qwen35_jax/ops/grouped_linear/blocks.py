"""Loops over blocks of rows, each inside one group, whose length follows the rows and not the number of groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qwen35_jax.ops.fp8.chunks import as_bits

# Rows of a block. A group is cut into blocks of the largest size; the rest takes the smallest that holds it. So a group
# of one row costs one row, and a large group rereads its weight seldom.
SIZES = (1, 8, 32, 64)


def fewer_sizes(rows: int, groups: int) -> tuple[int, ...]:
    """Those of SIZES that are at least a quarter of the mean group, for CPUs: each size is a loop to compile."""
    return tuple(size for size in SIZES[:-1] if 4 * size * groups >= rows) + SIZES[-1:]


def for_blocks(block: Callable, carry: Any, operands: Any, group_sizes: jax.Array, rows: int, sizes=SIZES) -> Any:
    """carry = block(carry, operands, group, start, size, mine) for every block of at most `size` rows of one group.

    The block's slice is start .. start + size, inside the `rows` rows; `mine` [size, 1] bool marks its own. `block`
    must use the operands it is given: closing over them lets XLA:CPU move their conversion out of the loop.
    """
    sizes = [min(size, rows) for i, size in enumerate(sizes) if i == 0 or sizes[i - 1] < rows]
    firsts = jnp.cumsum(group_sizes) - group_sizes
    full, rest = group_sizes // sizes[-1], group_sizes % sizes[-1]
    # One loop for each size, rather than one loop that chooses: XLA would copy the carry at every choice.
    for i, size in enumerate(sizes):
        counts = ((rest > (sizes[i - 1] if i else 0)) & (rest <= size)).astype(jnp.int32)
        skipped = full if i + 1 < len(sizes) else jnp.zeros_like(full)
        counts = counts + full - skipped
        carry = _loop(block, carry, operands, counts, firsts + skipped * sizes[-1], firsts + group_sizes, size, rows)
    return carry


def _loop(block, carry, operands, counts, firsts, ends, size: int, rows: int):
    """Group e's counts[e] blocks of one size begin at row firsts[e]; its rows end at ends[e]."""
    totals = jnp.cumsum(counts)

    def step(i, carry):
        # Ties the operands to this step: without it XLA:CPU converts or copies all groups' weights before the loop.
        here, i = jax.lax.optimization_barrier((operands, i))
        group = jnp.sum(totals <= i)
        row = firsts[group] + (i - totals[group] + counts[group]) * size
        start = jnp.minimum(row, rows - size)  # the slice must lie inside the array
        index = start + jnp.arange(size)
        mine = (index >= row) & (index < ends[group])
        return block(carry, here, group, start, size, mine[:, None])

    return jax.lax.fori_loop(0, totals[-1], step, carry)


def take_rows(a: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """a[start : start + size], of any dtype."""
    return jax.lax.bitcast_convert_type(jax.lax.dynamic_slice_in_dim(as_bits(a), start, size), a.dtype)
