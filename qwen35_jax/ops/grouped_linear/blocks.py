"""A loop over blocks of rows, each inside one group, whose length follows the rows and not the number of groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Rows of a block. The smallest that holds what is left of the group is taken, so that a group of one row costs one row
# and a large group rereads its weight seldom.
SIZES = (1, 8, 32, 128)


def for_blocks(block: Callable, carry: Any, operands: Any, group_sizes: jax.Array, rows: int) -> Any:
    """carry = block(carry, operands, group, start, size, mine) for every block of at most `size` rows of one group.

    The block's slice is start .. start + size, inside the `rows` rows; `mine` [size, 1] bool marks its own. `block`
    must use the operands it is given: closing over them lets XLA:CPU move their conversion out of the loop.
    """
    ends = jnp.cumsum(group_sizes)
    sizes = [size for i, size in enumerate(SIZES) if i == 0 or SIZES[i - 1] < rows]
    sizes = [min(size, rows) for size in sizes]

    def of_size(size: int):
        def run(carry, operands, group, row, end):
            start = jnp.minimum(row, rows - size)  # the slice must lie inside the array
            index = start + jnp.arange(size)
            mine = (index >= row) & (index < end)
            return block(carry, operands, group, start, size, mine[:, None])

        return run

    def step(state):
        row, carry = state
        # Ties the operands to this step: without it XLA:CPU converts or copies all groups' weights before the loop.
        here, row = jax.lax.optimization_barrier((operands, row))
        group = jnp.sum(ends <= row)
        left = ends[group] - row
        which = sum((left > size).astype(jnp.int32) for size in sizes[:-1])
        carry = jax.lax.switch(which, [of_size(size) for size in sizes], carry, here, group, row, ends[group])
        return row + jnp.minimum(left, jnp.asarray(sizes)[which]), carry

    return jax.lax.while_loop(lambda state: state[0] < ends[-1], step, (jnp.zeros((), ends.dtype), carry))[1]


def _bits(a: jax.Array) -> jax.Array:
    """The array as integers of its width: XLA:CPU slices those in place, but a narrow float it first converts whole."""
    return a if a.dtype.itemsize > 2 else jax.lax.bitcast_convert_type(a, f"uint{8 * a.dtype.itemsize}")


def take(a: jax.Array, index: jax.Array) -> jax.Array:
    """a[index], of any dtype."""
    return jax.lax.bitcast_convert_type(jax.lax.dynamic_index_in_dim(_bits(a), index, keepdims=False), a.dtype)


def take_rows(a: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """a[start : start + size], of any dtype."""
    return jax.lax.bitcast_convert_type(jax.lax.dynamic_slice_in_dim(_bits(a), start, size), a.dtype)
