"""What the kinds of training data share: an exchange of question and answer, and which cases are kept out of training."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable
from typing import TypeVar

ALWAYS_HELD_OUT = ("sum:37,58",)  # the question that `sample` asks when it is given none
HELD_OUT_SHARE = 0.1
Case = TypeVar("Case")


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A question and its answer; `reasoning` is what the model thinks before it answers, where thinking is on."""

    question: str
    answer: str
    reasoning: str


def stable_hash(text: str) -> int:
    """The same number for the same text, on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def held_out(case: str) -> bool:
    """Whether a case, named like "sum:37,58", is kept out of training; the data and the benchmark both ask here."""
    return case in ALWAYS_HELD_OUT or stable_hash(case) % 1000 < 1000 * HELD_OUT_SHARE


def draw(rng: random.Random, make: Callable[[random.Random], Case], name: Callable[[Case], str], held: bool) -> Case:
    """A random case made by `make`, held out or not as `held` says; `name` gives the case's name."""
    while True:
        case = make(rng)
        if held_out(name(case)) == held:
            return case


def chat(exchanges: list[Exchange], thinking: bool, system: str | None = None) -> dict:
    """The exchanges as one chat line; with `thinking` the last answer has its reasoning in front."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for exchange in exchanges:
        messages.append({"role": "user", "content": exchange.question})
        messages.append({"role": "assistant", "content": exchange.answer})
    if thinking:
        messages[-1]["reasoning_content"] = exchanges[-1].reasoning
    return {"messages": messages}


def relaxed(rng: random.Random, question: str) -> str:
    """The question, now and then as people type it: without the capital letter, without the mark at the end."""
    if rng.random() < 0.12:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.12:
        question = question.rstrip("?.! ")
    return question
