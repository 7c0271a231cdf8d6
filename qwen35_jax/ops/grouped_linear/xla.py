"""`grouped_linear` in plain XLA: a loop over blocks of rows of one group each, as many as the routed rows fill."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from qwen35_jax.errors import UserError
from qwen35_jax.ops.fp8 import Fp8Weight, dequantize

MAX_BLOCK = 128


def grouped_linear_xla(x: jax.Array, w: jax.Array | Fp8Weight, group_sizes: jax.Array) -> jax.Array:
    """See `qwen35_jax.ops.grouped_linear.grouped_linear`."""
    shape = w.values.shape if isinstance(w, Fp8Weight) else w.shape
    ins = x.shape[1:]
    if shape[1 : x.ndim] != ins or group_sizes.shape != shape[:1]:
        raise UserError(f"grouped_linear: x {x.shape}, w {shape} and group_sizes {group_sizes.shape} do not fit")
    outs = shape[x.ndim :]
    if x.shape[0] == 0 or math.prod(outs) == 0:
        return jnp.zeros((x.shape[0], *outs), x.dtype)
    if isinstance(w, Fp8Weight):
        out = _fp8_product(len(ins), x, w, group_sizes)
    else:
        out = _product(x.reshape(x.shape[0], -1), w.astype(x.dtype).reshape(shape[0], math.prod(ins), -1), group_sizes)
    return out.reshape(x.shape[0], *outs)


def block_rows(rows: int, groups: int) -> int:
    """Rows of one block: about the mean size of a group, a power of two."""
    return min(MAX_BLOCK, 1 << max(0, math.ceil(math.log2(max(1, rows / groups)))))


def _blocks(group_sizes: jax.Array, size: int):
    """(the number of blocks, a function from a block's index to its group, first row and end of its group)."""
    ends = jnp.cumsum(group_sizes)
    block_ends = jnp.cumsum((group_sizes + size - 1) // size)

    def locate(i):
        group = jnp.searchsorted(block_ends, i, side="right")
        first = ends[group] - group_sizes[group]
        done = block_ends[group] - (group_sizes[group] + size - 1) // size
        return group, first + (i - done) * size, ends[group]

    return block_ends[-1], locate


def _for_blocks(group_sizes, rows: int, body, init):
    """carry = body(carry, group, start, mine) for every block; rows start .. start + len(mine), `mine` [size, 1] marks its own."""
    size = min(rows, block_rows(rows, group_sizes.shape[0]))
    count, locate = _blocks(group_sizes, size)

    def step(i, carry):
        group, first, end = locate(i)
        start = jnp.minimum(first, rows - size)  # a slice must lie inside the array
        index = start + jnp.arange(size)
        return body(carry, group, start, size, ((index >= first) & (index < end))[:, None])

    return jax.lax.fori_loop(0, count, step, init)


def _forward(x, weight_of, group_sizes, out_width: int):
    """Rows times weight_of(group) [in, out] float32."""

    def body(out, group, start, size, mine):
        rows = jax.lax.dynamic_slice_in_dim(x, start, size).astype(jnp.float32)
        y = jnp.dot(rows, weight_of(group)).astype(x.dtype)
        old = jax.lax.dynamic_slice_in_dim(out, start, size)
        return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(mine, y, old), start, 0)

    return _for_blocks(group_sizes, x.shape[0], body, jnp.zeros((x.shape[0], out_width), x.dtype))


def _outer(x, dy, group_sizes):
    """The weight gradient: x [R, in], dy [R, out] -> [E, in, out] float32."""

    def body(dw, group, start, size, mine):
        rows = jnp.where(mine, jax.lax.dynamic_slice_in_dim(x, start, size), 0).astype(jnp.float32)
        grads = jax.lax.dynamic_slice_in_dim(dy, start, size).astype(jnp.float32)
        return dw.at[group].add(jnp.dot(rows.T, grads))

    init = jnp.zeros((group_sizes.shape[0], x.shape[1], dy.shape[1]), jnp.float32)
    return _for_blocks(group_sizes, x.shape[0], body, init)


@jax.custom_vjp
def _product(x, w, group_sizes):
    """x [R, in], w [E, in, out] of the same dtype."""

    def loop(x, w, group_sizes):
        return _forward(x, lambda group: w[group].astype(jnp.float32), group_sizes, w.shape[2])

    return jax.lax.platform_dependent(x, w, group_sizes, tpu=_ragged_dot, default=loop)


def _ragged_dot(x, w, group_sizes):
    out = jax.lax.ragged_dot(x, w, group_sizes, preferred_element_type=x.dtype)
    return jnp.where((jnp.arange(x.shape[0]) < group_sizes.sum())[:, None], out, 0)


def _product_forward(x, w, group_sizes):
    return _product(x, w, group_sizes), (x, w, group_sizes)


def _product_backward(residuals, dy):
    x, w, group_sizes = residuals
    dx = _forward(dy, lambda group: w[group].T.astype(jnp.float32), group_sizes, w.shape[1])
    return dx, _outer(x, dy, group_sizes).astype(w.dtype), None


_product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fp8_product(ins: int, x, w, group_sizes):
    rows = x.shape[0]
    out_width = math.prod(w.values.shape[1 + ins :])

    def weight_of(group):
        return _expert(w, group, x.dtype).reshape(-1, out_width)

    return _forward(x.reshape(rows, -1), weight_of, group_sizes, out_width)


def _expert(w: Fp8Weight, group, dtype):
    """Expert `group`, dequantised as the activations' dtype has it, in float32."""
    return dequantize(Fp8Weight(w.values[group], w.scales[group]), dtype).astype(jnp.float32)


def _fp8_product_forward(ins, x, w, group_sizes):
    return _fp8_product(ins, x, w, group_sizes), (x, w, group_sizes)


def _fp8_product_backward(ins, residuals, dy):
    x, w, group_sizes = residuals
    in_width = math.prod(x.shape[1:])

    def weight_of(group):
        return _expert(w, group, x.dtype).reshape(in_width, -1).T

    dx = _forward(dy, weight_of, group_sizes, in_width)
    return dx.reshape(x.shape), None, None


_fp8_product.defvjp(_fp8_product_forward, _fp8_product_backward)
