"""Operands of FP8 products, and what the products are in float64."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np

from qwen35_jax.ops import fp8
from qwen35_jax.ops.fp8 import Fp8Operand
from qwen35_jax.ops.fp8.reference import products_reference

SIZES = {"B": 3, "T": 50, "D": 200, "N": 3, "G": 2, "H": 64, "K": 1, "F": 130}
ROWS, GROUPS, IN, OUT = 300, 4, 136, 72
GROUP_SIZES = {
    "ragged": (3, 0, 200, 17),
    "all in one": (0, 300, 0, 0),
    "full": (75, 150, 11, 64),
    "none": (0, 0, 0, 0),
    "one row each": (1, 1, 1, 1),
}
# Inside, what was traced in another form for the same shapes is not used again.
TRACED_IN = jax.make_user_context("")
# In one program each: a compilation of every operation takes longer than the tests do.
quantize_weight = jax.jit(fp8.quantize_weight, static_argnums=(1, 2))
quantize_activation = jax.jit(fp8.quantize_activation)


def normal(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def spec_operands(spec, dtype=jnp.float32, sizes=SIZES):
    x_axes, w_axes, out = re.split(",|->", spec)
    x, w, dy = (normal([sizes[a] for a in axes], i, dtype) for i, axes in enumerate((x_axes, w_axes, out)))
    return x, w / 16, dy


def grouped_operands(dtype=jnp.float32, rows=ROWS):
    return normal((rows, IN), 0, dtype), normal((GROUPS, IN, OUT), 1, dtype) / 16, normal((rows, OUT), 2, dtype)


def expected_products(spec, x, w, dy):
    x_axes, w_axes, _ = re.split(",|->", spec)
    width = int(np.prod([x.shape[x_axes.index(a)] for a in w_axes if a in x_axes]))
    flat = [
        np.asarray(a).astype(np.float64) for a in (x.reshape(-1, width), w.reshape(width, -1), dy.reshape(x.size // width, -1))
    ]
    return [a.reshape(b.shape) for a, b in zip(products_reference(*flat), (dy, x, w), strict=True)]


def products(f, x, w, dy, **operand):
    """y, dx and dw of f(x, w), compiled."""

    def run(x, w, dy):
        y, back = jax.vjp(lambda x, w: f(x, Fp8Operand(w, **operand)), x, w)
        return y, *back(dy)

    return jax.jit(run)(x, w, dy)


def distance(a, b):
    """Relative Frobenius distance."""
    a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300)
