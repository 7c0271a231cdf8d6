"""The TPU kernels of the gated delta rule, interpreted on the CPU, against the recurrence in float64 of the same inputs."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from qwen35_jax.compat import HAS_MOSAIC_GPU
from qwen35_jax.config import ModelConfig
from qwen35_jax.errors import UserError
from qwen35_jax.ops.forms import Forms, resolve_forms
from qwen35_jax.ops.gated_delta import gated_delta_rule, gated_delta_step, reference
from qwen35_jax.ops.gated_delta.tpu_kernels import CHUNK
from tests.ops import gated_delta_cases as cases
from tests.ops.gated_delta_cases import GATES, LIMITS, REPEATED, H, error, exact, jitted, make, run
from tests.ops.gated_delta_packing import check_packed_equals_separate
from tests.ops.test_context import cut

DTYPES = list(LIMITS)

kernel = functools.partial(gated_delta_rule, implementation="pallas_tpu")
check, check_values = functools.partial(cases.check, kernel), functools.partial(cases.check_values, kernel)


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    """Interpreted as TPU programs, with scratch that starts as NaN."""
    with pltpu.force_tpu_interpret_mode():
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", [None, GATES, *(pytest.param(gate, marks=pytest.mark.slow) for gate in GATES)], ids=str)
def test_gates(gate, dtype):
    check(make(gate=gate, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_repeated_keys(noise, dtype):
    """Identical and nearly identical keys: an inverse in bfloat16 that is not refined is off by 1e-2 here."""
    check(make(gate=-1e-3, repeated=noise, dtype=dtype), limits=REPEATED)


@pytest.mark.parametrize("time", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1])
def test_lengths(time):
    check_values(make(time=time, keys=1, heads=1))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_length(dtype):
    for time in range(1, CHUNK + 2):
        check_values(make(time=time, keys=1, heads=1, dtype=dtype))


@pytest.mark.parametrize("group", [1, 3, 4])
def test_value_heads_per_key_head(group):
    check(make(time=130, keys=1, heads=group))


def test_several_head_blocks_and_wide_values():
    check(make(time=130, keys=3, heads=12, value_width=2 * H))


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_without_normalisation(dtype):
    q, k, *rest = make(dtype=dtype)
    k = (k / np.linalg.norm(k.astype(np.float32), axis=-1, keepdims=True)).astype(k.dtype)
    check((q, k, *rest), normalize_qk=False)


def test_zero_keys_and_queries():
    q, k, *rest = make()
    q[:, 20:90], k[:, 40:150] = 0, 0
    check((q, k, *rest))


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_documents_with_padding(dtype):
    """Documents inside a chunk and over several, padding between and around them."""
    ids = np.repeat([0, 4, 0, 7, 9, 0], [5, 60, 4, 120, 1, 10])
    check(make(dtype=dtype), ids.astype(np.int32)[None])


def test_packed_equals_separate():
    *inputs, state = make()
    check_packed_equals_separate(jitted(kernel), inputs, state, [40, 1, 130, 20])


def test_a_row_of_padding_keeps_its_state():
    inputs = make()
    _, final = jitted(kernel)(inputs, np.zeros((1, 200), np.int32))
    np.testing.assert_array_equal(final, inputs[5])


@pytest.mark.parametrize("dtype", DTYPES)
def test_split_equals_whole_and_hands_over_to_steps(dtype):
    *inputs, state = make(dtype=dtype)
    want = exact(jitted(reference.gated_delta_rule), (*inputs, state))
    first, state = jitted(kernel)((*(x[:, :77] for x in inputs), state))
    second, state = jitted(kernel)((*(x[:, 77:197] for x in inputs), state))
    third, state = jax.jit(gated_delta_step)(*(x[:, 197:] for x in inputs), state)
    assert error(jnp.concatenate([first, second, third], axis=1), want[0]) <= LIMITS[dtype]["out"]
    assert error(state, want[1]) <= LIMITS[dtype]["final_state"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_drift_over_32768_tokens(dtype):
    check_values(make(time=32768, keys=1, heads=1, gate=[-1e-4, -1e-3, -1e-2], dtype=dtype))


def test_no_races():
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    inputs = make(time=130, keys=1, heads=2)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(run(kernel, x)[0])))
        jax.block_until_ready(gradient(inputs))
    assert not interpreter.races.races_found


def test_under_shard_map_and_vmap():
    """Heads over two devices, the state left to its default; and a vmapped axis."""
    inputs = make(time=130)[:5]
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    tokens, state = jax.P(None, None, "model"), jax.P(None, "model")
    sharded = jax.shard_map(kernel, mesh=mesh, in_specs=(tokens,) * 5, out_specs=(tokens, state), check_vma=False)
    want = jax.jit(kernel)(*inputs)
    mapped = jax.jit(jax.vmap(kernel))
    for got in (jax.jit(sharded)(*inputs), mapped(*(x[:, None] for x in inputs))):
        for x, y in zip(got, want, strict=True):
            np.testing.assert_allclose(x.reshape(y.shape), y, atol=2e-6)


def mesh_of(platform, capability="8.0"):
    device = SimpleNamespace(platform=platform, device_kind=f"some {platform}", compute_capability=capability)
    return SimpleNamespace(devices=np.array([device]))


def test_choice_of_forms():
    large, tiny = ModelConfig.preset("0.8b"), ModelConfig.preset("tiny")
    ours = ("gated_delta_rule", "gated_delta_step", "causal_conv1d", "cached_attention", "fp8_training_linear")
    ours = dict.fromkeys(ours, "pallas_tpu")
    chosen = Forms(**ours, attention="pallas_tpu")
    assert resolve_forms(mesh_of("tpu"), large) == resolve_forms(mesh_of("tpu"), large, "pallas") == chosen
    assert resolve_forms(mesh_of("tpu"), large, "xla") == Forms()
    assert resolve_forms(mesh_of("tpu"), tiny) == Forms(fp8_training_linear="pallas_tpu")
    in_float32 = resolve_forms(mesh_of("tpu"), large.replace(dtype="float32"))
    assert in_float32 == Forms(**ours)
    cut = resolve_forms(mesh_of("tpu"), large, context_parallel=True)  # the splash kernel takes no keys that come by
    assert cut == Forms(**ours)
    assert resolve_forms(mesh_of("gpu"), large) == Forms()
    assert resolve_forms(mesh_of("gpu", "9.0"), large).gated_delta_step == ("pallas_gpu" if HAS_MOSAIC_GPU else "xla")
    with pytest.raises(UserError, match="none for some gpu, only for TPU"):
        resolve_forms(mesh_of("gpu"), large, "pallas")


def cut_kernel(q, k, v, g, beta, *, initial_state, segment_ids=None, normalize_qk=True):
    """The kernel on each half of a sequence, on two devices."""
    op = functools.partial(gated_delta_rule, implementation="pallas_tpu", context_axis="data", normalize_qk=normalize_qk)
    arguments = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "initial_state": initial_state}
    return cut(op, 2, arguments | ({} if segment_ids is None else {"segment_ids": segment_ids}), ("initial_state",))


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_below_sequences_that_are_cut(dtype):
    """Half of a sequence on each of two devices, whose maps are composed; a document begins in the second half."""
    ids = np.repeat([1, 2], [170, 30]).astype(np.int32)[None]
    cases.check(cut_kernel, make(dtype=dtype), ids)
