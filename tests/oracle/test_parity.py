"""The model against transformers, live: small random models of every kind, 600 tokens, every path and mesh.

The numbers of the oracle are computed once a session. `pytest tests/oracle -s` prints the measured distances.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the oracle needs torch")
pytest.importorskip("transformers", minversion="5.23", reason="the oracle needs transformers 5.23 or newer")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import qwen35_jax  # noqa: E402
from qwen35_jax.generate.steps import segment_positions  # noqa: E402
from qwen35_jax.model import abstract_state  # noqa: E402
from tests.oracle import compare, hf_models  # noqa: E402

TOKENS, NEW_TOKENS = 600, 48
MODELS = ("dense", "dense_tied", "dense_ratio3", "yarn", "moe", "moe_tied_mtp", "attention_only")
MESHES = ("1x1", "8x1", "4x2", "2x4", "1x8", "2x2x2")
MESH_MODELS = ("mesh_dense", "mesh_moe", "mesh_dense_repeat", "mesh_moe_repeat")
LENGTHS = (600, 371, 64, 5, 1)  # prompts of a right-padded batch
DOCUMENTS = (173, 2, 300, 125)  # packed in one row
BF16_FACTOR = 1.2


class Reference:
    """What the oracle says about one case, and the checkpoint directory that says the same to us."""

    def __init__(self, name: str, directory):
        self.case = hf_models.CASES[name]
        self.oracle = hf_models.build(self.case)
        self.directory = str(directory)
        hf_models.save(self.oracle, directory)
        self.prompt_logits = functools.cache(self.prompt_logits)
        self.greedy = functools.cache(self.greedy)

    @functools.cached_property
    def ids(self) -> np.ndarray:
        """Token ids [5, TOKENS]; most tests use the first two rows."""
        return hf_models.random_tokens(self.case, (len(LENGTHS), TOKENS), seed=17).numpy()

    @functools.cached_property
    def full(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits of all rows, and the hidden states of the first two."""
        logits = hf_models.full_forward(self.oracle, torch.tensor(self.ids))
        _, hidden = hf_models.full_forward(self.oracle, torch.tensor(self.ids[:2]), layers=True)
        return logits.numpy(), [x.numpy() for x in hidden]

    def logits(self, ids) -> np.ndarray:
        """Logits [T, V] of one sequence."""
        return hf_models.full_forward(self.oracle, torch.tensor(np.asarray(ids))[None])[0].numpy()

    def prompt(self, row: int, length: int) -> list[int]:
        return self.ids[row, :length].tolist()

    def prompt_logits(self, row: int, length: int) -> np.ndarray:
        return self.logits(self.prompt(row, length))

    def greedy(self, row: int, length: int) -> list[int]:
        """What the oracle says after the first `length` tokens of a row."""
        return hf_models.greedy(self.oracle, torch.tensor(self.ids[row : row + 1, :length]), NEW_TOKENS)[0].tolist()

    def check_greedy(self, row: int, length: int, tokens: list[int], label: str) -> None:
        """Fails unless `tokens` follow prompt `row` of `length` tokens as the oracle's own do (near ties aside)."""
        prompt = self.prompt(row, length)
        said = functools.partial(self._logits_before, prompt)
        compare.check_greedy(self.greedy(row, length), tokens, said, f"{label}, row {row} of {length} tokens")

    def _logits_before(self, prompt: list[int], tokens: list[int]) -> np.ndarray:
        return self.logits(prompt + tokens)[len(prompt) - 1 : -1]


