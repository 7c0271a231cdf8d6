"""Attention from new tokens to a cache of keys and values, for Hopper (Mosaic GPU): scores stay in registers, and only blocks of
keys that a token of the block sees are read (FlashAttention-3, arXiv 2407.08608; split over keys as in Flash-Decoding).

A thread block takes one block of queries, all heads of one key head for a few tokens, and one part of the keys that they see:
where there are fewer blocks of queries than multiprocessors, several share the keys, and their softmaxes are added up after.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen35_jax.compat import HAS_MOSAIC_GPU, store_anyhow
from qwen35_jax.errors import UserError
from qwen35_jax.ops.attention.tiles import Tile, end, seen, tokens_of_block
from qwen35_jax.ops.hopper import matrices, ring

ROWS = 64  # of queries of a warpgroup: those of its matrix instruction
WARPGROUPS = 2  # of a thread block, at most
KEYS = 64  # of a block; the sum of weighted values leaves registers for no more
LEAST_BLOCKS = 8  # of keys that are worth a thread block of their own: it writes as much as it reads of one
WIDTHS = (128, 256)


def supports(width: int, heads: int, groups: int, dtype: str) -> bool:
    """Whether `heads` query heads of this width on `groups` key heads can be run."""
    return width in WIDTHS and heads // groups <= ROWS * WARPGROUPS and dtype == "bfloat16"


def attend(q, cache_k, cache_v, slots, base, count, cut=None, *, partial: bool = False):
    """See `tpu_cached.attend`. The cache must be bfloat16."""
    if not HAS_MOSAIC_GPU:
        raise UserError(f"cached_attention: pallas_gpu needs jax 0.11 or newer, this is {jax.__version__}; use xla")
    batch, time, heads, width = q.shape
    groups = cache_k.shape[1]
    if not supports(width, heads, groups, cache_k.dtype.name):
        have = f"{width}, {heads // groups} and {cache_k.dtype}"
        raise UserError(
            f"cached_attention: pallas_gpu needs H of {WIDTHS}, at most {ROWS * WARPGROUPS} query heads a key head and caches in "
            f"bfloat16, not {have}; use xla"
        )
    cache_k, cache_v = (_whole(x) for x in (cache_k, cache_v))
    tile = Tile(heads // groups, tokens_of_block(heads // groups, time, ROWS * WARPGROUPS), KEYS, cache_k.shape[2])
    slots = jnp.arange(batch, dtype=jnp.int32) if slots is None else slots
    cut = jnp.stack([jnp.asarray(x, jnp.int32) for x in ((0, time) if cut is None else cut)])
    queries = tile.cut(q, groups)
    queries = jnp.pad(queries, ((0, 0),) * 3 + ((0, -tile.rows % ROWS), (0, 0)))
    blocks = batch * groups * queries.shape[2]
    parts = max(1, min(ring.SMS // blocks, -(-tile.places // (KEYS * LEAST_BLOCKS))))
    if not partial and parts == 1:
        (out,) = _launch(tile, None, q.dtype, slots, base, count, cut, queries, cache_k, cache_v)
        return tile.joined(out[:, :, :, : tile.rows], time)
    out, log_sum = _added(*_launch(tile, parts, jnp.float32, slots, base, count, cut, queries, cache_k, cache_v))
    out, log_sum = (tile.joined(x[:, :, :, : tile.rows], time) for x in (out, log_sum[..., None]))
    return (out, log_sum[..., 0]) if partial else out.astype(q.dtype)


def _whole(cache):
    """Copies bring whole tiles of 8 rows; of a cache shorter than a block there are no blocks."""
    places = cache.shape[2]
    wanted = max(KEYS, -(-places // 8) * 8)
    return jnp.pad(cache, ((0, 0), (0, 0), (0, wanted - places), (0, 0))) if wanted > places else cache


def _launch(tile: Tile, parts: int | None, dtype, *operands):
    """[B, K, blocks, rows, H] in `dtype`; with `parts` one of each [parts, ...], and the logarithms of their softmaxes' sums."""
    queries = operands[4]
    batch, groups, blocks, rows, width = queries.shape
    warpgroups, lead = rows // ROWS, () if parts is None else (parts,)
    outputs = [jax.ShapeDtypeStruct((*lead, *queries.shape), dtype)]
    if parts is not None:
        outputs.append(jax.ShapeDtypeStruct((parts, *queries.shape[:-1]), jnp.float32))
    size = KEYS * width * 2
    stages = ring.stages(2 * size, rows * width * 2)
    ins = [ring.buffers(stages, (KEYS, width), jnp.bfloat16) for _ in "kv"]
    buffers = [ring.buffers(warpgroups, (ROWS, width), jnp.bfloat16), *ins]
    arrived = [plgpu.Barrier(num_arrivals=1, num_barriers=n) for n in (warpgroups, stages, stages)]
    return plgpu.kernel(
        functools.partial(_kernel, tile, width**-0.5 * math.log2(math.e)),
        out_type=outputs,
        scratch_types=[
            buffers,
            [*arrived, plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages)],
        ],
        grid=(parts or 1, blocks, groups, batch),
        grid_names=("part", "queries", "head", "row"),
        num_threads=warpgroups,
        thread_name="warpgroup",
        kernel_name="cached_attention",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(*operands)


