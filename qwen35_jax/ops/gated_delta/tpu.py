from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from qwen35_jax.ops.gated_delta import tpu_kernels as kernels
from qwen35_jax.ops.gated_delta.tpu_kernels import CHUNK, Tile

HB = 8
VMEM = 100

def fwd(q, k, v, g, beta, s0, normalize=True, interpret=False):
    B, T, K, Hk = q.shape
    N, Hv = v.shape[2:]
    group = N // K
    keys = max(1, min(K, HB // group))
    tile = Tile(keys, group, Hk, Hv, normalize)
    hb = tile.heads
    q, k, v = (x.reshape(B, T, -1) for x in (q, k, v))
    g, beta = (jnp.transpose(x, (0, 2, 1)).reshape(B, N // hb, hb, T) for x in (g, beta))
    f32 = jnp.float32
    ks = pl.BlockSpec((None, CHUNK, keys * Hk), lambda b, h, m: (b, m, h))
    vs = pl.BlockSpec((None, CHUNK, hb * Hv), lambda b, h, m: (b, m, h))
    gs = pl.BlockSpec((None, None, hb, CHUNK), lambda b, h, m: (b, h, 0, m))
    ss = pl.BlockSpec((None, hb, Hk, Hv), lambda b, h, m: (b, h, 0, 0))
    return pl.pallas_call(
        functools.partial(kernels.forward_kernel, tile),
        grid=(B, N // hb, T // CHUNK),
        in_specs=[ks, ks, vs, gs, gs, ss],
        out_specs=[vs, ss],
        out_shape=[jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct(s0.shape, f32)],
        scratch_shapes=[pltpu.VMEM((hb, Hk, Hv), f32), pltpu.VMEM((hb, CHUNK, CHUNK), f32),
                        pltpu.VMEM((hb, CHUNK, CHUNK), v.dtype), pltpu.VMEM((hb, CHUNK, CHUNK), v.dtype)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=None),
        interpret=interpret,
        name="gated_delta_rule",
    )(q, k, v, g, beta, s0)