@pytest.fixture(scope="session")
def references(tmp_path_factory):
    """Name of a case -> Reference."""
    torch.set_num_threads(2)
    return functools.cache(lambda name: Reference(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def models(references):
    """(name, mesh, dtype) -> the loaded LanguageModel."""

    @functools.cache
    def load(name: str, mesh: str = "1x1", dtype: str = "float32") -> qwen35_jax.LanguageModel:
        return qwen35_jax.load(references(name).directory, mesh=mesh, dtype=dtype)

    return load


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_layers(references, models, name):
    reference, lm = references(name), models(name)
    expected, hidden = reference.full
    logits, layers = lm.logits(reference.ids[:2], layers=True)
    kinds = reference.oracle.text_model.config.layer_types
    report = compare.layer_report(hidden, layers, kinds)
    assert report.startswith("first bad: none"), report
    compare.check(expected[:2], logits, f"{name}, all at once")


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens(references, models, name):
    reference, lm = references(name), models(name)
    prompts = [reference.prompt(row, TOKENS) for row in (0, 1)]
    for chunk in (2048, 256):
        answers = lm.generate(prompts, max_new_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, prefill_chunk=chunk)
        for row, answer in enumerate(answers):
            reference.check_greedy(row, TOKENS, answer.token_ids, f"{name}, chunks of {chunk}")


@pytest.mark.parametrize("name", MODELS)
def test_chunked_prefill_then_decode(references, models, name):
    """Every token through the decoding state: chunks of 200, then one token at a time, logits of each."""
    reference, lm = references(name), models(name)
    expected, _ = reference.full
    logits = _through_state(lm, reference.ids[:2], [200, 200, 170] + [1] * 30)
    compare.check(expected[:2], logits, f"{name}, chunks and steps")


def _through_state(lm, ids: np.ndarray, pieces: list[int]) -> np.ndarray:
    """Logits [B, T, V] of ids [B, T] read piece by piece through the decoding state."""
    rows, model = ids.shape[0], lm.model
    shapes = abstract_state(model.config, model.sharding, rows, ids.shape[1])
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
        piece, state = step(lm.params, state, tokens, jnp.full(rows, offset, jnp.int32))
        logits.append(np.asarray(piece))
        offset += length
    return np.concatenate(logits, axis=1)


@pytest.mark.parametrize("name", ("dense", "moe_tied_mtp"))
def test_right_padded_batch(references, models, name):
    reference, lm = references(name), models(name)
    prompts = [reference.prompt(row, length) for row, length in enumerate(LENGTHS)]
    segments = (np.arange(TOKENS) < np.array(LENGTHS)[:, None]).astype(np.int32)
    logits = np.asarray(lm.logits(np.where(segments, reference.ids, 0), segment_ids=segments))
    for row, length in enumerate(LENGTHS):
        ours = logits[row, :length]
        compare.check(reference.prompt_logits(row, length), ours, f"{name}, padded row of {length} tokens")
    for chunk in (2048, 128):
        answers = lm.generate(prompts, max_new_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, prefill_chunk=chunk)
        for row, answer in enumerate(answers):
            reference.check_greedy(row, LENGTHS[row], answer.token_ids, f"{name}, padded, chunks of {chunk}")


@pytest.mark.parametrize("name", ("dense", "yarn", "moe_tied_mtp"))
def test_packed_documents(references, models, name):
    reference, lm = references(name), models(name)
    packed = np.concatenate([reference.ids[row, :length] for row, length in enumerate(DOCUMENTS)])
    segments = np.repeat(np.arange(1, len(DOCUMENTS) + 1), DOCUMENTS)
    assert packed.shape == (TOKENS,)
    logits = np.asarray(lm.logits(packed[None], segment_ids=segments[None]))[0]
    for row, length in enumerate(DOCUMENTS):
        ours = logits[segments == row + 1]
        compare.check(reference.prompt_logits(row, length), ours, f"{name}, packed document of {length} tokens")


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


@pytest.mark.parametrize("name", ("dense", "dense_tied", "moe"))
def test_bfloat16_is_as_close_as_transformers(references, models, name):
    reference = references(name)
    expected, _ = reference.full
    rounded = hf_models.to_bfloat16(reference.oracle)
    theirs = hf_models.full_forward(rounded, torch.tensor(reference.ids)).float().numpy()
    ours = models(name, dtype="bfloat16").logits(reference.ids)
    distance, allowed = compare.kl(expected, ours).mean(), BF16_FACTOR * compare.kl(expected, theirs).mean()
    print(f"{name}, bf16: mean KL to fp32 {distance:.3e}; transformers' is {allowed / BF16_FACTOR:.3e}")
    assert distance <= allowed


@pytest.mark.parametrize("name", MESH_MODELS)
@pytest.mark.parametrize("mesh", MESHES)
def test_meshes(references, models, mesh, name):
    """One prompt and five, on meshes whose shards divide the heads (and experts) or repeat them."""
    reference = references(name)
    if name == "mesh_moe_repeat" and mesh == "8x1":
        with pytest.raises(qwen35_jax.UserError, match="num_experts"):
            models(name, mesh)
        return
    lm = models(name, mesh)
    expected, _ = reference.full
    for rows in (1, len(LENGTHS)):
        compare.check(expected[:rows], lm.logits(reference.ids[:rows]), f"{name} on {mesh}, {rows} rows")
        prompts = [reference.prompt(row, length) for row, length in enumerate(LENGTHS[:rows])]
        answers = lm.generate(prompts, max_new_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
        for row, answer in enumerate(answers):
            reference.check_greedy(row, LENGTHS[row], answer.token_ids, f"{name} on {mesh}, {rows} prompts")
