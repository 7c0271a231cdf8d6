"""The gated delta rule against the recurrence in float64: values, six gradients, lengths, gates, packing."""

from __future__ import annotations

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from qwen35_jax.errors import UserError
from qwen35_jax.ops.gated_delta import gated_delta_rule, gated_delta_step, reference
from qwen35_jax.ops.gated_delta.inverse import unit_lower_inverse
from tests.ops.gated_delta_packing import check_packed_equals_separate

VALUES, GRADIENTS = 2e-5, 2e-4  # the contract, relative to the largest entry
GATES = [0.0, -1e-3, -5.0, -40.0, -200.0]
NAMES = ("q", "k", "v", "g", "beta", "initial_state")


def make(time=150, batch=2, keys=2, heads=4, width=16, gate=None, repeated=None, seed=0):
    """(q, k, v, g, beta, initial_state). gate: log decays to choose from; repeated: the noise on one same key."""
    rng = np.random.default_rng(seed)
    shape = (batch, time, keys, width)
    q, k = rng.normal(size=shape), rng.normal(size=shape)
    v, beta = rng.normal(size=(batch, time, heads, width // 2)), rng.uniform(size=(batch, time, heads))
    g = -np.exp(2 * rng.normal(size=beta.shape) - 2) if gate is None else rng.choice(np.atleast_1d(gate), size=beta.shape)
    if repeated is not None:
        k = rng.normal(size=(batch, 1, keys, width)) + repeated * k
        beta = np.full_like(beta, 0.9999 if repeated else 0.835)
    state = rng.normal(size=(batch, heads, width, width // 2))
    return tuple(np.asarray(x, np.float32) for x in (q, k, v, g, beta, state))


def run(rule, inputs, segment_ids=None, normalize_qk=True):
    *inputs, state = inputs
    return rule(*inputs, initial_state=state, segment_ids=segment_ids, normalize_qk=normalize_qk)


@functools.partial(jax.jit, static_argnums=0, static_argnames="normalize_qk")
def differentiate(rule, inputs, segment_ids, cotangents, normalize_qk=True):
    values, vjp = jax.vjp(lambda *x: run(rule, x, segment_ids, normalize_qk), *inputs)
    return values, vjp(cotangents)


def exact(function, *args):
    """The reference in float64, jitted and fed with float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(np.float64) if np.issubdtype(x.dtype, np.floating) else x, args)
        return jax.tree.map(np.asarray, function(*wide))


def error(got, want):
    return np.abs(np.asarray(got, np.float64) - want).max() / max(np.abs(want).max(), 1e-30)


def check(inputs, segment_ids=None, normalize_qk=True):
    rng = np.random.default_rng(1)
    cotangents = tuple(rng.normal(size=inputs[i].shape).astype(np.float32) for i in (2, 5))
    values, gradients = differentiate(gated_delta_rule, inputs, segment_ids, cotangents, normalize_qk=normalize_qk)
    oracle = functools.partial(differentiate, reference.gated_delta_rule, normalize_qk=normalize_qk)
    want = exact(oracle, inputs, segment_ids, cotangents)
    for name, got, expected in zip(("out", "final_state"), values, want[0], strict=True):
        assert error(got, expected) <= VALUES, name
    for name, got, expected in zip(NAMES, gradients, want[1], strict=True):
        assert np.isfinite(got).all(), name
        assert error(got, expected) <= GRADIENTS, name


@pytest.mark.parametrize("gate", [*GATES, GATES], ids=str)
def test_gates(gate):
    check(make(gate=gate))


@pytest.mark.parametrize("noise", [0.0, 1e-3])
@pytest.mark.parametrize("gate", [0.0, -1e-3])
def test_repeated_keys(noise, gate):
    """Identical and near-identical keys: an inverse by powers of L is off by 1e6 here."""
    check(make(gate=gate, repeated=noise))


def test_three_value_heads_per_key_head():
    check(make(keys=1, heads=3))


@pytest.mark.parametrize("time", [1, 2, 65])
def test_lengths_with_gradients(time):
    check(make(time=time))


@pytest.mark.parametrize("time", [3, 17, 63, 64, 128])
def test_lengths(time):
    inputs = make(time=time)
    want = exact(lambda *x: jax.jit(functools.partial(run, reference.gated_delta_rule))(x), *inputs)
    for got, expected in zip(jax.jit(functools.partial(run, gated_delta_rule))(inputs), want, strict=True):
        assert error(got, expected) <= VALUES


def test_one_value_head_per_key_head_without_normalisation():
    q, k, *rest = make(keys=2, heads=2)
    check((q, k / np.linalg.norm(k, axis=-1, keepdims=True), *rest), normalize_qk=False)


def test_zero_keys_and_queries_have_finite_gradients():
    q, k, *rest = make()
    q[:, 20:90], k[:, 40:100] = 0, 0
    check((q, k, *rest))


def test_packed_documents_with_padding():
    """A document inside a chunk, one over several, padding between and around them."""
    rows = [np.repeat([1, 2, 3, 0], [10, 30, 95, 15]), np.repeat([0, 4, 0, 7, 9], [5, 60, 4, 80, 1])]
    check(make(), np.stack(rows).astype(np.int32))


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 90)), min_size=1, max_size=8), st.integers(0, 2**16))
def test_any_segments(runs, seed):
    """Documents in any number, of any length, with padding anywhere, equal the token-by-token recurrence."""
    ids = np.concatenate([np.full(n, 0 if step == 0 else i + 1) for i, (step, n) in enumerate(runs)])
    ids = np.pad(ids, (0, 150))[:150].astype(np.int32)[None]
    inputs = make(batch=1, gate=[0.0, -1e-2, -1.0, -30.0], seed=seed)
    got = jitted(gated_delta_rule)(inputs, ids)
    want = jitted(reference.gated_delta_rule)(inputs, ids)
    for x, y in zip(got, want, strict=True):
        assert error(x, np.asarray(y)) <= VALUES


@functools.cache
def jitted(rule):
    return jax.jit(functools.partial(run, rule))


def test_packed_equals_separate():
    *inputs, state = make(time=150, batch=1)
    check_packed_equals_separate(jitted(gated_delta_rule), inputs, state, [40, 1, 64, 30])


def test_padding_changes_nothing():
    *inputs, state = make(time=150, batch=1)
    ids = (np.arange(150) < 100).astype(np.int32)[None]
    padded = jitted(gated_delta_rule)((*inputs, state), ids)
    short = jitted(gated_delta_rule)((*(x[:, :100] for x in inputs), state))
    np.testing.assert_allclose(padded[0][:, :100], short[0], atol=2e-6)
    np.testing.assert_allclose(padded[1], short[1], atol=2e-6)


def test_a_row_of_padding_keeps_its_state():
    inputs = make(batch=1)
    _, final = jitted(gated_delta_rule)(inputs, np.zeros((1, 150), np.int32))
    np.testing.assert_array_equal(final, inputs[5])


def test_split_equals_whole_and_hands_over_to_steps():
    *inputs, state = make(time=150)
    out, final = jitted(gated_delta_rule)((*inputs, state))
    first, state = jitted(gated_delta_rule)((*(x[:, :77] for x in inputs), state))
    second, state = jitted(gated_delta_rule)((*(x[:, 77:140] for x in inputs), state))
    outs, step = [first, second], jax.jit(gated_delta_step)
    for t in range(140, 150):
        one, state = step(*(x[:, t : t + 1] for x in inputs), state)
        outs.append(one)
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), out, atol=3e-6)
    np.testing.assert_allclose(state, final, atol=3e-6)


@pytest.mark.parametrize("time", [1, 4])
def test_step_over_slots(time):
    """Rows in slots of a larger state; the state after each token; what is inactive unchanged, to the bit."""
    *inputs, rows = make(time=time, gate=[-1e-3, -1.0])
    state = np.random.default_rng(2).normal(size=(5, *rows.shape[1:])).astype(np.float32)
    state[[3, 1]] = rows
    active = np.ones((2, time), bool)
    active[1, time // 2 :] = False
    step = jax.jit(functools.partial(gated_delta_step, return_states=True))
    out, new, states = step(*inputs, state, np.array([3, 1]), active=active)
    want, final = reference.gated_delta_rule(*inputs, initial_state=rows, segment_ids=active.astype(np.int32))
    np.testing.assert_allclose(out, want, atol=2e-6)
    np.testing.assert_allclose(new[np.array([3, 1])], final, atol=2e-6)
    np.testing.assert_array_equal(new[np.array([0, 2, 4])], state[[0, 2, 4]])
    np.testing.assert_array_equal(states[:, -1], new[np.array([3, 1])])
    for t in range(time):
        _, after = reference.gated_delta_rule(
            *(x[:, : t + 1] for x in inputs), initial_state=rows, segment_ids=active[:, : t + 1].astype(np.int32)
        )
        np.testing.assert_allclose(states[:, t], after, atol=2e-6)
    if time == 1:
        np.testing.assert_array_equal(new[1], state[1])


def test_bfloat16_inputs_are_computed_in_float32():
    *inputs, state = make()
    low = [jnp.asarray(x, jnp.bfloat16) for x in inputs[:3]]
    rounded = [np.asarray(x, np.float32) for x in low]
    out, final = jitted(gated_delta_rule)((*low, *inputs[3:], state))
    want, want_final = jitted(gated_delta_rule)((*rounded, *inputs[3:], state))
    assert out.dtype == jnp.bfloat16 and final.dtype == jnp.float32
    np.testing.assert_allclose(final, want_final, atol=1e-6)
    np.testing.assert_array_equal(out, want.astype(jnp.bfloat16))


def test_inverse_of_repeated_keys():
    """Ones below the diagonal, the worst case: powers of L reach 1e14, the inverse is 1 and -1."""
    with jax.enable_x64(True):
        lower = np.tril(np.full((64, 64), 0.9999), -1)
        want = np.linalg.inv(np.eye(64) + lower)
    got = jax.jit(unit_lower_inverse)(jnp.asarray(lower, jnp.float32))
    assert np.abs(got - want).max() < 2e-6


def test_under_shard_map_and_vmap():
    """Heads over four devices, rows over two, the state left to its default; and a vmapped axis."""
    inputs = make(keys=4, heads=8)[:5]
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    tokens, state = jax.P("data", None, "model"), jax.P("data", "model")
    sharded = jax.shard_map(gated_delta_rule, mesh=mesh, in_specs=(tokens,) * 5, out_specs=(tokens, state))
    want = jax.jit(gated_delta_rule)(*inputs)
    mapped = jax.jit(jax.vmap(gated_delta_rule))
    for got in (jax.jit(sharded)(*inputs), mapped(*(x[:, None] for x in inputs))):
        for x, y in zip(got, want, strict=True):
            np.testing.assert_allclose(np.squeeze(x), y, atol=2e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": np.zeros((2, 9, 2, 8), np.float32)}, "k is"),
        ({"v": np.zeros((2, 8, 3, 8), np.float32)}, "3 value heads on 2 key heads"),
        ({"g": np.zeros((2, 8, 2), np.float32)}, "g is"),
        ({"beta": np.zeros((2, 8, 4), np.int32)}, "beta has dtype int32"),
        ({"initial_state": np.zeros((2, 4, 8, 8), np.float32)}, "initial_state is"),
        ({"segment_ids": np.zeros((2, 7), np.int32)}, "segment_ids has shape"),
        ({"implementation": "triton"}, "no 'triton' implementation"),
        ({"implementation": "pallas_gpu"}, "pallas_gpu needs"),  # a newer JAX, or heads of 128
        ({"implementation": "pallas_tpu"}, "Hk, Hv in multiples of 128, not 16, 8"),
    ],
)
def test_wrong_calls(change, message):
    call = dict(zip(NAMES, make(time=8), strict=True)) | change
    with pytest.raises(UserError, match=message):
        gated_delta_rule(**call)


def test_wrong_steps():
    *inputs, state = make(time=1)
    with pytest.raises(UserError, match="2 rows on 4 slots"):
        gated_delta_step(*inputs, np.zeros((4, *state.shape[1:]), np.float32))
    with pytest.raises(UserError, match="active has shape"):
        gated_delta_step(*inputs, state, active=np.ones((2, 2), bool))
