"""The model against transformers, live: small random models of every kind, 600 tokens, every path on one device.

The numbers of the oracle are computed once a session. `pytest tests/oracle -s` prints the measured distances.
"""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the oracle needs torch")
pytest.importorskip("transformers", minversion="5.23", reason="the oracle needs transformers 5.23 or newer")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from qwen35_jax.model import abstract_state  # noqa: E402
from qwen35_jax.ops.segments import segment_positions  # noqa: E402
from tests.oracle import compare, hf_models  # noqa: E402
from tests.oracle.reference import CHUNK, LENGTHS, NEW_TOKENS, TOKENS  # noqa: E402

MODELS = ("dense", "dense_tied", "dense_ratio3", "yarn", "moe", "moe_tied_mtp", "attention_only")
DOCUMENTS = ((173, 2, 300, 125), (1, 64, 320, 3, 212))  # packed in two rows
LAYER_LIMIT = 1e-4  # relative error of the residual stream; float32 sums in another order give 1e-6 to 1e-5
BF16_FACTOR = 1.2


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_layers(references, models, name):
    """All tokens at once, and what every layer leaves in the residual stream. A failure names the first that is off."""
    reference, lm = references(name), models(name)
    expected, expected_layers = hf_models.full_forward(reference.oracle, torch.tensor(reference.ids[:2]), layers=True)
    logits, layers = lm.logits(reference.ids[:2], layers=True)
    errors = compare.layer_errors(expected_layers, layers)
    report = compare.layer_report(errors, reference.oracle.text_model.config.layer_types, LAYER_LIMIT)
    print(f"{name}, relative errors of the layers: {', '.join(f'{relative:.1e}' for relative, _ in errors)}")
    assert all(relative < LAYER_LIMIT for relative, _ in errors), report
    try:
        compare.check(expected, logits, f"{name}, all at once")
    except AssertionError as e:
        raise AssertionError(f"{e}\n{report}") from None


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens(references, models, name):
    reference, lm = references(name), models(name)
    error = compare.check(reference.full[:2], lm.logits(reference.ids[:2]), name).error
    prompts = [reference.prompt(row, TOKENS) for row in (0, 1)]
    for chunk in (CHUNK, 2048) if name in ("dense", "moe") else (CHUNK,):
        answers = lm.generate(prompts, max_new_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, prefill_chunk=chunk)
        for row, answer in enumerate(answers):
            reference.check_greedy(row, TOKENS, answer.token_ids, f"{name}, chunks of {chunk}", error)


@pytest.mark.parametrize("name", MODELS)
def test_chunked_prefill_then_decode(references, models, name):
    """Every token through the decoding state: chunks of 190, then one token at a time, logits of each."""
    reference, lm = references(name), models(name)
    logits = _through_state(lm.model, lm.params, reference.ids[:2], [190] * 3 + [1] * 30)
    compare.check(reference.full[:2], logits, f"{name}, chunks and steps")


@pytest.mark.parametrize("name", ("dense_tied", "moe_tied_mtp"))
def test_stacked_units(references, models, name):
    """The form that accelerators run: one tree with a unit axis, through `lax.scan`."""
    reference, lm = references(name), models(name)
    stacked = lm.params | {"units": jax.tree.map(lambda *x: jnp.stack(x), *lm.params["units"])}
    logits = _through_state(lm.model, stacked, reference.ids[:2], [200] * 3)
    compare.check(reference.full[:2], logits, f"{name}, stacked")


