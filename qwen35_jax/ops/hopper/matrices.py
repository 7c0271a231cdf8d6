"""Matrix products of the tensor cores, inside a Mosaic GPU kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def products(*sums, totals=None, meanwhile=lambda: None) -> list[jax.Array]:
    """For each sum, a sequence of pairs, the sum of x @ y over its pairs, in float32; all are begun, then `meanwhile` is called,
    before one is awaited: the arrays that it returns, if any, follow the sums.

    x lies in registers or shared memory, y in shared memory. totals: for each sum what it begins with, float32, or None.
    """

    def multiply(*accumulators):
        for acc, total in zip(accumulators, totals or [None] * len(sums), strict=True):
            if total is not None:
                acc[...] = total
        for acc, pairs in zip(accumulators, sums, strict=True):
            for x, y in pairs:
                plgpu.wgmma(acc, x, y)
        others = meanwhile() or ()
        return [*(acc[...] for acc in accumulators), *others]

    return pl.run_scoped(multiply, *(plgpu.ACC((s[0][0].shape[0], s[0][1].shape[1]), jnp.float32) for s in sums))


def product(*pairs) -> jax.Array:
    """The sum of x @ y over pairs."""
    return products(pairs)[0]


def sum_of_rows(x: jax.Array, scratch) -> jax.Array:
    """x [n, m] float32 summed to [m], by way of scratch, shared memory in float32 that is this warpgroup's own.

    `jnp.sum` takes the same place for all warpgroups of a block, which write over each other's numbers.
    """
    layout = plgpu.Layout.WGMMA
    result = plgpu.ShapeDtypeStruct((x.shape[1],), x.dtype, layout=layout.reduce(0))

    @plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType()), return_type=result)
    def add(_, x, scratch):
        return x.reduce("add", 0, scratch)

    return add(x, scratch)


def turned(ref):
    """A matrix in shared memory, transposed."""
    return ref.transpose((1, 0))
