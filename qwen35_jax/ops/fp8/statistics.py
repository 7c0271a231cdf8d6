"""What quantisation does to the operands of an FP8 product: sums of squares and counts, from which ratios are made.

The backward pass of a product hands them out in place of the weight's gradient, so that they come back through scans,
`shard_map` and rematerialisation with no path of their own. They stand along one axis of an array of the weight's shape,
zeros elsewhere: summing over all other axes gives them back however the weight was cut, repeated or gathered.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

OPERANDS = ("activation", "weight", "gradient")  # x, w and the gradient of the product, as the products multiply them
_OF_OPERAND = 4
COUNT = 2 + _OF_OPERAND * len(OPERANDS)


def difference(exact: jax.Array, approximate: jax.Array) -> jax.Array:
    """[2] float32: sums of squares of approximate - exact, and of exact."""
    exact = exact.astype(jnp.float32)
    return jnp.stack([jnp.sum((approximate.astype(jnp.float32) - exact) ** 2), jnp.sum(exact**2)])


def operand_statistics(exact: jax.Array, rounded: jax.Array) -> jax.Array:
    """[4] float32: `difference`, how many entries became zero, how many were not zero."""
    lost = jnp.sum((exact != 0) & (rounded == 0), dtype=jnp.float32)
    return jnp.concatenate([difference(exact, rounded), jnp.stack([lost, jnp.sum(exact != 0, dtype=jnp.float32)])])


def pack(statistics: jax.Array, shape: tuple[int, ...], axis: int, dtype) -> jax.Array:
    """`statistics` [COUNT], or several of its parts, along `axis` of an array of `shape`; zeros elsewhere."""
    axis = axis % len(shape)
    out = jnp.pad(statistics, (0, shape[axis] - statistics.shape[0]))
    out = out.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    for i, size in enumerate(shape):
        if i != axis:
            first = jnp.arange(size) == 0
            out = jnp.where(first.reshape([-1 if j == i else 1 for j in range(len(shape))]), out, 0.0)
    return out.astype(dtype)


def ratios(statistics: jax.Array) -> dict[str, jax.Array]:
    """[..., COUNT] -> {"product_error", "activation_error", "activation_underflow", "weight_error", ...} [...] float32.

    Errors are relative Frobenius norms; underflow is the share of the entries other than zero that became zero.
    """
    statistics = statistics.astype(jnp.float32)

    def ratio(i, j):
        return statistics[..., i] / jnp.maximum(statistics[..., j], jnp.finfo(jnp.float32).tiny)

    result = {"product_error": jnp.sqrt(ratio(0, 1))}
    for n, name in enumerate(OPERANDS):
        first = 2 + _OF_OPERAND * n
        result[f"{name}_error"] = jnp.sqrt(ratio(first, first + 1))
        result[f"{name}_underflow"] = ratio(first + 2, first + 3)
    return result
