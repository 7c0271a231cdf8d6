"""Pallas kernels (Mosaic TPU) of the gated delta rule: one grid step is one chunk of a few value heads.

The mathematics is that of `xla.py`, in units in which keys and queries are never rounded: with r = 1 / |k| per token,
u = r U and k as it came,

    L_ij = w_i D_ij k_i.k_j for j < i, w = r^2 beta;  (I + L) u = r beta v - w a (k S)
    o = s (a (q S) + (D * q k^T) u), s = Hk^-0.5 / |q|;  S' = c S + k^T (b u)

Rounding is relative, so these units cost no accuracy, and q and k go into the matrix unit as they are in memory. The
operands of a product are rounded to the dtype of q, k, v; sums, decays and the state are float32. A document starts with
a decay of exp(FLOOR) = 0, which resets the state and cuts every span across the boundary.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

CHUNK = 128  # tokens of a grid step: the lanes of a vector register, and the side of a matrix unit
GRAIN = 64.0  # as in xla.py: decays are summed as multiples of 1 / GRAIN, which float32 adds exactly, plus the rest


@dataclasses.dataclass(frozen=True)
class Tile:
    """What one grid step works on: `keys` key heads of width `key_width`, each with `group` value heads of `value_width`."""

    keys: int
    group: int
    key_width: int
    value_width: int
    normalize: bool

    @property
    def heads(self) -> int:
        return self.keys * self.group

    def group_of(self, j: int) -> range:
        """The value heads that read key head j."""
        return range(j * self.group, (j + 1) * self.group)

    def key(self, j: int) -> slice:
        """Lanes of key head j in a block [C, keys * Hk]."""
        return slice(j * self.key_width, (j + 1) * self.key_width)

    def value(self, n: int) -> slice:
        """Lanes of value head n in a block [C, heads * Hv]."""
        return slice(n * self.value_width, (n + 1) * self.value_width)


def dot(x: jax.Array, y: jax.Array, contract: str = "ij,jk") -> jax.Array:
    """Product of two matrices of one dtype in float32; float32 operands in full precision."""
    left, right = contract.split(",")
    shared = (set(left) & set(right)).pop()
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((left.index(shared),), (right.index(shared),)), ((), ()))
    return lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def index(axis: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis)


def strictly_lower(x: jax.Array) -> jax.Array:
    return jnp.where(index(0) > index(1), x, 0)


def _inverse_length(x: jax.Array) -> jax.Array:
    """x [C, H] -> 1 / |x| [C, 1] fp32; 1e-6 under the root as in `xla.unit_length`."""
    x = x.astype(jnp.float32)
    return lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


class Decays:
    """Decays of a chunk: g [heads, C] -> those between tokens, from the chunk's start, to its end, and across it."""

    def __init__(self, g: jax.Array, beta: jax.Array):
        heads = g.shape[0]
        coarse = jnp.floor(g * GRAIN + 0.5) / GRAIN
        until = (index(0) <= index(1)).astype(jnp.float32)
        sums = dot(jnp.concatenate([coarse, g - coarse]), until)
        last = sums[:, -1:]
        self.heads, self.sums = heads, sums
        before = jnp.exp(sums[:heads] + sums[heads:])
        to_end = last - sums
        after = jnp.exp(to_end[:heads] + to_end[heads:])
        self.across = before[:, -1:]
        self.columns = jnp.concatenate([sums, before, after, beta]).T

    def _column(self, row: int, n: int) -> jax.Array:
        at = row * self.heads + n
        return self.columns[:, at : at + 1]

    def before(self, n: int) -> jax.Array:
        return self._column(2, n)

    def after(self, n: int) -> jax.Array:
        return self._column(3, n)

    def beta(self, n: int) -> jax.Array:
        return self._column(4, n)

    def between(self, n: int) -> jax.Array:
        """D [C, C] of head n. Masked before exp: the exponents of spans that run backwards are large."""
        heads = self.heads
        coarse = self._column(0, n) - self.sums[n : n + 1]
        rest = self._column(1, n) - self.sums[heads + n : heads + n + 1]
        return jnp.exp(jnp.where(index(0) >= index(1), coarse + rest, -jnp.inf))


