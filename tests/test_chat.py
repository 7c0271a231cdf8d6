"""What a conversation keeps of its answers: the model here is one that says what it is told to."""

from __future__ import annotations

import types

import pytest

from qwen35_jax.chat import Chat
from qwen35_jax.generate import Piece
from qwen35_jax.generate.multimodal import Prepared


class Parrot:
    """A model whose prompts end in `opening`, and which answers with the given text."""

    def __init__(self, opening: str, answer: str):
        self.answer, self.seen = answer, []
        self.tokenizer = types.SimpleNamespace(decode=lambda ids, skip_special_tokens: opening)

    def prepare(self, messages, **_):
        self.seen.append(messages)
        return Prepared([1])

    def stream(self, prompts, **_):
        yield Piece(0, self.answer, [1])


@pytest.mark.parametrize(
    ("opening", "answer", "kept"),
    [
        ("<|im_start|>assistant\n", "Four.", {"content": "Four."}),
        ("<think>\n\n</think>\n\n", "Four </think>.", {"content": "Four </think>."}),
        ("<think>\n", "Two and two.\n</think>\n\nFour.", {"reasoning_content": "Two and two.", "content": "Four."}),
        ("<think>\n", "Two and", {"reasoning_content": "Two and", "content": ""}),  # cut off: nothing is said yet
    ],
)
def test_thoughts_are_not_answers(monkeypatch, opening, answer, kept):
    lines = iter(["What is 2 + 2?", "And now?", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    lm = Parrot(opening, answer)
    Chat(lm, None, None, {}, {}).run()
    asked = {"role": "user", "content": "What is 2 + 2?"}
    assert lm.seen[1][:2] == [asked, {"role": "assistant"} | kept]
