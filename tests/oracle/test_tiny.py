"""The packaged model, loaded by transformers from the same directory: the same prompts, the same greedy text."""

from __future__ import annotations

import random

import pytest

import qwen35_jax
from qwen35_jax.config import ASSETS
from scripts import tiny_scenes, tiny_tools

torch = pytest.importorskip("torch", reason="the oracle needs torch")
transformers = pytest.importorskip("transformers", minversion="5.23", reason="the oracle needs transformers 5.23 or newer")

from tests.oracle.hf_models import pictured_inputs  # noqa: E402

TINY = ASSETS / "tiny"
NEW_TOKENS = 120
# Every skill but the choice between tools: (question, options of the chat template).
CHATS = [
    ("What is 37 + 58?", {}),
    ("What is 37 + 58?", {"enable_thinking": True}),
    ("Subtract 88 from 41.", {"enable_thinking": True}),
    ("Repeat: k7m2", {}),
    ("Write backwards: rock white mouth fork", {}),
    ("What is the capital of France?", {}),
    ("Write a short story about a bird called Felix.", {}),
    ("Who are you?", {}),
    ("What is 848 * 25?", {"tools": [tiny_tools.CALCULATE]}),
]


@pytest.fixture(scope="module")
def theirs():
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
    return model, transformers.AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def lm():
    return qwen35_jax.load("tiny", dtype="float32")


@pytest.fixture(scope="module")
def scenes():
    """One held-out scene of each kind, pictures and clips."""
    return [tiny_scenes.scene(random.Random(f"oracle {kind}"), held=True, kind=kind) for kind in tiny_scenes.KINDS]


@pytest.fixture(scope="module")
def ours(lm, scenes):
    """(prompt, completion) of each chat and each scene; one batch, since that is one compilation."""
    prompts = [lm.prepare([{"role": "user", "content": question}], **options) for question, options in CHATS]
    for scene in scenes:
        content = [scene.part(lambda image: image), {"type": "text", "text": scene.asked[0].question}]
        prompts.append(lm.prepare([{"role": "user", "content": content}]))
    return list(zip(prompts, lm.generate(prompts, max_new_tokens=NEW_TOKENS, temperature=0.0), strict=True))


def check(theirs, inputs, done) -> None:
    model, tokenizer = theirs
    model.model.rope_deltas = None  # transformers keeps those of the last call
    assert done.prompt_token_ids == inputs["input_ids"][0].tolist()
    with torch.inference_mode():
        expected = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(done.prompt_token_ids) :].tolist()
    assert done.token_ids == expected, (done.text, tokenizer.decode(expected))
    assert done.finish_reason == "stop"


@pytest.mark.parametrize("index", range(len(CHATS)), ids=[question for question, _ in CHATS])
def test_greedy_text(theirs, ours, index):
    question, options = CHATS[index]
    chat = [{"role": "user", "content": question}]
    prompt = theirs[1].apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True, **options)
    check(theirs, prompt, ours[index][1])


@pytest.mark.parametrize("index", range(len(tiny_scenes.KINDS)), ids=list(tiny_scenes.KINDS))
def test_what_it_sees(theirs, ours, scenes, index):
    prompt, done = ours[len(CHATS) + index]
    config = theirs[0].config
    check(theirs, pictured_inputs(prompt, config.image_token_id, config.video_token_id), done)
    assert done.text == scenes[index].asked[0].answer
