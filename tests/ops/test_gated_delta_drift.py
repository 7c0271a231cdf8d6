"""32,768 tokens through each form of the gated delta rule, one at a time and in chunks, against the recurrence in float64: errors
must not grow with the length. The prefill kernels of the devices have the same test in files of their own."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from qwen35_jax.ops.gated_delta import gated_delta_rule, gated_delta_step, reference
from tests.ops.gated_delta_cases import LIMITS, error, exact, jitted, make
from tests.ops.xla_interpreter import kernels_as_xla

STEPS, PART = 32768, 1024
GATES = [-1e-4, -1e-3, -1e-2]  # a token is remembered for up to 10,000 steps
KEYS = {"random keys": None, "nearly identical keys": 1e-3}


@pytest.fixture
def as_xla(monkeypatch):
    kernels_as_xla(monkeypatch)


def in_steps(inputs, implementation):
    """out [B, T, N, Hv] and final state, from one call of `gated_delta_step` a token."""

    @jax.jit
    def run(tokens, state):
        def step(state, token):
            out, state = gated_delta_step(*(x[:, None] for x in token), state, implementation=implementation)
            return state, out[:, 0]

        state, out = jax.lax.scan(step, state, tuple(jnp.swapaxes(x, 0, 1) for x in tokens))
        return jnp.swapaxes(out, 0, 1), state

    *tokens, state = inputs
    return run(tokens, state)


FORMS = {
    "kernel's steps": functools.partial(in_steps, implementation="pallas_tpu"),
    "XLA's steps": functools.partial(in_steps, implementation="xla"),
    "XLA's chunks": jitted(gated_delta_rule),
}


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ("nearly identical keys", "float32"),
        pytest.param("random keys", "float32", marks=pytest.mark.slow),
        pytest.param("random keys", "bfloat16", marks=pytest.mark.slow),
        pytest.param("nearly identical keys", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_drift_over_32768_tokens(as_xla, keys, dtype):
    """The limits are those of 200 tokens. Errors that add up at random would grow by sqrt(32) from the first thousand tokens to
    the last."""
    inputs = make(time=STEPS, keys=1, heads=1, gate=GATES, repeated=KEYS[keys], dtype=dtype)
    want = exact(jitted(reference.gated_delta_rule), inputs)
    limits = LIMITS[dtype]
    for name, form in FORMS.items():
        out, state = form(inputs)
        first, last = (error(out[:, part], want[0][:, part]) for part in (slice(PART), slice(-PART, None)))
        of_state = error(state, want[1])
        print(f"{keys}, {dtype}, {name}: out {first:.1e} to {last:.1e}, state {of_state:.1e}")
        assert max(first, last) <= limits["out"] and of_state <= limits["final_state"], name
        assert last < 5 * first, name
