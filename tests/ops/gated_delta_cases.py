"""What the tests of the kernels of the gated delta rule share: inputs, and the recurrence in float64 of the same inputs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from qwen35_jax.ops.gated_delta import reference

NAMES = ("out", "final_state", "q", "k", "v", "g", "beta", "initial_state")
GATES = [0.0, -1e-3, -5.0, -40.0, -200.0]
H = 128
# Relative Frobenius errors. Where all keys are one, beta's gradient is a small difference of large sums.
LIMITS = {"float32": dict.fromkeys(NAMES, 1e-5), "bfloat16": dict.fromkeys(NAMES[:2], 5e-3) | dict.fromkeys(NAMES[2:], 6e-3)}
REPEATED = {"float32": LIMITS["float32"], "bfloat16": LIMITS["bfloat16"] | {"beta": 3e-2}}


def make(time=200, keys=2, heads=4, gate=None, repeated=None, dtype="float32", value_width=H, seed=0):
    """(q, k, v, g, beta, initial_state), one row. gate: log decays to choose from; repeated: the noise on one same key."""
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(2, 1, time, keys, H))
    v, beta = rng.normal(size=(1, time, heads, value_width)), rng.uniform(size=(1, time, heads))
    g = -np.exp(2 * rng.normal(size=beta.shape) - 2) if gate is None else rng.choice(np.atleast_1d(gate), size=beta.shape)
    if repeated is not None:
        k = rng.normal(size=(1, 1, keys, H)) + repeated * k
        beta = np.full_like(beta, 0.9999 if repeated else 0.835)
    state = rng.normal(size=(1, heads, H, value_width))
    low = [np.asarray(x).astype(jnp.dtype(dtype)) for x in (q, k, v)]
    return *low, *(x.astype(np.float32) for x in (g, beta, state))


def run(rule, inputs, segment_ids=None, **options):
    *inputs, state = inputs
    return rule(*inputs, initial_state=state, segment_ids=segment_ids, **options)


@functools.cache
def jitted(rule):
    return jax.jit(functools.partial(run, rule))


@functools.partial(jax.jit, static_argnums=0, static_argnames="normalize_qk")
def differentiate(rule, inputs, segment_ids, cotangents, normalize_qk=True):
    values, vjp = jax.vjp(lambda *x: run(rule, x, segment_ids, normalize_qk=normalize_qk), *inputs)
    return *values, *vjp(cotangents)


def exact(function, *args, **options):
    """`function` in float64, of inputs that may be rounded."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, x.dtype if x.dtype == np.int32 else np.float64), args)
        return jax.tree.map(np.asarray, function(*wide, **options))


def error(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / max(np.linalg.norm(want), 1e-30)


def check(kernel, inputs, segment_ids=None, limits=LIMITS, **options):
    """Values and the six gradients."""
    rng = np.random.default_rng(1)
    cotangents = tuple(rng.normal(size=inputs[i].shape).astype(inputs[i].dtype) for i in (2, 5))
    got = differentiate(kernel, inputs, segment_ids, cotangents, **options)
    oracle = functools.partial(differentiate, reference.gated_delta_rule)
    want = exact(oracle, inputs, segment_ids, cotangents, **options)
    assert [x.dtype for x in got] == [x.dtype for x in (inputs[2], inputs[5], *inputs)]
    errors = {name: error(x, y) for name, x, y in zip(NAMES, got, want, strict=True)}
    print({name: f"{x:.1e}" for name, x in errors.items()})
    allowed = limits[inputs[2].dtype.name]
    assert all(errors[name] <= allowed[name] for name in NAMES), errors


def check_values(kernel, inputs, segment_ids=None):
    want = exact(jitted(reference.gated_delta_rule), inputs, segment_ids)
    got = jitted(kernel)(inputs, segment_ids)
    errors = [error(x, y) for x, y in zip(got, want, strict=True)]
    assert max(errors) <= LIMITS[inputs[2].dtype.name]["out"], errors
