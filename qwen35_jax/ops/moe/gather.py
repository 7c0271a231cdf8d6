"""Expert parallelism by gathering tokens: all-gather over `data`, local grouped products, reduce-scatter back.

Static shapes, nothing dropped, the same code on CPU, GPU and TPU. Per device it receives tokens x D once each way.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from qwen35_jax.ops.fp8 import quantize_activation, share_activation
from qwen35_jax.ops.moe import products
from qwen35_jax.ops.moe.routing import Routing


def gather_experts(
    x, routing: Routing, experts: dict, *, expert_axes, partial_axes, gathered=True, implementation=None, fp8_activations=False
):
    """One device's part of the mixture of experts; runs inside `shard_map`.

    x [b, T, D] with routing [b, T, k] for the device's own tokens; experts gate and up [E', D, F'], down [E', F', D] its own
    share. `expert_axes` are the mesh axes over which E is cut, `partial_axes` those over which outputs are partial sums.
    `gathered`: tokens are cut over `data`; without it every data shard has them all.
    """
    b, t, d = x.shape
    tokens, ids, weights = (a.reshape(b * t, -1) for a in (x, routing.experts, routing.weights))
    shards = jax.lax.axis_size("data") if gathered else 1
    if shards > 1:
        tokens, ids, weights = (jax.lax.all_gather(a, "data", tiled=True) for a in (tokens, ids, weights))
    local = products.local_count(experts)
    ids = ids - local * jax.lax.axis_index(expert_axes)
    run = functools.partial(_local_experts, local=local, implementation=implementation, fp8_activations=fp8_activations)
    out = _in_chunks(run, tokens, ids, weights, experts, local)
    if shards > 1:
        out = jax.lax.psum_scatter(out, "data", scatter_dimension=0, tiled=True)
    if partial_axes:
        out = jax.lax.psum(out, partial_axes)
    return out.reshape(b, t, d)


def _in_chunks(run, tokens, ids, weights, experts, local: int):
    """run(tokens, ids, weights, experts) over chunks of the group's tokens, so that the row buffers stay below BUFFER_BYTES.

    The worst case is tokens x min(k, local experts) rows: all tokens of the group routed to one device.
    """
    count, d = tokens.shape
    rows_per_token = min(ids.shape[1], local)
    chunk = max(1, products.BUFFER_BYTES // (products.row_bytes(experts, d, tokens.dtype.itemsize) * rows_per_token))
    if chunk >= count:
        return run(tokens, ids, weights, experts)
    pad = -count % chunk

    def split(a, fill):
        return jnp.pad(a, ((0, pad), (0, 0)), constant_values=fill).reshape(-1, chunk, a.shape[1])

    chunks = split(tokens, 0), split(ids, -1), split(weights, 0)
    # The backward pass makes a chunk's rows again: kept for all chunks, they would take what the chunks are there to save.
    one = jax.checkpoint(lambda experts, c: run(*c, experts), prevent_cse=False)
    out = jax.lax.map(functools.partial(one, experts), chunks)
    return out.reshape(-1, d)[:count]


def _local_experts(tokens, ids, weights, experts, *, local: int, implementation, fp8_activations: bool):
    """tokens [t, D], ids [t, k] (counted from the device's first expert; others are elsewhere) -> their share [t, D]."""
    t, k = ids.shape
    rows = t * min(k, local)
    flat = jnp.where((ids >= 0) & (ids < local), ids, local).reshape(-1)
    order = jnp.argsort(flat, stable=True)[:rows]
    token = order // k
    group_sizes = jnp.zeros(local + 1, jnp.int32).at[flat].add(1)[:local]
    if fp8_activations:
        rows_in = jax.tree.map(lambda a: a[token], quantize_activation(tokens))
    else:
        rows_in = share_activation(tokens[token], experts["gate"], experts["up"])
    options = {"implementation": implementation, "fp8_activations": fp8_activations}
    out = products.expert_rows(rows_in, group_sizes, experts, **options)
    weighted = out.astype(jnp.float32) * weights.reshape(-1)[order][:, None]
    # Rows beyond the groups are zero, so adding them to whichever token they name changes nothing.
    return jnp.zeros((t, tokens.shape[1]), jnp.float32).at[token].add(weighted).astype(tokens.dtype)
