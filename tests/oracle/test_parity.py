"""The model against transformers, live: small random models of every kind, 600 tokens, every path and mesh.

The numbers of the oracle are computed once a session. `pytest tests/oracle -s` prints the measured distances.
"""

from __future__ import annotations

import functools
import gc

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the oracle needs torch")
pytest.importorskip("transformers", minversion="5.23", reason="the oracle needs transformers 5.23 or newer")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import qwen35_jax  # noqa: E402
from qwen35_jax.model import abstract_state  # noqa: E402
from qwen35_jax.ops.segments import segment_positions  # noqa: E402
from tests.conftest import many_mappings  # noqa: E402
from tests.oracle import compare, hf_models  # noqa: E402

TOKENS, NEW_TOKENS = 600, 48
MODELS = ("dense", "dense_tied", "dense_ratio3", "yarn", "moe", "moe_tied_mtp", "attention_only")
MESHES = ("1x1", "8x1", "4x2", "2x4", "1x8", "2x2x2")
MESH_MODELS = ("mesh_dense", "mesh_moe", "mesh_dense_repeat", "mesh_moe_repeat")
LENGTHS = (600, 371, 64, 5, 1)  # prompts of a right-padded batch
DOCUMENTS = ((173, 2, 300, 125), (1, 64, 320, 3, 212))  # packed in two rows
CHUNK = 200
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
    def full(self) -> np.ndarray:
        """Logits [5, TOKENS, V] of all rows."""
        return hf_models.full_forward(self.oracle, torch.tensor(self.ids)).numpy()

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
    torch.set_num_threads(1)  # the models are tiny
    return functools.cache(lambda name: Reference(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def models(references):
    """(name, mesh, dtype) -> the loaded LanguageModel."""

    @functools.cache
    def load(name: str, mesh: str = "1x1", dtype: str = "float32") -> qwen35_jax.LanguageModel:
        return qwen35_jax.load(references(name).directory, mesh=mesh, dtype=dtype)

    return load


@pytest.fixture(autouse=True)
def forget_programs(models):
    """Lets go of the models when the process has many memory mappings: Linux allows 65,530, XLA:CPU takes several a kernel,
    and what asks for one more crashes."""
    yield
    if many_mappings():
        models.cache_clear()
        jax.clear_caches()
        gc.collect()


@pytest.mark.parametrize("name", MODELS)
def test_logits(references, models, name):
    """All tokens at once. A failure names the layer where the numbers part."""
    reference, lm = references(name), models(name)
    try:
        compare.check(reference.full[:2], lm.logits(reference.ids[:2]), f"{name}, all at once")
    except AssertionError as e:
        _, hidden = hf_models.full_forward(reference.oracle, torch.tensor(reference.ids[:2]), layers=True)
        _, layers = lm.logits(reference.ids[:2], layers=True)
        kinds = reference.oracle.text_model.config.layer_types
        raise AssertionError(f"{e}\n{compare.layer_report(hidden, layers, kinds)}") from None


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens(references, models, name):
    reference, lm = references(name), models(name)
    prompts = [reference.prompt(row, TOKENS) for row in (0, 1)]
    for chunk in (CHUNK, 2048) if name in ("dense", "moe") else (CHUNK,):
        answers = lm.generate(prompts, max_new_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, prefill_chunk=chunk)
        for row, answer in enumerate(answers):
            reference.check_greedy(row, TOKENS, answer.token_ids, f"{name}, chunks of {chunk}")


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


@pytest.mark.parametrize("name", ("dense", "moe_tied_mtp"))
def test_right_padded_batch(references, models, name):
    reference, lm = references(name), models(name)
    segments = (np.arange(TOKENS) < np.array(LENGTHS)[:, None]).astype(np.int32)
    for rows in ([0, 1], [2, 3], [4, 0]):  # two at a time, as elsewhere: one compilation
        padded = np.where(segments[rows], reference.ids[rows], 0)
        logits = np.asarray(lm.logits(padded, segment_ids=segments[rows]))
        for row, ours in zip(rows, logits, strict=True):
            label = f"{name}, padded row of {LENGTHS[row]} tokens"
            compare.check(reference.prompt_logits(row, LENGTHS[row]), ours[: LENGTHS[row]], label)
    prompts = [reference.prompt(row, length) for row, length in enumerate(LENGTHS)]
    answers = lm.generate(prompts, max_new_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, prefill_chunk=CHUNK)
    for row, answer in enumerate(answers):
        reference.check_greedy(row, LENGTHS[row], answer.token_ids, f"{name}, padded")


@pytest.mark.parametrize("name", ("dense", "yarn", "moe_tied_mtp"))
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


@pytest.mark.parametrize("name", ("dense", "dense_tied", "moe"))
def test_bfloat16_is_as_close_as_transformers(references, models, name):
    reference = references(name)
    expected, ids = reference.full[:2], reference.ids[:2]
    rounded = hf_models.to_bfloat16(reference.oracle)
    theirs = hf_models.full_forward(rounded, torch.tensor(ids)).float().numpy()
    ours = models(name, dtype="bfloat16").logits(ids)
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
    compare.check(reference.full, lm.logits(reference.ids), f"{name} on {mesh}")
    for rows in (1, len(LENGTHS)):
        prompts = [reference.prompt(row, length) for row, length in enumerate(LENGTHS[:rows])]
        answers = lm.generate(prompts, max_new_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, prefill_chunk=CHUNK)
        for row, answer in enumerate(answers):
            reference.check_greedy(row, LENGTHS[row], answer.token_ids, f"{name} on {mesh}, {rows} prompts")
