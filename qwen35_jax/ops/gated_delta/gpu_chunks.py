"""What each chunk of the gated delta rule needs before the state comes by, as a Pallas kernel for Hopper (Mosaic GPU).

In the units of `tpu_kernels.py`: r = 1 / |k|, w = beta r, s = Hk^-0.5 / |q|, D the decay between two tokens, and

    L_ij = r_i D_ij k_i.k_j w_j for j < i;  P_ij = s_i D_ij q_i.k_j w_j for j <= i

One warpgroup takes one chunk of one value head. Three make a block: so the assembler gives each no more registers than three of
them leave, where without a limit it takes more than it needs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CHUNK = 64  # tokens of a chunk: the rows of a warpgroup's matrix instruction
WIDTH = 128  # of a key and of a value head
PARTS = 3  # warpgroups of a block
INVERSE, INVERSE_REST, MIXING, SQUARES = range(4)  # those of a chunk and value head, one above the other
READ, OUT, WRITE, ACROSS = range(4)  # its scalars: r a, s a, b w of each token, and c
# Rows of the gates: running sums of log decay in two parts; beta; decay from the chunk's start, to its end, and over all of it
COARSE, REST, BETA, BEFORE, AFTER, TOTAL = range(6)

f32, bf16 = jnp.float32, jnp.bfloat16


def tiled(*shape: int):
    """Shared memory in bfloat16 as the matrix instructions read it: rows of 64 numbers, swizzled."""
    return plgpu.SMEM(shape, bf16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def products(*sums) -> list[jax.Array]:
    """For each sum, a sequence of pairs, the sum of x @ y over its pairs, in float32; all are begun before one is awaited.

    x lies in registers or shared memory, y in shared memory.
    """

    def multiply(*accumulators):
        for acc, pairs in zip(accumulators, sums, strict=True):
            for x, y in pairs:
                plgpu.wgmma(acc, x, y)
        return [acc[...] for acc in accumulators]

    return pl.run_scoped(multiply, *(plgpu.ACC((s[0][0].shape[0], s[0][1].shape[1]), f32) for s in sums))


def product(*pairs) -> jax.Array:
    """The sum of x @ y over pairs."""
    return products(pairs)[0]


def turned(ref):
    """A matrix in shared memory, transposed."""
    return ref.transpose((1, 0))


def on_rows(ref) -> jax.Array:
    """One number per row of a [64, n] matrix in registers."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1))


def on_columns(ref) -> jax.Array:
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0))


def per_row(x: jax.Array, columns: int = CHUNK) -> jax.Array:
    return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def per_column(x: jax.Array, rows: int = CHUNK) -> jax.Array:
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])


def index(axis: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis, layout=plgpu.Layout.WGMMA)


def strictly_lower(x: jax.Array) -> jax.Array:
    return jnp.where(index(0) > index(1), x, 0.0)


def inverse_length(ref, normalize: bool) -> jax.Array:
    """1 / |x| of each row of ref [C, H], fp32; 1 where lengths do not count. 1e-6 under the root as in `xla.unit_length`."""
    x = plgpu.load(ref, layout=plgpu.Layout.WGMMA).astype(f32)
    squares = jnp.sum(x * x, axis=1)
    return lax.rsqrt(squares + 1e-6) if normalize else jnp.where(squares >= 0, 1.0, squares)


def decay_between(gates) -> jax.Array:
    """D [C, C], masked before exp: the exponents of spans that run backwards are large."""
    coarse = per_row(on_rows(gates.at[COARSE])) - per_column(on_columns(gates.at[COARSE]))
    rest = per_row(on_rows(gates.at[REST])) - per_column(on_columns(gates.at[REST]))
    return jnp.exp(jnp.where(index(0) >= index(1), coarse + rest, -jnp.inf))


