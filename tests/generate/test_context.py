"""Generation with sequences cut over `data`: the same logits and text as on one device, whatever the cuts go through."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import qwen35_jax
from qwen35_jax import UserError
from qwen35_jax.generate.generation import context_buckets
from qwen35_jax.ops.forms import Forms
from tests.generate.conftest import small_model
from tests.generate.test_generation import GREEDY, prompt
from tests.vision_checkpoint import picture, write_checkpoint

CASES = [  # mesh, whether the model is dense
    ("8x1", False),
    *(pytest.param(mesh, False, marks=pytest.mark.slow) for mesh in ("2x1", "4x2", "2x2x2")),
    *(pytest.param(mesh, True, marks=pytest.mark.slow) for mesh in ("2x1", "4x2", "8x1", "2x2x2")),
]
TEXTS = [  # mesh, tokens of a prefill
    ("4x2", 48),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (("2x1", 48), ("8x1", 48), ("2x2x2", 48), ("8x1", 2048))),
]
LENGTHS = (120, 3, 96, 65)  # of prompts that end in any shard of a prefill, or after several
TIME = 61  # is filled up to 64, which 2, 4 and 8 shards divide
ROWS = [[5, 11, 40, 5], [16, 16, 8, 8], [29], [1, 60]]  # documents of rows: across cuts, up to cuts, padding behind


def documents() -> np.ndarray:
    rows = [np.repeat(np.arange(1, len(row) + 1), row) for row in ROWS]
    return np.stack([np.pad(row, (0, TIME - len(row))) for row in rows])


@pytest.mark.parametrize(("mesh", "dense"), CASES)
def test_logits(mesh, dense):
    tokens, ids = np.random.default_rng(0).integers(0, 4000, (len(ROWS), TIME)), documents()
    want = np.asarray(small_model(dense=dense).logits(tokens, segment_ids=ids))
    got = np.asarray(small_model(mesh, context_parallel=True, dense=dense).logits(tokens, segment_ids=ids))
    np.testing.assert_allclose(got[ids > 0], want[ids > 0], atol=2e-5 * np.abs(want).max(), rtol=0)


def test_logits_with_all_that_cuts():
    """Weights fully sharded, units scanned, and rows sent to their experts from shards of the sequence."""
    tokens, ids = np.random.default_rng(0).integers(0, 4000, (len(ROWS), TIME)), documents()
    want = np.asarray(small_model().logits(tokens, segment_ids=ids))
    cut = small_model("4x2", True, True, fully_sharded=True, forms=Forms(moe="all_to_all"))
    got = np.asarray(cut.logits(tokens, segment_ids=ids))
    np.testing.assert_allclose(got[ids > 0], want[ids > 0], atol=2e-5 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize(("mesh", "chunk"), TEXTS)
def test_text(tiny, mesh, chunk):
    """Answers that go on over many blocks of the cache."""
    prompts = [prompt(n, n) for n in LENGTHS]
    options = {"max_new_tokens": 24, "seed": [1, 2, 3, 4], "temperature": 1.0, "top_k": 20, "ignore_eos": True}
    expected = [d.token_ids for d in tiny.generate(prompts, **options)]
    cut = small_model(mesh, context_parallel=True)
    assert [d.token_ids for d in cut.generate(prompts, prefill_chunk=chunk, **options)] == expected


@pytest.mark.slow
def test_text_of_a_dense_model_in_a_scan():
    ids = [prompt(150)]
    expected = small_model(dense=True).generate(ids, max_new_tokens=12, **GREEDY)
    cut = small_model("4x2", True, context_parallel=True, dense=True)
    assert cut.generate(ids, max_new_tokens=12, prefill_chunk=64, **GREEDY) == expected


def test_a_penalty_knows_the_whole_prompt(tiny):
    """Each shard sees its own tokens of the prompt; a repetition penalty is about all of them."""
    prompts = [prompt(n, n) for n in LENGTHS]
    options = {"max_new_tokens": 24, "temperature": 0.0, "repetition_penalty": 1e6, "ignore_eos": True}
    done = small_model("4x2", context_parallel=True).generate(prompts, prefill_chunk=48, **options)
    assert [d.token_ids for d in done] == [d.token_ids for d in tiny.generate(prompts, **options)]
    assert not any(set(d.token_ids) & set(ids) for d, ids in zip(done, prompts, strict=True))


def test_every_device_holds_its_part_of_the_cache():
    sizes = {}
    for mesh in ("1x1", "8x1"):
        lm = small_model(mesh, context_parallel=mesh != "1x1")
        lm.generate([prompt(500)], max_new_tokens=4, **GREEDY)
        sizes[mesh] = lm.stats()["state_bytes_per_device"]
    shapes = dataclasses.asdict(lm.config)
    units, heads, width = lm.config.num_units, shapes["num_key_value_heads"], shapes["head_dim"]
    saved = 2 * units * heads * width * 4 * 512 * 7 // 8  # k and v in float32 of 512 places
    assert sizes["1x1"] - sizes["8x1"] == saved


@pytest.mark.slow
def test_more_tokens_than_the_model_has_positions():
    """With YaRN, in prefills of 4,096 tokens, the fourth of which is not full."""
    ids, options = [prompt(13000)], {"max_new_tokens": 8, "prefill_chunk": 4096, **GREEDY}
    whole = qwen35_jax.load("tiny", "1x1", "float32", yarn=2)
    cut = qwen35_jax.load("tiny", "8x1", "float32", context_parallel=True, yarn=2)
    assert cut.config.max_position_embeddings == 2 * 8192
    assert cut.generate(ids, **options) == whole.generate(ids, **options)


@pytest.mark.slow
def test_an_image_that_lies_across_shards(tmp_path):
    """Its rows, its places in three axes and those of the text behind it, whole and cut by a prefill too."""
    directory = write_checkpoint(tmp_path / "model")
    whole = qwen35_jax.load(directory, "1x1", "float32")
    cut = qwen35_jax.load(directory, "4x1", "float32", context_parallel=True)
    parts = [{"type": "text", "text": "See "}, {"type": "image", "image": picture(56, 64)}, {"type": "text", "text": "?"}]
    chat = [{"role": "user", "content": parts}]
    options = {"max_new_tokens": 6, **GREEDY}
    (expected,) = whole.generate([chat], **options)
    for chunk in (64, 2048):
        assert cut.generate([chat], prefill_chunk=chunk, **options)[0].token_ids == expected.token_ids
    ids = [expected.prompt_token_ids + expected.token_ids]
    want, got = (np.asarray(lm.logits(ids, images=[picture(56, 64)])) for lm in (whole, cut))
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize(
    ("length", "chunk", "shards", "expected"),
    [(70, 2048, 8, [128]), (3, 2048, 64, [192]), (100, 48, 8, [48] * 3), (100, 50, 8, [56] * 2), (2048, 2048, 8, [2048])],
)
def test_prefills_are_alike_and_divisible(length, chunk, shards, expected):
    assert context_buckets(length, chunk, shards) == expected


def test_a_mesh_without_data_shards():
    with pytest.raises(UserError, match="cuts sequences over `data`, which is 1 in mesh 1x1x8: use one such as 8x1"):
        qwen35_jax.load("tiny", "1x8", context_parallel=True)
