"""Generation through the Python door: batches, buckets, stopping, streaming, determinism, and what is recompiled."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen35_jax import UserError
from qwen35_jax.generate.generation import capacity_bucket, prompt_buckets, slot_bucket
from qwen35_jax.text import GenerationConfig

GREEDY = {"temperature": 0.0, "ignore_eos": True}


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 4000, length).tolist()


@given(st.integers(1, 20000), st.sampled_from([1, 48, 64, 512, 2048]))
def test_prompt_buckets_cover_the_prompt_with_few_lengths(length, chunk):
    buckets = prompt_buckets(length, chunk)
    assert sum(buckets) >= length > sum(buckets[:-1])
    assert all(b == chunk for b in buckets[:-1]) and buckets[-1] <= chunk
    assert buckets[-1] == chunk or buckets[-1] in (64, 128, 256, 512, 1024)


@given(st.integers(1, 2_000_000))
def test_capacity_wastes_at_most_a_quarter(tokens):
    capacity = capacity_bucket(tokens)
    assert 0 <= capacity - tokens < max(64, tokens / 4)


@given(st.integers(1, 300), st.sampled_from([1, 2, 4, 8]))
def test_slots_cover_the_rows_alike_on_every_shard(rows, shards):
    slots = slot_bucket(rows, shards)
    assert slots >= rows and slots % shards == 0 and slots < 2 * max(rows, shards)


def test_greedy_answer_is_the_argmax_of_the_full_forward_pass(tiny):
    ids = prompt(70)
    (done,) = tiny.generate([ids], max_new_tokens=12, **GREEDY)
    logits = np.asarray(tiny.logits([ids + done.token_ids]))[0, :, : tiny.vocabulary]
    assert logits.argmax(-1)[69:-1].tolist() == done.token_ids
    assert done.prompt_token_ids == ids and done.finish_reason == "length"


def test_chunked_prefill_and_unequal_batches_change_nothing(tiny):
    prompts = [prompt(n, n) for n in (120, 3, 64, 65, 1)]
    alone = [tiny.generate([p], max_new_tokens=8, prefill_chunk=64, **GREEDY)[0].token_ids for p in prompts]
    together = tiny.generate(prompts, max_new_tokens=8, **GREEDY)
    chunked = tiny.generate(prompts, max_new_tokens=8, prefill_chunk=64, **GREEDY)
    assert [d.token_ids for d in together] == alone
    assert [d.token_ids for d in chunked] == alone


def test_a_stacked_tree_says_the_same_as_an_unrolled_one(tiny, tiny_on):
    ids = prompt(40)
    stacked = tiny_on("1x1", True).generate([ids], max_new_tokens=8, **GREEDY)
    assert stacked[0].token_ids == tiny.generate([ids], max_new_tokens=8, **GREEDY)[0].token_ids


@pytest.mark.parametrize("mesh", ["2x2x2", *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("8x1", "1x8"))])
def test_meshes_say_the_same(tiny, tiny_on, mesh):
    prompts = [prompt(n, n) for n in (40, 3, 64, 17, 1)]
    options = {"max_new_tokens": 8, "seed": [1, 2, 3, 4, 5], "temperature": 1.0, "top_k": 20, "ignore_eos": True}
    expected = [d.token_ids for d in tiny.generate(prompts, **options)]
    assert [d.token_ids for d in tiny_on(mesh).generate(prompts, **options)] == expected


def test_nothing_is_compiled_again_for_other_prompts_and_settings(tiny):
    tiny.generate([prompt(30), prompt(9)], max_new_tokens=30, **GREEDY)
    before, compiled = tiny.programs.count, []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    tiny.generate([prompt(50), prompt(2)], max_new_tokens=9, temperature=0.7, top_p=0.9, seed=4)
    tiny.generate([prompt(60), prompt(61)], max_new_tokens=3, top_k=5, presence_penalty=1.0, repetition_penalty=1.2)
    tiny.generate([prompt(1), prompt(1)], max_new_tokens=1, min_p=0.1, stop=["x"])
    assert tiny.programs.count == before and compiled == []
    tiny.generate([prompt(3)], max_new_tokens=1, prefill_chunk=16)  # a length that no other test uses
    assert compiled  # the listener hears what is compiled


def test_decode_is_not_compiled_for_one_token(tiny):
    prompts, before = [prompt(3)] * 9, tiny.programs.count  # so many rows in no other test
    one = tiny.generate(prompts, max_new_tokens=1, **GREEDY)
    assert tiny.programs.count - before == 3  # prefill, an empty state, the first token
    two = tiny.generate(prompts, max_new_tokens=2, **GREEDY)
    assert tiny.programs.count - before == 4
    assert [d.token_ids for d in one] == [d.token_ids[:1] for d in two]


def test_sampling_is_reproducible_and_depends_on_the_seed(tiny):
    options = {"max_new_tokens": 16, "temperature": 1.0, "top_k": 20, "ignore_eos": True}
    first, again, other = (tiny.generate([prompt(20)], seed=s, **options)[0].token_ids for s in (1, 1, 2))
    assert first == again != other
    both = tiny.generate([prompt(20), prompt(20)], seed=[1, 2], **options)
    assert [d.token_ids for d in both] == [first, other]


def test_ids_beyond_the_tokenizer_are_never_chosen(tiny_on):
    lm = tiny_on()
    limit, lm.programs.vocabulary = lm.programs.vocabulary, 5
    try:
        (done,) = lm.generate([prompt(10)], max_new_tokens=40, temperature=5.0, top_k=0, top_p=1.0, ignore_eos=True)
    finally:
        lm.programs.vocabulary = limit
    assert set(done.token_ids) <= set(range(5)) and len(set(done.token_ids)) > 2


def test_end_tokens_stop_a_row_and_not_its_neighbour(tiny):
    ids = [prompt(20, s) for s in (1, 2)]
    free = tiny.generate(ids, max_new_tokens=10, **GREEDY)
    end = next(t for t in free[0].token_ids if t not in free[1].token_ids)
    at = free[0].token_ids.index(end)
    defaults = tiny.defaults
    tiny.defaults = type(defaults)(eos_token_ids=(4090, end))
    try:
        stopped = tiny.generate(ids, max_new_tokens=10, temperature=0.0)
    finally:
        tiny.defaults = defaults
    assert stopped[0].token_ids == free[0].token_ids[: at + 1] and stopped[0].finish_reason == "stop"
    assert stopped[1].token_ids == free[1].token_ids and stopped[1].finish_reason == "length"


def test_stop_strings_and_streaming(tiny):
    options = {"max_new_tokens": 30, "seed": 3, "temperature": 1.0, "ignore_eos": True}
    (free,) = tiny.generate(["hello"], **options)
    stop = free.text[5:8]
    (stopped,) = tiny.generate(["hello"], stop=[stop, "never this one"], **options)
    assert stopped.text == free.text[: free.text.index(stop)] and stopped.finish_reason == "stop"
    pieces = list(tiny.stream(["hello"], **options))
    assert "".join(p.text for p in pieces) == free.text and pieces[-1].finish_reason == "length"
    assert [t for p in pieces for t in p.token_ids] == free.token_ids
    assert len(pieces) > 2


def test_chats_go_through_the_template(tiny):
    chat = [{"role": "user", "content": "Hi"}]
    ids = tiny.encode(chat)
    assert tiny.tokenizer.decode(ids, skip_special_tokens=False).startswith("<|im_start|>user\nHi<|im_end|>\n")
    thinking = tiny.encode(chat, enable_thinking=True)
    assert thinking != ids
    (done,) = tiny.generate([chat], max_new_tokens=2, enable_thinking=True)
    assert done.prompt_token_ids == thinking
    for options, prompt in (({"preset": "thinking"}, thinking), ({"preset": "thinking", "enable_thinking": False}, ids)):
        assert tiny.generate([chat], max_new_tokens=2, **options)[0].prompt_token_ids == prompt


def test_presets_and_overrides(tiny):
    assert tiny.sampling("instruct").temperature == 0.7
    assert tiny.sampling("instruct", temperature=0.2, top_k=None).temperature == 0.2
    assert tiny.sampling("instruct", top_k=None).top_k == 20
    with pytest.raises(UserError, match="unknown; there are"):
        tiny.sampling("wild")


def test_greedy_defaults_give_way_to_what_only_drawing_uses(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "defaults", GenerationConfig(do_sample=False, temperature=0.6))
    assert tiny.sampling().temperature == tiny.sampling(presence_penalty=1.0).temperature == 0.0
    assert tiny.sampling(temperature=0.3).temperature == 0.3
    for option in ({"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}):
        assert tiny.sampling(**option).temperature == 0.6
    assert tiny.sampling(top_k=0, top_p=1.0, min_p=0.0).temperature == 0.0  # all of them off


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, "a prompt is empty"),
        ([""], {}, "a prompt is empty"),
        ([], {}, "no prompt"),
        ([[5000]], {}, "token id 5000 is not in the vocabulary"),
        ([[-1]], {}, "token id -1"),
        ([[1] * 512], {}, "512 tokens, but the context is 512"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"temperature": -1.0}, "temperature is -1.0"),
        ([[1]], {"seed": [1, 2]}, "2 seeds for 1 prompts"),
        ([[1]], {"prefill_chunk": 0}, "prefill_chunk is 0"),
        ([[1]], {"stop": [""]}, "stop string"),
        ([[{"role": "cook", "content": "x"}]], {}, "role"),
        (None, {}, "prompts must be a string, a list of token ids"),
        ([1.5], {}, "a prompt must be a string, a list of token ids .* not float"),
        ([[1.5]], {}, "a prompt must be a string"),
        ([[1]], {"max_new_tokens": 1.5}, "max_new_tokens is 1.5; it must be a whole number"),
        ([[1]], {"seed": 1.7}, "seed is 1.7; it must be a whole number"),
        ([[1]], {"temperature": "hot"}, "temperature is 'hot'; it must be a number"),
        ([[1]], {"top_k": 2.5}, "top_k is 2.5; it must be a whole number"),
        (["x"], {"tools": []}, "tools is for chats"),
    ],
)
def test_bad_requests_are_one_line(tiny, prompts, options, message):
    with pytest.raises(UserError, match=message) as error:
        tiny.generate(prompts, **options)
    assert "\n" not in str(error.value)


def test_the_context_limits_the_answer(tiny):
    tokens = tiny.config.context_length - 3
    (done,) = tiny.generate([[1] * tokens], max_new_tokens=50, **GREEDY)
    assert len(done.token_ids) == 3 and done.finish_reason == "length"


def test_yarn_stretches_the_context(tiny_on):
    lm = tiny_on(yarn=True)
    (done,) = lm.generate([[1] * 100], max_new_tokens=50, **GREEDY)
    assert len(done.token_ids) == 28 and done.finish_reason == "length"
    with pytest.raises(UserError, match="128 tokens, but the context is 128,"):
        lm.prepare([1] * 128)


def test_packed_documents_are_separate_documents(tiny):
    a, b = prompt(40, 1), prompt(50, 2)
    packed = np.asarray(tiny.logits([a + b], segment_ids=[[1] * 40 + [2] * 50]))[0]
    apart = np.concatenate([np.asarray(tiny.logits([x]))[0] for x in (a, b)])
    np.testing.assert_allclose(packed, apart, atol=2e-4)


@pytest.mark.parametrize("wrong", [[[0.5]], [1, 2], [[]], [[1, 2], [3]], np.zeros((1, 2, 3), int)])
def test_logits_refuse_what_are_no_token_ids(tiny, wrong):
    with pytest.raises(UserError, match="token_ids"):
        tiny.logits(wrong)


@pytest.mark.parametrize(
    "wrong", [[[2, 1, 0]], [[1, 0, 1]], [[-1, 1, 1]], [[1, 1]], [[1.0, 1.0, 1.0]], [[1], [1, 1]], np.uint8([[2, 1, 1]])]
)
def test_logits_refuse_what_are_no_segments(tiny, wrong):
    with pytest.raises(UserError, match="segment_ids"):
        tiny.logits([[1, 2, 3]], segment_ids=wrong)


def test_numpy_prompts(tiny):
    ids = np.array([[5, 6, 7], [8, 9, 10]])
    answers = [c.token_ids for c in tiny.generate(ids, max_new_tokens=2, **GREEDY)]
    assert answers == [c.token_ids for c in tiny.generate(ids.tolist(), max_new_tokens=2, **GREEDY)]
    assert tiny.encode(ids[0]) == [5, 6, 7]
