"""The packaged model, loaded by transformers from the same directory: the same prompts, the same greedy text."""

from __future__ import annotations

import pytest

import qwen35_jax
from qwen35_jax.config import ASSETS
from scripts import tiny_tools

torch = pytest.importorskip("torch", reason="the oracle needs torch")
transformers = pytest.importorskip("transformers", minversion="5.23", reason="the oracle needs transformers 5.23 or newer")

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
    model, report = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
    return model, transformers.AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def ours():
    """The completion of each chat; one batch, since that is one compilation."""
    lm = qwen35_jax.load("tiny", dtype="float32")
    prompts = [lm.encode([{"role": "user", "content": question}], **options) for question, options in CHATS]
    return lm.generate(prompts, max_new_tokens=NEW_TOKENS, temperature=0.0)


@pytest.mark.parametrize("index", range(len(CHATS)), ids=[question for question, _ in CHATS])
def test_greedy_text(theirs, ours, index):
    (model, tokenizer), done, (question, options) = theirs, ours[index], CHATS[index]
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True, **options)
    assert done.prompt_token_ids == prompt["input_ids"][0].tolist()
    with torch.inference_mode():
        expected = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(done.prompt_token_ids) :].tolist()
    assert done.token_ids == expected, (done.text, tokenizer.decode(expected))
    assert done.finish_reason == "stop"