def _added(out, log_sum):
    """One softmax of its parts [parts, ...], and the logarithm of its sum, -inf where nothing is seen."""
    peak = jnp.max(log_sum, axis=0)
    weight = jnp.exp(log_sum - jnp.where(peak == -jnp.inf, 0, peak))
    total = jnp.sum(weight, axis=0)
    out = jnp.sum(out * weight[..., None], axis=0) / jnp.where(total == 0, 1, total)[..., None]
    return out, peak + jnp.log(total)


def _kernel(tile: Tile, scale: float, slots, base, count, cut, q, k, v, out, *refs):
    """Scores are times scale, which turns the softmax's exponentials into powers of two.

    In memory: q [B, K, blocks, rows, H], k, v [S, K, Tc, H]; out and log_sums as `_launch` has them.
    """
    *log_sums, (q_smem, k_smem, v_smem), (q_loaded, k_loaded, v_loaded, free) = refs
    part, b, h, warpgroup = (lax.axis_index(name) for name in ("part", "row", "head", "warpgroup"))
    i = lax.axis_size("queries") - 1 - lax.axis_index("queries")  # the longest ones first
    blocks = jnp.where(i * tile.tokens < count[b], lax.div(seen(tile, base, count, cut, b, i) + KEYS - 1, KEYS), 0)
    share = lax.div(blocks + lax.axis_size("part") - 1, lax.axis_size("part"))
    first = part * share
    steps, stages, slot = jnp.clip(blocks - first, 0, share), free.shape[0], slots[b]

    def load(step):
        stage, keys = lax.rem(step, stages), pl.ds((first + step) * KEYS, KEYS)
        plgpu.copy_gmem_to_smem(k.at[slot, h, keys], k_smem.at[stage], k_loaded.at[stage])
        plgpu.copy_gmem_to_smem(v.at[slot, h, keys], v_smem.at[stage], v_loaded.at[stage])

    rows = pl.ds(warpgroup * ROWS, ROWS)
    queries = q_smem.at[warpgroup]
    plgpu.copy_gmem_to_smem(q.at[b, h, i, rows], queries, q_loaded.at[warpgroup])

    @pl.when(warpgroup == 0)
    def _():
        for step in range(stages - 1):
            pl.when(step < steps)(functools.partial(load, jnp.int32(step)))

    plgpu.barrier_wait(q_loaded.at[warpgroup])
    row = warpgroup * ROWS + plgpu.broadcasted_iota(jnp.int32, (ROWS, KEYS), 0, layout=plgpu.Layout.WGMMA)
    ends = end(base[b], cut, i * tile.tokens + (row & (tile.tokens - 1)))

    def take(step, carry):
        summed, peak, total = carry
        stage, ahead = lax.rem(step, stages), step + stages - 1

        @pl.when((warpgroup == 0) & (ahead < steps))
        def _():
            pl.when(step > 0)(lambda: plgpu.barrier_wait(free.at[lax.rem(ahead, stages)]))
            load(ahead)

        plgpu.barrier_wait(k_loaded.at[stage])
        scores = matrices.product((queries, matrices.turned(k_smem.at[stage]))) * scale
        index = (first + step) * KEYS + plgpu.broadcasted_iota(jnp.int32, (ROWS, KEYS), 1, layout=plgpu.Layout.WGMMA)
        scores = jnp.where(index < ends, scores, -jnp.inf)
        highest = jnp.maximum(peak, jnp.max(scores, axis=1))
        level = jnp.where(highest == -jnp.inf, 0.0, highest)  # of a row that has seen nothing yet
        shrink = jnp.exp2(peak - level)
        weights = jnp.exp2(scores - _over(level, KEYS))
        total = total * shrink + jnp.sum(weights, axis=1)
        summed = summed * _over(shrink, summed.shape[1])
        plgpu.barrier_wait(v_loaded.at[stage])
        (summed,) = matrices.products([(weights.astype(jnp.bfloat16), v_smem.at[stage])], totals=[summed])
        plgpu.commit_smem()  # copies may overwrite what was read here only after a fence
        plgpu.barrier_arrive(free.at[stage])
        return summed, highest, total

    column = plgpu.Layout.WGMMA.reduce(1)
    zeros = plgpu.layout_cast(jnp.zeros((ROWS, q.shape[-1]), jnp.float32), plgpu.Layout.WGMMA)
    peak, total = (plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), column) for x in (-jnp.inf, 0.0))
    summed, peak, total = lax.fori_loop(0, steps, take, (zeros, peak, total))
    mean = summed * _over(1 / jnp.where(total == 0, 1.0, total), summed.shape[1])
    if log_sums:
        store_anyhow(out.at[part, b, h, i, rows], mean)
        store_anyhow(log_sums[0].at[part, b, h, i, rows], peak * math.log(2) + jnp.log(total))
    else:
        queries[...] = mean.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(queries, out.at[b, h, i, rows])
        plgpu.wait_smem_to_gmem(0)


def _over(x: jax.Array, columns: int) -> jax.Array:
    return lax.broadcast_in_dim(x, (x.shape[0], columns), (0,))