def invert(lower_ref, inverse_ref, heads: int) -> None:
    """(I + L)^-1 of lower_ref [heads, C, C], block by block as in `inverse.py`, to inverse_ref in its dtype."""
    dtype = inverse_ref.dtype
    row, column = index(0), index(1)
    eye = (row == column).astype(jnp.float32)
    for n in range(heads):
        joins = (row // 2 == column // 2) & (row > column)
        inverse_ref[n] = (eye - jnp.where(joins, lower_ref[n], 0)).astype(dtype)
    width = 2
    while width < CHUNK:
        joins = (row // width == column // width + 1) & (row // width % 2 == 1)
        for n in range(heads):
            x = inverse_ref[n]
            join = jnp.where(joins, lower_ref[n], 0).astype(dtype)
            corner = dot(dot(x, join).astype(dtype), x)
            inverse_ref[n] = (x.astype(jnp.float32) - corner).astype(dtype)
        width *= 2


def solve(lower: jax.Array, inverse: jax.Array, right: jax.Array, transposed: bool = False) -> jax.Array:
    """(I + L)^-1 right, or its transpose's, fp32 [C, V]; an inverse in bfloat16 is refined once, with L in two parts."""
    dtype, contract = inverse.dtype, "ji,jk" if transposed else "ij,jk"
    first = dot(inverse, right.astype(dtype), contract)
    if dtype == jnp.float32:
        return first
    first = first.astype(dtype)
    high = lower.astype(dtype)
    low = (lower - high.astype(jnp.float32)).astype(dtype)
    both = dot(jnp.concatenate([high, low], axis=int(transposed)), first, contract)
    first = first.astype(jnp.float32)
    residual = right - first - (both[:CHUNK] + both[CHUNK:])
    return first + dot(inverse, residual.astype(dtype), contract)


class Tokens:
    """The tokens of one key head in a chunk: q, k [C, Hk] as they came, and 1 / |k|, 1 / |q| [C, 1]."""

    def __init__(self, tile: Tile, q_ref, k_ref, j: int):
        self.q, self.k = q_ref[:, tile.key(j)], k_ref[:, tile.key(j)]
        self.both = jnp.concatenate([self.k, self.q])
        one = jnp.ones((CHUNK, 1), jnp.float32)
        self.length = _inverse_length(self.k) if tile.normalize else one
        self.query_length = _inverse_length(self.q) if tile.normalize else one
        self.scale = tile.key_width**-0.5 * self.query_length


def forward_kernel(tile: Tile, *refs):
    """One chunk; grid (batch, head block, chunk), the state carried from chunk to chunk in VMEM.

    Blocks: q, k [C, keys * Hk]; v, out [C, heads * Hv]; g, beta [heads, C] fp32; first and final state [heads, Hk, Hv]
    fp32. Saved for the gradient where asked for, in the dtype of v: the state before the chunk [heads, Hk, Hv], the
    inverse [heads, C, C] and u [C, heads * Hv].
    """
    q_ref, k_ref, v_ref, g_ref, beta_ref, first_ref, out_ref, final_ref, *saved, state_ref, lower_ref, mixing_ref = refs
    inverse_ref = saved[1] if len(saved) == 3 else saved.pop()
    dtype = v_ref.dtype

    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = first_ref[...]

    decays = Decays(g_ref[...], beta_ref[...])
    tokens = [Tokens(tile, q_ref, k_ref, j) for j in range(tile.keys)]
    for j, t in enumerate(tokens):
        scores = dot(t.both, t.k, "ij,kj")
        for n in tile.group_of(j):
            between = decays.between(n)
            mixing_ref[n] = (between * scores[CHUNK:]).astype(dtype)
            lower_ref[n] = strictly_lower(between * scores[:CHUNK] * (decays.beta(n) * t.length * t.length))
    invert(lower_ref, inverse_ref, tile.heads)
    for j, t in enumerate(tokens):
        for n in tile.group_of(j):
            before, state, v = decays.before(n), state_ref[n], v_ref[:, tile.value(n)].astype(jnp.float32)
            read = dot(t.both, state.astype(dtype))
            right = (decays.beta(n) * t.length) * (v - (before * t.length) * read[:CHUNK])
            update = solve(lower_ref[n], inverse_ref[n], right)
            out = before * read[CHUNK:] + dot(mixing_ref[n], update.astype(dtype))
            out_ref[:, tile.value(n)] = (t.scale * out).astype(dtype)
            written = (decays.after(n) * update).astype(dtype)
            state_ref[n] = decays.across[n : n + 1] * state + dot(t.k, written, "ji,jk")
            if saved:
                saved[0][n] = state.astype(dtype)
                saved[2][:, tile.value(n)] = update.astype(dtype)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        final_ref[...] = state_ref[...]
