"""`linear` in FP8, forward and backward, in plain XLA. The residual is x in 8 bits; the weight is quantised again.

On the CPU the operands are rounded to FP8 but multiplied in float32: the same numbers up to the order of summation.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from qwen35_jax.errors import UserError
from qwen35_jax.ops.fp8.activations import Fp8Activation
from qwen35_jax.ops.fp8.blocks import quantize_blocks, requantize_blocks, round_blocks
from qwen35_jax.ops.fp8.statistics import difference, operand_statistics, pack
from qwen35_jax.ops.fp8.training import Fp8Operand, block_dot, dequantize_blocks, float_dot

TOKENS, INS, OUTS = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the axes of tokens, of those that are summed and of the results, and into how many parts each axis is cut."""

    shapes: tuple[tuple[int, ...], ...]
    cuts: tuple[tuple[int, ...], ...]

    def pair(self, group: int) -> tuple[int, int]:
        """[parts, entries of a part] of a group."""
        parts = math.prod(self.cuts[group])
        return parts, math.prod(self.shapes[group]) // parts

    def _split(self, group: int) -> list[int]:
        return [n for size, parts in zip(self.shapes[group], self.cuts[group], strict=True) for n in (parts, size // parts)]

    def view(self, a: jax.Array, *groups: int) -> jax.Array:
        """An array with the axes of these groups, others perhaps behind them, with [parts, entries of a part] of each."""
        split, order = [], []
        for group in groups:
            begin, split = len(split), split + self._split(group)
            order += [*range(begin, len(split), 2), *range(begin + 1, len(split), 2)]
        behind = a.shape[len(split) // 2 :]
        a = a.reshape(*split, *behind).transpose(*order, *range(len(order), len(order) + len(behind)))
        return a.reshape(*(n for group in groups for n in self.pair(group)), *behind)

    def flat(self, a: jax.Array, *groups: int) -> jax.Array:
        """The inverse of `view`."""
        split, order, behind = [], [], a.shape[2 * len(groups) :]
        for group in groups:
            sizes, begin = self._split(group), len(split)
            split += [*sizes[::2], *sizes[1::2]]
            order += [begin + i + half * len(sizes) // 2 for i in range(len(sizes) // 2) for half in (0, 1)]
        a = a.reshape(*split, *behind).transpose(*order, *range(len(order), len(order) + len(behind)))
        return a.reshape(*(n for group in groups for n in self.shapes[group]), *behind)


def _layout(x: jax.Array, w: Fp8Operand, spec: str) -> Layout:
    inputs, out = spec.split("->")
    x_axes, w_axes = inputs.split(",")
    count = sum(a in x_axes for a in w_axes)
    tokens, ins, outs = x_axes[: len(x_axes) - count], w_axes[:count], w_axes[count:]
    if not ins or x_axes != tokens + ins or out != tokens + outs:
        raise UserError(f"linear {spec!r}: FP8 training wants the summed axes last in x and first in w, such as BTNH,NHD->BTD")
    sizes = dict(zip(x_axes + w_axes, x.shape + w.value.shape, strict=True))
    parts = dict(w.cuts)

    def cut(letter):
        n = parts.get(letter, 1)
        return n if sizes[letter] % n == 0 else 1

    groups = (tokens, ins, outs)
    return Layout(*(tuple(tuple(map(of, group)) for group in groups) for of in (sizes.get, cut)))


def linear_fp8(x: jax.Array | Fp8Activation, w: Fp8Operand, spec: str, out_dtype, kernel=None) -> jax.Array:
    """See `qwen35_jax.ops.linear.linear`; shapes are checked. kernel(dtype, ...), taken for
    `block_dot`, does what that does, with a result in `dtype`."""
    layout = _layout(x.x if isinstance(x, Fp8Activation) else x, w, spec)
    if isinstance(x, Fp8Activation) and layout.cuts[INS] == (1,):
        x, values, scales = x.x, x.values, x.scales
    else:
        x = x.x if isinstance(x, Fp8Activation) else x
        values, scales = quantize_blocks(layout.view(jax.lax.stop_gradient(x), TOKENS, INS), (3,))
        values = layout.flat(values, TOKENS, INS)
        scales = layout.flat(scales.reshape(*layout.pair(TOKENS), -1), TOKENS)
    static = kernel, layout, jnp.dtype(out_dtype), x.dtype, w.statistics_axis
    return _product(*static, x, values, scales, w.value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _product(kernel, layout, out_dtype, x_dtype, statistics_axis, x, values, scales, w):
    """The product of values x scales with w; x stands there to receive the gradient."""
    form = functools.partial(_forward, layout)
    if kernel:
        y = form(lambda *q: q, quantize_blocks, functools.partial(kernel, out_dtype), (values, scales), w)
        return layout.flat(y, TOKENS, OUTS)
    y = jax.lax.platform_dependent(
        (values, scales), w,
        cpu=functools.partial(form, dequantize_blocks, round_blocks, float_dot),
        default=functools.partial(form, lambda *q: q, quantize_blocks, block_dot),
    )  # fmt: skip
    return layout.flat(y, TOKENS, OUTS).astype(out_dtype)


def _product_forward(kernel, layout, out_dtype, x_dtype, statistics_axis, x, values, scales, w):
    y = _product(kernel, layout, out_dtype, x_dtype, statistics_axis, x, values, scales, w)
    statistics = None if statistics_axis is None else _statistics(layout, x, values, scales, w, y)
    return y, (values, scales, w, statistics)


def _product_backward(kernel, layout, out_dtype, x_dtype, statistics_axis, residuals, dy):
    values, scales, w, statistics = residuals
    dy = jax.lax.optimization_barrier(dy.astype(x_dtype))  # else XLA quantises, and holds, what it was before it was rounded
    form = functools.partial(_backward, layout)
    if kernel:
        dots = (functools.partial(kernel, dtype) for dtype in (x_dtype, w.dtype))
        dx, dw = form(quantize_blocks, requantize_blocks, *dots, (values, scales), w, dy)
    else:
        dx, dw = jax.lax.platform_dependent(
            (values, scales), w, dy,
            cpu=functools.partial(form, round_blocks, _round_again, float_dot, float_dot),
            default=functools.partial(form, quantize_blocks, requantize_blocks, block_dot, block_dot),
        )  # fmt: skip
    dx, dw = layout.flat(dx, TOKENS, INS).astype(x_dtype), layout.flat(dw, INS, OUTS).astype(w.dtype)
    if statistics_axis is not None:
        exact = layout.view(dy, TOKENS, OUTS)
        statistics = jnp.concatenate([statistics, operand_statistics(exact, round_blocks(exact, (3,)))])
        dw = pack(statistics, w.shape, statistics_axis, w.dtype)
    return dx, None, None, dw


_product.defvjp(_product_forward, _product_backward)


def _activation(layout: Layout, values, scales):
    """x as (values, scales) of its four-dimensional form."""
    scales = layout.view(scales, TOKENS).reshape(*layout.pair(TOKENS), layout.pair(INS)[0], -1)
    return layout.view(values, TOKENS, INS), scales


def _forward(layout, opened, quantised, dot, x, w):
    return dot(opened(*_activation(layout, *x)), 1, quantised(layout.view(w, INS, OUTS), (1, 3)), 0)


def _backward(layout, quantised, quantised_again, dot_x, dot_w, x, w, dy):
    """The gradients of x and of w: the first sums over results, the second over tokens, and both quantise along them."""
    x, w, dy = _activation(layout, *x), layout.view(w, INS, OUTS), layout.view(dy, TOKENS, OUTS)
    dx = dot_x(quantised(dy, (3,)), 1, quantised(w, (1, 3)), 1)
    return dx, dot_w(quantised_again(*x, (1,)), 0, quantised(dy, (1,)), 0)


def _round_again(values, scales, blocked_axes):
    return round_blocks(dequantize_blocks(values, scales), blocked_axes)


def _statistics(layout, x, values, scales, w, y):
    """Those that the forward pass knows: of the product, beside that in x's dtype, of x and of w."""
    x, w = layout.view(x, TOKENS, INS), layout.view(w, INS, OUTS)
    exact = float_dot(x, 1, w.astype(x.dtype), 0)
    rounded = dequantize_blocks(*_activation(layout, values, scales))
    parts = [difference(exact, layout.view(y, TOKENS, OUTS)), operand_statistics(x, rounded)]
    return jnp.concatenate([*parts, operand_statistics(w, round_blocks(w, (1, 3)))])