def _through_state(model, params: dict, ids: np.ndarray, pieces: list[int]) -> np.ndarray:
    """Logits [B, T, V] of ids [B, T] read piece by piece through the decoding state."""
    rows = ids.shape[0]
    stacked = not isinstance(params["units"], tuple)
    shapes = abstract_state(model.config, model.sharding, rows, ids.shape[1], stacked=stacked)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), shapes)

    @jax.jit
    def step(params, state, tokens, start):
        positions = start[:, None] + jnp.arange(tokens.shape[1])
        inputs = model.inputs(positions, jnp.ones_like(tokens), start=start)
        hidden, state = model.hidden(params, tokens, inputs, state)
        return model.logits(params, hidden), state

    logits, offset = [], 0
    for length in pieces:
        tokens = jnp.asarray(ids[:, offset : offset + length], jnp.int32)
        piece, state = step(params, state, tokens, jnp.full(rows, offset, jnp.int32))
        logits.append(np.asarray(piece))
        offset += length
    return np.concatenate(logits, axis=1)


@pytest.mark.parametrize("name", MODELS)
def test_right_padded_batch(references, models, name):
    reference, lm = references(name), models(name)
    segments, errors = (np.arange(TOKENS) < np.array(LENGTHS)[:, None]).astype(np.int32), []
    for rows in ([0, 1], [2, 3], [4, 0]):  # two at a time, as elsewhere: one compilation
        padded = np.where(segments[rows], reference.ids[rows], 0)
        logits = np.asarray(lm.logits(padded, segment_ids=segments[rows]))
        for row, ours in zip(rows, logits, strict=True):
            label = f"{name}, padded row of {LENGTHS[row]} tokens"
            errors.append(compare.check(reference.prompt_logits(row, LENGTHS[row]), ours[: LENGTHS[row]], label).error)
    prompts = [reference.prompt(row, length) for row, length in enumerate(LENGTHS)]
    answers = lm.generate(prompts, max_new_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, prefill_chunk=CHUNK)
    for row, answer in enumerate(answers):
        reference.check_greedy(row, LENGTHS[row], answer.token_ids, f"{name}, padded", max(errors))


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents(references, models, name):
    reference, lm = references(name), models(name)
    packed = [np.concatenate([reference.ids[i, :n] for i, n in enumerate(lengths)]) for lengths in DOCUMENTS]
    segments = np.array([np.repeat(np.arange(1, len(lengths) + 1), lengths) for lengths in DOCUMENTS])
    assert segments.shape == (2, TOKENS)
    logits = np.asarray(lm.logits(np.array(packed), segment_ids=segments))
    for row, lengths in enumerate(DOCUMENTS):
        for i, length in enumerate(lengths):
            ours = logits[row, segments[row] == i + 1]
            compare.check(reference.prompt_logits(i, length), ours, f"{name}, packed document of {length} tokens")


@pytest.mark.parametrize("name", ("dense_tied", "moe_tied_mtp"))
def test_multi_token_prediction(references, models, name):
    """The layer that transformers drops, against the same composed of transformers' own blocks."""
    reference, lm = references(name), models(name)
    expected = hf_models.mtp_logits(reference.oracle, torch.tensor(reference.ids[:2])).numpy()

    @jax.jit
    def predict(params, ids):
        segments = jnp.ones_like(ids)
        inputs = lm.model.inputs(segment_positions(segments), segments)
        hidden, _ = lm.model.hidden(params, ids, inputs)
        following = jnp.roll(ids, -1, axis=1)
        return lm.model.logits(params, lm.model.mtp_hidden(params, hidden, following, inputs)[0])

    logits = predict(lm.params, jnp.asarray(reference.ids[:2], jnp.int32))
    compare.check(expected, np.asarray(logits)[:, :-1], f"{name}, multi-token prediction")


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_as_close_as_transformers(references, models, name):
    reference = references(name)
    expected, ids = reference.full[:2], reference.ids[:2]
    rounded = hf_models.to_bfloat16(reference.oracle)
    theirs = hf_models.full_forward(rounded, torch.tensor(ids)).float().numpy()
    ours = models(name, dtype="bfloat16").logits(ids)
    distance, allowed = compare.kl(expected, ours).mean(), BF16_FACTOR * compare.kl(expected, theirs).mean()
    print(f"{name}, bf16: mean KL to fp32 {distance:.3e}; transformers' is {allowed / BF16_FACTOR:.3e}")
    assert distance <= allowed
