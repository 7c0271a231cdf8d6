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

from qwen35_jax.ops.hopper.matrices import product, products, turned

CHUNK = 64  # tokens of a chunk: the rows of a warpgroup's matrix instruction
WIDTH = 128  # of a key and of a value head
BLOCK, NARROW = 16, 6  # blocks of this size are inverted side by side, with so many matrices of their width in shared memory
INVERSE, INVERSE_REST, MIXING, SQUARES = range(4)  # those of a chunk and value head, one above the other
READ, OUT, WRITE, ACROSS = range(4)  # its scalars: r a, s a, b w of each token, and c
# Rows of the gates: running sums of log2 decay in two parts; beta; decay from the chunk's start, to its end, and over all of it
COARSE, REST, BETA, BEFORE, AFTER, TOTAL = range(6)

f32, bf16 = jnp.float32, jnp.bfloat16


def tiled(*shape: int, row: int = 64):
    """Shared memory in bfloat16 as the matrix instructions read it: rows of `row` numbers, swizzled."""
    return plgpu.SMEM(shape, bf16, transforms=(plgpu.TilingTransform((8, row)), plgpu.SwizzleTransform(2 * row)))


def on_rows(ref) -> jax.Array:
    """One number per row of a [64, n] matrix in registers."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1))


def on_columns(ref) -> jax.Array:
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0))


def per_row(x: jax.Array, columns: int = CHUNK) -> jax.Array:
    return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def per_column(x: jax.Array, rows: int = CHUNK) -> jax.Array:
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])


def index(axis: int, columns: int = CHUNK) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, (CHUNK, columns), axis, layout=plgpu.Layout.WGMMA)


def block_index() -> jax.Array:
    """Which block of 16 rows each number of a [64, 16] matrix is in."""
    return lax.shift_right_logical(index(0, BLOCK), jnp.int32(BLOCK.bit_length() - 1))


def strictly_lower(x: jax.Array) -> jax.Array:
    return jnp.where(index(0) > index(1), x, 0.0)


def inverse_length(ref, normalize: bool) -> jax.Array:
    """1 / |x| of each row of ref [C, H], fp32; 1 where lengths do not count. 1e-6 under the root as in `xla.unit_length`."""
    x = plgpu.load(ref, layout=plgpu.Layout.WGMMA).astype(f32)
    squares = jnp.sum(x * x, axis=1)
    return lax.rsqrt(squares + 1e-6) if normalize else jnp.where(squares >= 0, 1.0, squares)


def decay_between(gates) -> jax.Array:
    """D [C, C], masked before the power is taken: the exponents of spans that run backwards are large."""
    coarse = per_row(on_rows(gates.at[COARSE])) - per_column(on_columns(gates.at[COARSE]))
    rest = per_row(on_rows(gates.at[REST])) - per_column(on_columns(gates.at[REST]))
    return jnp.exp2(jnp.where(index(0) >= index(1), coarse + rest, -jnp.inf))


def cut(x: jax.Array) -> jax.Array:
    """x without the bits that bfloat16 has no room for. Not rounded, which takes several instructions a number."""
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(2**16)), f32)


def two_parts(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """fp32 as the sum of two numbers of bfloat16, to 2^-17."""
    high = cut(x)
    return high.astype(bf16), (x - high).astype(bf16)


def blocks(x: jax.Array, left: int = 0) -> jax.Array:
    """x [64, 64] -> [64, 16]: of each row what lies in its block on the diagonal, or in the block `left` of that."""
    picked = x[:, :BLOCK]
    for i in range(1, CHUNK // BLOCK - left):
        picked = jnp.where(block_index() == i + left, x[:, i * BLOCK : (i + 1) * BLOCK], picked)
    return picked


def only(x: jax.Array, block: int) -> jax.Array:
    """The rows of one block of x [64, 16] bfloat16, zeros elsewhere; by a product, which takes two numbers at a time."""
    return x * jnp.where(block_index() == block, 1.0, 0.0).astype(bf16)


def rows_of(ref, block: int):
    return ref.at[pl.ds(block * BLOCK, BLOCK)]


def block_product(x: jax.Array, y, pairs) -> jax.Array:
    """For each pair (i, j) block i of x [64, 16] times block j of y [64, 16] in shared memory -> [64, 16], zero elsewhere."""
    x = x.astype(bf16)
    return product(*((only(x, i), rows_of(y, j)) for i, j in pairs))


def invert_blocks(lower: jax.Array, lower_smem, inverse_smem) -> jax.Array:
    """Inverses of the four blocks of 16 of I + L, side by side, from their L [64, 16], which lower_smem holds in bfloat16.

    X L X holds what joins two blocks of X beside what does not: that is masked, since what L has elsewhere meets only zeros.
    """
    # The highest bit that two numbers differ in is the size of the largest blocks that part them.
    apart = jnp.bitwise_xor(index(0, BLOCK) & (BLOCK - 1), index(1, BLOCK))
    inverse = jnp.where(apart == 0, 1.0, jnp.where(apart == 1, -lower, 0.0))
    same = [(i, i) for i in range(CHUNK // BLOCK)]
    width = 2
    while width < BLOCK:
        inverse_smem[...] = inverse.astype(bf16)
        plgpu.commit_smem()
        half = block_product(inverse, lower_smem, same)
        joined = (apart >= width) & (apart < 2 * width)
        inverse = jnp.where(joined, -block_product(half, inverse_smem, same), inverse)
        width *= 2
    return inverse


def invert_narrow(lower: jax.Array, narrow_smem) -> jax.Array:
    """(I + L)^-1 by block doubling as in `inverse.py`, operands in bfloat16, sums in float32. Only blocks of 16 columns are
    multiplied, those that are not zero. narrow_smem: NARROW matrices [64, 16]."""
    lower_smem, left_smem, *corner_smem, small_smem, joint_smem = (narrow_smem.at[i] for i in range(NARROW))
    diagonal = blocks(lower)
    lower_smem[...] = diagonal.astype(bf16)
    left_smem[...] = blocks(lower, 1).astype(bf16)
    for i, corner in enumerate(corner_smem):
        corner[...] = lower[:, i * BLOCK : (i + 1) * BLOCK].astype(bf16)
    small = invert_blocks(diagonal, lower_smem, small_smem)
    small_smem[...] = small.astype(bf16)
    plgpu.commit_smem()
    # Blocks of 32: 1 is joined with 0 and 3 with 2.
    half = block_product(small, left_smem, [(1, 1), (3, 3)])
    joint = -block_product(half, small_smem, [(1, 0), (3, 2)])
    joint_smem[...] = joint.astype(bf16)
    plgpu.commit_smem()
    # The whole: (2, 3) with (0, 1).
    block = block_index()
    third, fourth = jnp.where(block == 2, small, jnp.where(block == 3, joint, 0.0)), jnp.where(block == 3, small, 0.0)
    c, d = third.astype(bf16), fourth.astype(bf16)
    a, b = (x.astype(bf16) for x in products(*([(c, rows_of(corner, 2)), (d, rows_of(corner, 3))] for corner in corner_smem)))
    first, second = products([(a, rows_of(small_smem, 0)), (b, rows_of(joint_smem, 1))], [(b, rows_of(small_smem, 1))])
    first = jnp.where(block == 0, small, jnp.where(block == 1, joint, -first))
    second = jnp.where(block == 1, small, -second)
    return jnp.concatenate([first, second, third, fourth], axis=1)


def invert(lower: jax.Array, high_smem, low_smem, inverse_smem, rest_smem, narrow_smem) -> None:
    """(I + L)^-1 in two parts of bfloat16. rest_smem may be low_smem.

    Keys that repeat leave errors of 1e-2, so X is refined once: X + (I - X (I + L)) X, with L in two parts of bfloat16, which
    makes the residual exact to 2^-17.
    """
    high_smem[...], low_smem[...] = two_parts(lower)
    inverse = cut(invert_narrow(lower, narrow_smem))
    rounded = inverse.astype(bf16)
    inverse_smem[...] = rounded
    plgpu.commit_smem()
    # Without the I of the residual its diagonal is -1, which is exact, and takes one X away.
    residual = -(inverse + product((rounded, high_smem), (rounded, low_smem)))
    inverse = 2 * inverse + product((residual.astype(bf16), inverse_smem))
    inverse_smem[...], rest_smem[...] = two_parts(inverse)


def chunk_kernel(normalize: bool, group: int, q_ref, k_ref, gates_ref, squares_ref, scalars_ref,
                 q_smem, k_smem, gates, squares_smem, narrow_smem, lengths_smem, scalars_smem, loaded):  # fmt: skip
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
    invert(lower, q_smem.at[:, :CHUNK], rest, inverse, rest, narrow_smem)
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
