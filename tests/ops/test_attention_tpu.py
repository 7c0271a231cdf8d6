"""Splash attention behind the op's contract, interpreted on the CPU, against the whole matrix of scores in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from qwen35_jax.errors import UserError
from qwen35_jax.ops.attention import attention, reference

# Relative Frobenius errors of out and of the gradients of q, k, v: bfloat16 operands, results and gradients, 2e-3 each.
LIMIT = 8e-3
kernel = functools.partial(attention, implementation="pallas_tpu")


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    """Interpreted as a TPU program, with scratch that starts as NaN."""
    with pltpu.force_tpu_interpret_mode():
        yield


def make(time, heads=2, groups=1, width=128, dtype="bfloat16"):
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(1, time, n, width)).astype(jnp.dtype(dtype)) for n in (heads, groups, groups))


@functools.partial(jax.jit, static_argnums=0)
def differentiate(op, inputs, segment_ids, cotangent):
    out, vjp = jax.vjp(lambda *x: op(*x, segment_ids=segment_ids), *inputs)
    return out, *vjp(cotangent)


def check(inputs, segment_ids=None):
    cotangent = np.random.default_rng(1).normal(size=inputs[0].shape).astype(inputs[0].dtype)
    got = differentiate(kernel, inputs, segment_ids, cotangent)
    with jax.enable_x64(True):
        wide, cotangent = jax.tree.map(lambda x: np.asarray(x, np.float64), (inputs, cotangent))
        want = [np.asarray(x) for x in differentiate(reference.attention, wide, segment_ids, cotangent)]
    assert [x.dtype for x in got] == [inputs[0].dtype, *(x.dtype for x in inputs)]
    errors = [np.linalg.norm(np.asarray(x, np.float64) - y) / max(np.linalg.norm(y), 1) for x, y in zip(got, want, strict=True)]
    print([f"{x:.1e}" for x in errors])
    assert max(errors) <= LIMIT, errors


@pytest.mark.parametrize("time", [1, 200])
def test_one_block_padded(time):
    check(make(time))


def test_several_blocks_of_packed_documents_with_padding():
    """Grouped queries of the published width; documents over blocks and inside them."""
    ids = np.repeat([1, 2, 5, 6, 0], [100, 130, 3, 60, 7])[None].astype(np.int32)
    check(make(300, heads=4, groups=2, width=256), ids)


@pytest.mark.parametrize(
    "options, change, message",
    [
        ({"dtype": "float32"}, {}, "needs bfloat16 and H in multiples of 128, not float32"),
        ({"width": 64}, {}, "and H = 64"),
        ({}, {"q_positions": np.zeros((1, 4), np.int32)}, "takes no q_positions"),
    ],
)
def test_what_it_cannot_run(options, change, message):
    q, k, v = make(4, **options)
    with pytest.raises(UserError, match=message):
        kernel(q, k, v, **change)
    if not options:
        with pytest.raises(UserError, match="as many keys as queries, not 4 and 2"):
            kernel(q[:, :2], k, v)
