"""Pallas kernels (Mosaic TPU) of the gated delta rule: one grid step is one chunk of a few value heads.

The mathematics is that of `xla.py`, in units in which keys and queries are never rounded: with r = 1 / |k| per token,
w = beta r, and the error of the prediction u_i = v_i - S^T k_i / |k_i| in place of beta u,

    L_ij = r_i D_ij k_i.k_j w_j for j < i;  (I + L) u = v - r a (k S)
    o = s (a (q S) + P u), P_ij = D_ij q_i.k_j w_j, s = Hk^-0.5 / |q|;  S' = c S + (b w k)^T u

Rounding is relative, so these units cost no accuracy, and q and k go into the matrix unit as they are in memory. Scalars
of the earlier token (j) scale columns, which costs nothing on TPU; scalars of the later one (i) scale rows, which moves
data across lanes. The operands of a product are rounded to the dtype of q, k, v; sums, decays and the state are float32.
A document starts with a decay of exp(FLOOR) = 0, which resets the state and cuts every span across the boundary.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

CHUNK = 128  # tokens of a grid step: the lanes of a vector register, and the side of a matrix unit
SUBLANES = 16  # rows of a register in bfloat16
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

    def __init__(self, g: jax.Array):
        heads = g.shape[0]
        coarse = jnp.floor(g * GRAIN + 0.5) / GRAIN
        until = (index(0) <= index(1)).astype(jnp.float32)
        sums = dot(jnp.concatenate([coarse, g - coarse]), until)
        to_end = sums[:, -1:] - sums
        self.after = jnp.exp(to_end[:heads] + to_end[heads:])  # [heads, C]
        self.across = jnp.exp(sums[:heads, -1:] + sums[heads:, -1:])  # [heads, 1]
        self._heads, self._rows, self._columns = heads, sums, sums.T

    def _column(self, at: int) -> jax.Array:
        return jnp.broadcast_to(self._columns[:, at : at + 1], (CHUNK, CHUNK))

    def of(self, n: int) -> tuple[jax.Array, jax.Array]:
        """Head n's decay from the chunk's start to each token, [C, 1], and between tokens, D [C, C].

        D is masked before exp: the exponents of spans that run backwards are large.
        """
        rest = self._heads + n
        coarse_sum, rest_sum = self._column(n), self._column(rest)
        between = (coarse_sum - self._rows[n : n + 1]) + (rest_sum - self._rows[rest : rest + 1])
        before = jnp.exp(coarse_sum + rest_sum)
        return before[:, :1], jnp.exp(jnp.where(index(0) >= index(1), between, -jnp.inf))


class Tokens:
    """The tokens of one key head in a chunk: q, k [C, Hk] as they came, 1 / |k| and Hk^-0.5 / |q|."""

    def __init__(self, tile: Tile, q_ref, k_ref, j: int):
        self.q, self.k = q_ref[:, tile.key(j)], k_ref[:, tile.key(j)]
        self.both = jnp.concatenate([self.k, self.q])
        one = jnp.ones((CHUNK, 1), jnp.float32)
        self.length = _inverse_length(self.k) if tile.normalize else one  # [C, 1]
        self.query_length = _inverse_length(self.q) if tile.normalize else one
        self.scale = tile.key_width**-0.5 * self.query_length
        self.length_row = jnp.sum(jnp.where(index(0) == index(1), self.length, 0), axis=0, keepdims=True)  # [1, C]


def invert(lower_ref, inverse_ref, heads: int) -> None:
    """(I + L)^-1 of lower_ref [heads, C, C], block by block as in `inverse.py`, to inverse_ref in its dtype.

    X S X has only the rows of the second block of each pair: once blocks are whole registers, only those are multiplied.
    """
    dtype = inverse_ref.dtype
    row, column = index(0), index(1)
    eye = (row == column).astype(jnp.float32)
    for n in range(heads):
        joins = (row // 2 == column // 2) & (row > column)
        inverse_ref[n] = (eye - jnp.where(joins, lower_ref[n], 0)).astype(dtype)
    width = 2
    while width < CHUNK:
        joins = (row // width == column // width + 1) & (row // width % 2 == 1)
        blocks = [slice(0, CHUNK)] if width < SUBLANES else [slice(i, i + width) for i in range(width, CHUNK, 2 * width)]
        for n in range(heads):
            join = jnp.where(joins, lower_ref[n], 0).astype(dtype)
            rows = jnp.concatenate([inverse_ref[n, block] for block in blocks])
            corner = dot(dot(rows, join).astype(dtype), inverse_ref[n])
            rows = (rows.astype(jnp.float32) - corner).astype(dtype)
            for i, block in enumerate(blocks):
                size = block.stop - block.start
                inverse_ref[n, block] = rows[i * size : (i + 1) * size]
        width *= 2


def solve(lower_ref, inverse_ref, rights: list[jax.Array], transposed: bool = False) -> list[jax.Array]:
    """(I + L)^-1 right of each head, or its transpose's, fp32 [C, V]; an inverse in bfloat16 is refined once.

    The residual is exact to 2^-17: the first solution is rounded, and L is taken in two parts of bfloat16.
    """
    dtype, contract = inverse_ref.dtype, "ji,jk" if transposed else "ij,jk"
    firsts = [dot(inverse_ref[n], right.astype(dtype), contract) for n, right in enumerate(rights)]
    if dtype == jnp.float32:
        return firsts
    firsts = [first.astype(dtype) for first in firsts]
    residuals = []
    for n, (right, first) in enumerate(zip(rights, firsts, strict=True)):
        high = lower_ref[n].astype(dtype)
        low = (lower_ref[n] - high.astype(jnp.float32)).astype(dtype)
        both = dot(jnp.concatenate([high, low], axis=int(transposed)), first, contract)
        residuals.append((right - first.astype(jnp.float32) - (both[:CHUNK] + both[CHUNK:])).astype(dtype))
    corrections = [dot(inverse_ref[n], residual, contract) for n, residual in enumerate(residuals)]
    return [first.astype(jnp.float32) + x for first, x in zip(firsts, corrections, strict=True)]


def forward_kernel(tile: Tile, *refs):
    """One chunk; grid (batch, head block, chunk), the state carried from chunk to chunk in VMEM.

    Blocks: q, k [C, keys * Hk]; v, out [C, heads * Hv]; g, beta [heads, C] fp32; first and final state [heads, Hk, Hv]
    fp32. Saved for the gradient where asked for, in the dtype of v: the state before the chunk [heads, Hk, Hv], the
    inverse [heads, C, C] and u [C, heads * Hv]. Each step is taken for all heads in turn, so that one hides the latency
    of another.
    """
    q_ref, k_ref, v_ref, g_ref, beta_ref, first_ref, out_ref, final_ref, *saved, state_ref, lower_ref, mixing_ref = refs
    inverse_ref = saved[1] if len(saved) == 3 else saved.pop()
    dtype, heads = v_ref.dtype, range(tile.heads)

    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = first_ref[...]

    decays = Decays(g_ref[...])
    tokens = [Tokens(tile, q_ref, k_ref, j) for j in range(tile.keys)]
    before, weight = {}, {}
    for j, t in enumerate(tokens):
        scores = dot(t.both, t.k, "ij,kj")
        kk = scores[:CHUNK] * t.length
        for n in tile.group_of(j):
            before[n], between = decays.of(n)
            weight[n] = beta_ref[n : n + 1] * t.length_row
            between *= weight[n]
            mixing_ref[n] = (between * scores[CHUNK:]).astype(dtype)
            lower_ref[n] = strictly_lower(between * kk)
    invert(lower_ref, inverse_ref, tile.heads)
    owner = [tokens[n // tile.group] for n in heads]
    if saved:
        saved[0][...] = state_ref[...].astype(dtype)
    reads = [dot(owner[n].both, state_ref[n].astype(dtype)) for n in heads]
    rights = [v_ref[:, tile.value(n)] - owner[n].length * (before[n] * reads[n][:CHUNK]) for n in heads]
    updates = [u.astype(dtype) for u in solve(lower_ref, inverse_ref, rights)]
    for n in heads:
        out = before[n] * reads[n][CHUNK:] + dot(mixing_ref[n], updates[n])
        out_ref[:, tile.value(n)] = (owner[n].scale * out).astype(dtype)
    for n in heads:
        written = (owner[n].k.T * (decays.after[n : n + 1] * weight[n])).astype(dtype)
        state_ref[n] = decays.across[n : n + 1] * state_ref[n] + dot(written, updates[n])
    if saved:
        for n in heads:
            saved[2][:, tile.value(n)] = updates[n]

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        final_ref[...] = state_ref[...]
