"""What each chunk of the gated delta rule needs before the state comes by, as a Pallas kernel for Hopper (Mosaic GPU).

In the units of `tpu_kernels.py`: r = 1 / |k|, w = beta r, s = Hk^-0.5 / |q|, D the decay between two tokens, and

    L_ij = r_i D_ij k_i.k_j w_j for j < i;  P_ij = s_i D_ij q_i.k_j w_j for j <= i

One warpgroup, a block of its own, takes one chunk of one value head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen35_jax.ops.hopper.matrices import product, turned

CHUNK = 64  # tokens of a chunk: the rows of a warpgroup's matrix instruction
WIDTH = 128  # of a key and of a value head
INVERSE, INVERSE_REST, MIXING, SQUARES = range(4)  # those of a chunk and value head, one above the other
READ, OUT, WRITE, ACROSS = range(4)  # its scalars: r a, s a, b w of each token, and c
# Rows of the gates: running sums of log decay in two parts; beta; decay from the chunk's start, to its end, and over all of it
COARSE, REST, BETA, BEFORE, AFTER, TOTAL = range(6)

f32, bf16 = jnp.float32, jnp.bfloat16


def tiled(*shape: int):
    """Shared memory in bfloat16 as the matrix instructions read it: rows of 64 numbers, swizzled."""
    return plgpu.SMEM(shape, bf16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


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


def cut(x: jax.Array) -> jax.Array:
    """x without the bits that bfloat16 has no room for. Not rounded, which takes several instructions a number."""
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(2**16)), f32)


def two_parts(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """fp32 as the sum of two numbers of bfloat16, to 2^-17."""
    high = cut(x)
    return high.astype(bf16), (x - high).astype(bf16)


def invert(lower: jax.Array, high_smem, low_smem, inverse_smem, rest_smem) -> None:
    """(I + L)^-1 in two parts of bfloat16, block by block as in `inverse.py`; operands in bfloat16, sums in float32.

    X L X holds what joins two blocks of X beside what does not: that is masked, since what L has elsewhere meets only zeros.
    Keys that repeat leave errors of 1e-2, so X is refined once: X + (I - X (I + L)) X, with L in two parts of bfloat16, which
    makes the residual exact to 2^-17. rest_smem may be low_smem.
    """
    high_smem[...], low_smem[...] = two_parts(lower)
    apart = jnp.bitwise_xor(index(0), index(1))  # its highest bit is the size of the largest blocks that part the two
    inverse = jnp.where(apart == 0, 1.0, jnp.where(apart == 1, -lower, 0.0))
    width = 2
    while width < CHUNK:
        inverse_smem[...] = inverse.astype(bf16)
        plgpu.commit_smem()
        half = product((inverse_smem, high_smem)).astype(bf16)
        joined = (apart >= width) & (apart < 2 * width)
        inverse = jnp.where(joined, -product((half, inverse_smem)), inverse)
        width *= 2
    inverse = cut(inverse)
    rounded = inverse.astype(bf16)
    inverse_smem[...] = rounded
    plgpu.commit_smem()
    residual = jnp.where(apart == 0, 1.0, 0.0) - inverse - product((rounded, high_smem), (rounded, low_smem))
    inverse += product((residual.astype(bf16), inverse_smem))
    inverse_smem[...], rest_smem[...] = two_parts(inverse)


def chunk_kernel(normalize: bool, group: int, q_ref, k_ref, gates_ref, squares_ref, scalars_ref,
                 q_smem, k_smem, gates, squares_smem, lengths_smem, scalars_smem, loaded):  # fmt: skip
    """Grid (value head, chunk, batch). q, k [B, T, K, Hk]; gates [B, M, N, 6, C] -> squares [B, M, N, 3 C, C] bf16 and scalars
    [B, M, N, 4, C] fp32."""
    n, m, b = (lax.axis_index(name) for name in ("head", "chunk", "batch"))
    rows, head = (b, pl.ds(m * CHUNK, CHUNK), lax.div(n, jnp.int32(group))), (b, m, n)
    plgpu.copy_gmem_to_smem(q_ref.at[rows], q_smem, loaded)
    plgpu.copy_gmem_to_smem(k_ref.at[rows], k_smem, loaded)
    plgpu.copy_gmem_to_smem(gates_ref.at[head], gates, loaded)
    plgpu.barrier_wait(loaded)
    inverse, rest, mixing = (squares_smem.at[pl.ds(i * CHUNK, CHUNK)] for i in (INVERSE, INVERSE_REST, MIXING))
    length, scale = inverse_length(k_smem, normalize), inverse_length(q_smem, normalize) * WIDTH**-0.5
    lengths_smem[...] = length
    _write_scalars(gates, length, scale, scalars_smem)
    between = decay_between(gates) * per_column(on_columns(gates.at[BETA]) * on_columns(lengths_smem))
    mixing[...] = (product((q_smem, turned(k_smem))) * per_row(scale) * between).astype(bf16)
    # q has been read: there is room in its place.
    lower = strictly_lower(product((k_smem, turned(k_smem))) * per_row(length) * between)
    invert(lower, q_smem.at[:, :CHUNK], rest, inverse, rest)
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
