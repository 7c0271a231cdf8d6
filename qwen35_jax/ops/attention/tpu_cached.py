"""Attention from new tokens to a cache of keys and values, for TPU: scores never leave the chip, and only blocks of keys that
a token of the block sees are read (FlashAttention, arXiv 2205.14135).

The grid is (row, key head, block of queries, block of keys). A block of queries holds all query heads of its key head: their
rows are [R, t], so that a row's token is its index modulo t, a power of two. Which slot a row has and how far its tokens see are
known before the grid starts; beyond that the index of the block of keys stands still, and nothing is moved.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen35_jax.ops.attention.tiles import Tile, end, seen, tokens_of_block

LANES = 128
ROWS = 1024  # rows of a block of queries, at most
KEYS, KEYS_OF_A_TOKEN = 1024, 2048  # of a block: fewer where its scores are many
SPARE_VMEM = 4 * 2**20


def supports(width: int) -> bool:
    """Whether heads of this width can be run."""
    return width % LANES == 0


def attend(q, cache_k, cache_v, slots, base, count, cut=None, *, partial: bool = False):
    """Softmax over the cached keys that each token sees.

    Args:
      q: [B, T, N, H], in the cache's dtype. cache_k, cache_v: [S, K, Tc, H]. slots, base, count: int32 [B].
      cut: whole numbers (offset, limit), by default (0, T): token t < count sees the keys of its slot before
        base + clip(t + 1 - offset, 0, limit). With the defaults base is the slot's length before these tokens.
      partial: the result is one part of a softmax over several caches.

    Returns:
      [B, T, N, H] in q.dtype, zeros where nothing is seen; with `partial` in float32, and the logarithms of the softmax's sums
      [B, T, N], -inf where nothing is seen. From `count` on both mean nothing.
    """
    batch, time, heads, width = q.shape
    groups, places = cache_k.shape[1:3]
    tile = _tile(heads // groups, time, places)
    slots = jnp.arange(batch, dtype=jnp.int32) if slots is None else slots
    cut = jnp.stack([jnp.asarray(x, jnp.int32) for x in ((0, time) if cut is None else cut)])
    queries = tile.cut(q, groups)
    blocks = queries.shape[2]
    keys = pl.BlockSpec((None, None, tile.keys, width), functools.partial(_key_block, tile))
    rows = pl.BlockSpec((None, None, None, tile.rows, width), lambda b, h, i, j, *_: (b, h, i, 0, 0))
    outputs, shapes = [rows], [jax.ShapeDtypeStruct(queries.shape, jnp.float32 if partial else q.dtype)]
    if partial:
        outputs.append(pl.BlockSpec((None, None, None, 1, tile.rows), lambda b, h, i, j, *_: (b, h, i, 0, 0)))
        shapes.append(jax.ShapeDtypeStruct((batch, groups, blocks, 1, tile.rows), jnp.float32))
    # Where they are: else XLA moves a whole cache into VMEM where it fits.
    caches = [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in (cache_k, cache_v)]
    column = pltpu.VMEM((tile.rows, LANES), jnp.float32)
    out, *log_sum = pl.pallas_call(
        functools.partial(_kernel, tile, width**-0.5 * math.log2(math.e)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(batch, groups, blocks, -(-places // tile.keys)),
            in_specs=[rows, keys, keys],
            out_specs=outputs,
            scratch_shapes=[column, column, pltpu.VMEM((tile.rows, width), jnp.float32)],
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_vmem_bytes(tile, width, cache_k.dtype.itemsize),
        ),
        name="cached_attention",
    )(slots, base, count, cut, queries, *caches)
    out = tile.joined(out, time)
    return (out, tile.joined(jnp.swapaxes(log_sum[0], 3, 4), time)[..., 0]) if partial else out


def _tile(ratio: int, time: int, places: int) -> Tile:
    return Tile(ratio, tokens_of_block(ratio, time, ROWS), min(places, KEYS if time > 1 else KEYS_OF_A_TOKEN), places)


def _key_block(tile: Tile, b, h, i, j, slots, base, count, cut):
    last = (jnp.maximum(seen(tile, base, count, cut, b, i), 1) - 1) // tile.keys
    return slots[b], h, jnp.minimum(j, last), 0


def _kernel(tile: Tile, scale: float, slots, base, count, cut, q, k, v, out, *refs):
    """Scores are times scale, which turns the softmax's exponentials into powers of two.

    Blocks q, out [rows, H]; k, v [keys, H]; log_sum [1, rows], if wanted; of the softmax so far peak and total [rows, LANES],
    the same number in each lane, and the weighted sum of values [rows, H]."""
    *log_sum, peak, total, summed = refs
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    live = i * tile.tokens < count[b]

    @pl.when(j == 0)
    def _():
        peak[...] = jnp.full_like(peak, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        summed[...] = jnp.zeros_like(summed)

    @pl.when(live & (j * tile.keys < seen(tile, base, count, cut, b, i)))
    def _():
        scores = _product(q[...], k[...], ((1,), (1,))) * scale
        row = jax.lax.broadcasted_iota(jnp.int32, (tile.rows, 1), 0)
        index = j * tile.keys + jax.lax.broadcasted_iota(jnp.int32, (1, tile.keys), 1)
        ends = end(base[b], cut, i * tile.tokens + jax.lax.bitwise_and(row, tile.tokens - 1))
        scores = jnp.where(index < ends, scores, -jnp.inf)
        highest = jnp.maximum(peak[...], jnp.max(scores, axis=1, keepdims=True))
        level = jnp.where(highest == -jnp.inf, 0, highest)  # of a row that has seen nothing yet
        shrink = jnp.exp2(peak[...] - level)
        weights = jnp.exp2(scores - level[:, :1])
        values = v[...]
        if tile.places % tile.keys:  # beyond the cache's end may be anything
            place = j * tile.keys + jax.lax.broadcasted_iota(jnp.int32, (tile.keys, 1), 0)
            values = jnp.where(place < tile.places, values, jnp.zeros_like(values))
        total[...] = total[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        summed[...] = summed[...] * shrink[:, :1] + _product(weights.astype(values.dtype), values, ((1,), (0,)))
        peak[...] = highest

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        sums = total[...]
        out[...] = (summed[...] / jnp.where(sums == 0, 1, sums)[:, :1]).astype(out.dtype)
        if log_sum:
            log_sum[0][...] = ((peak[...] + jnp.log2(sums)) * math.log(2)).T[:1]


def _product(x, y, contracted):
    precision = jax.lax.Precision.HIGHEST if y.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, y, (contracted, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _vmem_bytes(tile: Tile, width: int, itemsize: int) -> int:
    """Two buffers of each block that moves, what is kept of the softmax, and a few copies of a block of scores."""
    moved = 2 * (2 * tile.keys * itemsize + tile.rows * (itemsize + 4)) * width
    kept = tile.rows * (2 * LANES + width) * 4
    return moved + kept + 4 * tile.rows * max(tile.keys, LANES) * 4 + SPARE_VMEM
