"""The sampler against a plain NumPy one, on meshes that cut the vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen35_jax import SamplingParams, UserError
from qwen35_jax.generate.sampling import GENERATED, IN_PROMPT, control_arrays, sample, top_candidates
from qwen35_jax.sharding import Sharding, make_mesh

ROWS, VOCABULARY = 8, 512
WRONG = {
    "temperature": [-1.0, 10**400, float("nan")],
    "top_k": [-1, 99999999999],
    "top_p": [0, 2.0],
    "min_p": [-0.1],
    "presence_penalty": [float("inf"), -1e300],
    "repetition_penalty": [0, 1e39],
    "seed": [-1, 2**32],
}
SHARDINGS = {mesh: Sharding(make_mesh(mesh)) for mesh in ("1x1", "1x8", "2x2x2")}
SAMPLERS = {
    mesh: jax.jit(lambda logits, seen, step, controls, s=s: sample(logits, seen, step, controls, VOCABULARY - 12, s))
    for mesh, s in SHARDINGS.items()
}


def draw(logits, params: SamplingParams | list[SamplingParams], *, step=None, seen=None, mesh="1x1"):
    params = params if isinstance(params, list) else [params] * ROWS
    step = np.arange(ROWS, dtype=np.int32) if step is None else step
    seen = np.zeros((ROWS, VOCABULARY), np.uint8) if seen is None else seen
    return np.asarray(SAMPLERS[mesh](jnp.asarray(logits, jnp.float32), seen, step, control_arrays(params)))


def random_logits(seed: int, scale=3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, (ROWS, VOCABULARY)).astype(np.float32)


def allowed(logits: np.ndarray, p: SamplingParams) -> np.ndarray:
    """Ids that survive top-k, top-p and min-p: the definition, sorted in float64."""
    scaled = logits[: VOCABULARY - 12].astype(np.float64) / p.temperature
    order = np.argsort(-scaled, kind="stable")
    order = order[: p.top_k or len(order)]
    probabilities = np.exp(scaled[order] - scaled[order[0]])
    probabilities /= probabilities.sum()
    keep = np.cumsum(probabilities) - probabilities < p.top_p
    keep &= probabilities >= p.min_p * probabilities[0]
    keep[0] = True
    return order[keep]


@pytest.mark.parametrize("mesh", SHARDINGS)
def test_greedy_is_argmax_below_the_limit(mesh):
    logits = random_logits(0)
    logits[:, -12:] = 100  # ids beyond the tokenizer
    expected = logits[:, :-12].argmax(-1)
    np.testing.assert_array_equal(draw(logits, SamplingParams(temperature=0), mesh=mesh), expected)


def test_ties_go_to_the_smallest_id_on_every_mesh():
    logits = np.zeros((ROWS, VOCABULARY), np.float32)
    logits[:, [70, 300, 450]] = 5
    for mesh in SHARDINGS:
        np.testing.assert_array_equal(draw(logits, SamplingParams(temperature=0), mesh=mesh), 70)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 99),
    top_k=st.sampled_from([0, 1, 2, 20, 64, 65, 200, 512]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
)
def test_draws_stay_among_the_allowed(seed, top_k, top_p, min_p, temperature):
    logits = random_logits(seed)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    for row, token in enumerate(draw(logits, params)):
        assert token in allowed(logits[row], params)


@pytest.mark.parametrize("top_k", [5, 0])
def test_frequencies_follow_the_probabilities(top_k):
    logits = np.full((ROWS, VOCABULARY), -1e9, np.float32)
    logits[:, [3, 100, 400]] = np.log([0.5, 0.3, 0.2])
    counts = np.zeros(VOCABULARY)
    for i in range(250):
        step = np.arange(ROWS, dtype=np.int32) + ROWS * i
        np.add.at(counts, draw(logits, SamplingParams(top_k=top_k, seed=7), step=step), 1)
    # 2,000 draws: three standard deviations of a share of 0.5 are 0.034
    np.testing.assert_allclose(counts[[3, 100, 400]] / counts.sum(), [0.5, 0.3, 0.2], atol=0.034)


@pytest.mark.parametrize("top_k", [20, 0])
def test_the_mesh_does_not_change_what_is_drawn(top_k):
    logits = random_logits(3)
    params = [SamplingParams(top_k=top_k, top_p=0.95, seed=s) for s in range(ROWS)]
    expected = draw(logits, params)
    for mesh in ("1x8", "2x2x2"):
        np.testing.assert_array_equal(draw(logits, params, mesh=mesh), expected)


def test_a_row_depends_on_its_seed_and_step_and_not_on_its_neighbours():
    logits = np.tile(random_logits(4)[:1], (ROWS, 1))
    mine = SamplingParams(top_k=20, seed=5)
    alone = draw(logits, mine, step=np.full(ROWS, 9, np.int32))
    assert len(set(alone.tolist())) == 1
    others = [SamplingParams(top_k=0, seed=i, temperature=2.0) for i in range(ROWS - 1)]
    mixed = draw(logits, [mine, *others], step=np.full(ROWS, 9, np.int32))
    assert mixed[0] == alone[0]


def test_penalties():
    logits = np.zeros((ROWS, VOCABULARY), np.float32)
    logits[:, 1], logits[:, 2] = 2.0, 1.9
    seen = np.zeros((ROWS, VOCABULARY), np.uint8)
    seen[:, 1] = IN_PROMPT
    greedy = SamplingParams(temperature=0)
    assert set(draw(logits, SamplingParams(temperature=0, presence_penalty=1.0), seen=seen)) == {1}  # of the answer only
    assert set(draw(logits, SamplingParams(temperature=0, repetition_penalty=1.5), seen=seen)) == {2}
    seen[:, 1] = GENERATED
    assert set(draw(logits, SamplingParams(temperature=0, presence_penalty=1.0), seen=seen)) == {2}
    assert set(draw(logits, greedy, seen=seen)) == {1}
    negative = np.full((ROWS, VOCABULARY), -9.0, np.float32)
    negative[:, 1], negative[:, 2] = -1.0, -1.2
    assert set(draw(negative, SamplingParams(temperature=0, repetition_penalty=1.5), seen=seen)) == {2}


@pytest.mark.parametrize("mesh", SHARDINGS)
def test_top_candidates_are_the_sorted_best(mesh):
    logits = np.round(random_logits(6), 1)  # with ties
    values, ids = jax.jit(lambda x: top_candidates(x, 64, SHARDINGS[mesh]))(logits)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :64]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_array_equal(values, np.take_along_axis(logits, order, 1))


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": 2.0},
     {"presence_penalty": float("inf")}, {"repetition_penalty": 0.0}, {"seed": -1}],
)  # fmt: skip
def test_impossible_settings_are_named(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        SamplingParams(**wrong)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_values_out_of_range(name, value):
    with pytest.raises(UserError, match=f"{name} is .{{1,60}}; it must be"):
        SamplingParams(**{name: value})
