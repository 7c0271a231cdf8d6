"""Causal attention for TPU by JAX's splash attention kernel, with its gradient: shapes, scale and blocks around it.

The kernel leaves out blocks above the diagonal, which are known when it is compiled; blocks of other documents it computes and
masks. Its products are of bfloat16 operands, whatever it is given, hence no other dtype here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from qwen35_jax.errors import UserError

LANES = 128
BLOCKS = (512, 256, 128)  # tokens of a block of queries and of keys: the largest that divides the padded length


def supports(width: int, dtype: str) -> bool:
    """Whether heads of this width and dtype can be run."""
    return width % LANES == 0 and dtype == "bfloat16"


def attention(q, k, v, segment_ids):
    """See `ops.attention.attention`: as many queries as keys, each at its own place."""
    batch, time, heads, width = q.shape
    if not all(supports(width, x.dtype.name) for x in (q, k, v)):
        dtypes = ", ".join(x.dtype.name for x in (q, k, v))
        raise UserError(f"attention: pallas_tpu needs bfloat16 and H in multiples of {LANES}, not {dtypes} and H = {width}")
    if k.shape[1] != time:
        raise UserError(f"attention: pallas_tpu needs as many keys as queries, not {k.shape[1]} and {time}")
    ids = jnp.ones((batch, time), jnp.int32) if segment_ids is None else segment_ids
    q, k, v = (_padded(jnp.swapaxes(x, 1, 2), 2) for x in (q * width**-0.5, k, v))
    ids = _padded(ids, 1)
    kernel = _kernel(heads, q.shape[2])
    out = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, segment_ids=splash.SegmentIds(ids, ids)))(q, k, v, ids)
    return jnp.swapaxes(out, 1, 2)[:, :time]


def _padded(x: jax.Array, axis: int) -> jax.Array:
    """Zeros up to a multiple of the smallest block: later keys, which no query sees."""
    return jnp.pad(x, [(0, -x.shape[axis] % BLOCKS[-1] if i == axis else 0) for i in range(x.ndim)])


def _kernel(heads: int, time: int):
    block = next(b for b in BLOCKS if time % b == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = splash.BlockSizes(**{f"block_{name}": block for name in names})
    mask = splash.MultiHeadMask([splash.CausalMask((time, time))] * heads)
    return splash.make_splash_mha_single_device(mask, block_sizes=sizes)