def invert(lower: jax.Array, high_smem, low_smem, inverse_smem, rest_smem, join_smem) -> None:
    """(I + L)^-1 in two parts of bfloat16, block by block as in `inverse.py`; operands in bfloat16, sums in float32.

    Keys that repeat leave errors of 1e-2 in that, so it is refined once: X + (I - X (I + L)) X, with L in two parts of bfloat16,
    which makes the residual exact to 2^-17.
    """
    high = lower.astype(bf16)
    high_smem[...] = high
    low_smem[...] = (lower - high.astype(f32)).astype(bf16)
    apart = jnp.bitwise_xor(index(0), index(1))  # its highest bit is the size of the largest blocks that part the two
    inverse = jnp.where(apart == 0, 1.0, jnp.where(apart == 1, -lower, 0.0))
    width = 2
    while width < CHUNK:
        # From shared memory again: kept in registers it would not leave enough of them.
        join = plgpu.load(high_smem, layout=plgpu.Layout.WGMMA)
        join_smem[...] = jnp.where((apart >= width) & (apart < 2 * width), join, jnp.bfloat16(0))
        inverse_smem[...] = inverse.astype(bf16)
        plgpu.commit_smem()
        half = product((inverse_smem, join_smem)).astype(bf16)
        inverse -= product((half, inverse_smem))
        width *= 2
    rounded = inverse.astype(bf16)
    inverse_smem[...] = rounded
    plgpu.commit_smem()
    inverse = rounded.astype(f32)
    residual = jnp.where(apart == 0, 1.0, 0.0) - inverse - product((rounded, high_smem), (rounded, low_smem))
    inverse += product((residual.astype(bf16), inverse_smem))
    inverse_smem[...] = inverse.astype(bf16)
    rest_smem[...] = (inverse - inverse.astype(bf16).astype(f32)).astype(bf16)


def chunk_kernel(normalize: bool, group: int, q_ref, k_ref, gates_ref, squares_ref, scalars_ref, *scratch):
    """q, k [B, T, K, Hk]; gates [B, M, N, 6, C] -> squares [B, M, N, 3 C, C] bf16 and scalars [B, M, N, 4, C] fp32."""
    part = lax.axis_index("part")
    item = lax.axis_index("block") * PARTS + part
    batch, chunks, heads = gates_ref.shape[:3]
    head = lax.div(item, heads * chunks), lax.rem(lax.div(item, heads), chunks), lax.rem(item, heads)
    mine = (ref.at[part] for ref in scratch)
    arguments = head, normalize, group, q_ref, k_ref, gates_ref, squares_ref, scalars_ref, *mine
    pl.when(item < batch * chunks * heads)(lambda: _one_chunk(*arguments))


def _one_chunk(head, normalize: bool, group: int, q_ref, k_ref, gates_ref, squares_ref, scalars_ref,
               q_smem, k_smem, gates, squares_smem, lengths_smem, scalars_smem, loaded):  # fmt: skip
    b, m, n = head
    rows = b, pl.ds(m * CHUNK, CHUNK), lax.div(n, jnp.int32(group))
    plgpu.copy_gmem_to_smem(q_ref.at[rows], q_smem, loaded)
    plgpu.copy_gmem_to_smem(k_ref.at[rows], k_smem, loaded)
    plgpu.copy_gmem_to_smem(gates_ref.at[head], gates, loaded)
    plgpu.barrier_wait(loaded)
    inverse, rest, mixing = (squares_smem.at[pl.ds(i * CHUNK, CHUNK)] for i in (INVERSE, INVERSE_REST, MIXING))
    length, scale = inverse_length(k_smem, normalize), inverse_length(q_smem, normalize) * WIDTH**-0.5
    lengths_smem[...] = length
    _write_scalars(gates, length, scale, scalars_smem)
    qk, kk = products([(q_smem, turned(k_smem))], [(k_smem, turned(k_smem))])
    between = decay_between(gates) * per_column(on_columns(gates.at[BETA]) * on_columns(lengths_smem))
    mixing[...] = (qk * per_row(scale) * between).astype(bf16)
    # q and k have been read: there is room in their place.
    room = q_smem.at[:, :CHUNK], q_smem.at[:, CHUNK:], inverse, rest, k_smem.at[:, :CHUNK]
    invert(strictly_lower(kk * per_row(length) * between), *room)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(squares_smem, squares_ref.at[head])
    plgpu.copy_smem_to_gmem(scalars_smem, scalars_ref.at[head])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _write_scalars(gates, length, scale, scalars_smem) -> None:
    before = on_rows(gates.at[BEFORE])
    scalars_smem[READ] = length * before
    scalars_smem[OUT] = scale * before
    scalars_smem[WRITE] = on_rows(gates.at[AFTER]) * on_rows(gates.at[BETA]) * length
    scalars_smem[ACROSS] = on_rows(gates.at[TOTAL])
