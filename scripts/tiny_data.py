"""Writes the training data of the packaged tiny model: chats and plain text, all made up here, the same bytes every time.

    python -m scripts.tiny_data --out DIR [--seed 0] [--size 220000] [--mixture first]

DIR/train.jsonl has the training side of every case, DIR/eval.jsonl 500 lines of the held-out side (`tiny_cases.held_out`)
in the same mixture. `first` is everything in turn; `second` has more of what is learned last: copying, tools, and thinking
before arithmetic; `third`, beside pictures, more of what is forgotten first: copying, facts, stories, tools; `fourth`, at the
end, the same with towns that no list has, for a tool's arguments to be copied and not remembered; `fifth` more of these, many
named after countries.
A line is {"messages": […], "tools": […] where there are tools} or {"text": …}; an answer with `reasoning_content` is one
in thinking mode.
"""

from __future__ import annotations

import argparse
import collections
import functools
import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from qwen35_jax.text import ChatTemplate, Tokenizer
from scripts import tiny_arithmetic, tiny_facts, tiny_stories, tiny_strings, tiny_talk, tiny_tools
from scripts.tiny_cases import Exchange, chat

TINY = Path(__file__).parents[1] / "qwen35_jax" / "assets" / "tiny"
SYSTEM = ("You are a helpful assistant.", "You are tiny, a helpful model.")
EVAL_LINES = 500
COUNTED = 20  # token totals are estimated from one document in so many


def _arithmetic(rng: random.Random, held: bool, thinking: float = 0.4) -> dict:
    form = rng.random()
    if form < 0.2:
        return {"text": tiny_arithmetic.equations(rng, held)}
    exchanges = [_problem(rng, held) for _ in range(rng.choice((1, 1, 2, 3)))]
    return _chat(rng, exchanges, thinking)


def _problem(rng: random.Random, held: bool) -> Exchange:
    return tiny_arithmetic.exchange(rng, tiny_arithmetic.problem(rng, held))


def _tools(rng: random.Random, held: bool) -> dict:
    return tiny_tools.document(rng, held, rng.random() < 0.25)


def _strings(rng: random.Random, held: bool, skill: str | None = None) -> dict:
    return _chat(rng, [tiny_strings.exchange(rng, held, skill) for _ in range(rng.choice((1, 2, 2)))], thinking=0.15)


def _facts(rng: random.Random, held: bool) -> dict:
    if rng.random() < 0.1:
        return {"text": tiny_facts.statements(rng)}
    return _chat(rng, [tiny_facts.exchange(rng, held) for _ in range(rng.choice((1, 2, 2)))], thinking=0.12)


def _stories(rng: random.Random, held: bool) -> dict:
    if rng.random() < 0.2:
        return {"text": tiny_stories.story(rng, tiny_stories.hero(rng, held))}
    return _chat(rng, [tiny_stories.exchange(rng, held)], thinking=0.1)


def _talk(rng: random.Random, held: bool) -> dict:
    """Small talk, or a chat of several turns that goes from one subject to another."""
    others: tuple[Callable[[], Exchange], ...] = (
        lambda: _problem(rng, held),
        lambda: tiny_facts.exchange(rng, held),
        lambda: tiny_strings.exchange(rng, held),
    )
    exchanges = [tiny_talk.exchange(rng)]
    if rng.random() < 0.5:
        exchanges += [rng.choice(others)() for _ in range(rng.randint(1, 3))]
        rng.shuffle(exchanges)
    return _chat(rng, exchanges, thinking=0.15)


def _chat(rng: random.Random, exchanges: list[Exchange], thinking: float) -> dict:
    system = rng.choice(SYSTEM) if rng.random() < 0.04 else None
    return chat(exchanges, rng.random() < thinking, system)


Maker = Callable[[random.Random, bool], dict]
# Makers of documents, each with its share of the documents in each mixture.
KINDS: dict[str, tuple[Maker, dict[str, float]]] = {
    "arithmetic": (_arithmetic, {"first": 0.4, "second": 0.2, "third": 0.12, "fourth": 0.1, "fifth": 0.09}),
    "thinking": (functools.partial(_arithmetic, thinking=1.0), {"second": 0.15, "third": 0.1, "fourth": 0.1, "fifth": 0.09}),
    "tools": (_tools, {"first": 0.043, "second": 0.09, "third": 0.18, "fourth": 0.16, "fifth": 0.15}),
    "towns": (tiny_tools.anywhere, {"fourth": 0.03}),
    "more towns": (functools.partial(tiny_tools.anywhere, towns=tiny_tools.MORE_TOWNS), {"fifth": 0.1}),
    "strings": (_strings, {"first": 0.19, "second": 0.1, "third": 0.1, "fourth": 0.14, "fifth": 0.13}),
    "copying": (functools.partial(_strings, skill="copy"), {"second": 0.25, "third": 0.18, "fourth": 0.2, "fifth": 0.18}),
    "facts": (_facts, {"first": 0.204, "second": 0.12, "third": 0.19, "fourth": 0.13, "fifth": 0.12}),
    "stories": (_stories, {"first": 0.083, "second": 0.05, "third": 0.1, "fourth": 0.12, "fifth": 0.12}),
    "talk": (_talk, {"first": 0.08, "second": 0.04, "third": 0.03, "fourth": 0.02, "fifth": 0.02}),
}
MIXTURES = ("first", "second", "third", "fourth", "fifth")


def documents(seed: int, held: bool = False, mixture: str = "first") -> Iterator[tuple[str, dict]]:
    """(kind, line) without end; with `held` of the side that training never shows."""
    rng = random.Random(f"{seed} {'held out' if held else 'training'}")
    shares = {name: found[mixture] for name, (_, found) in KINDS.items() if mixture in found}
    names, shares = list(shares), list(shares.values())
    while True:
        name = rng.choices(names, shares)[0]
        yield name, KINDS[name][0](rng, held)


class TokenCounter:
    """Tokens of a line as the packaged tokenizer and chat template see it."""

    def __init__(self):
        self.tokenizer, self.template = Tokenizer.from_directory(TINY), ChatTemplate.from_directory(TINY)

    def __call__(self, line: dict) -> int:
        if "text" in line:
            return len(self.tokenizer.encode(line["text"])) + 1  # and the end-of-text token
        text = self.template.render(line["messages"], tools=line.get("tools"), add_generation_prompt=False)
        return len(self.tokenizer.encode(text))


def write(path: Path, found: Iterator[tuple[str, dict]], every: int) -> dict[str, list[int]]:
    """Writes the lines; returns (documents, tokens, longest) of each kind, the last two from one document in `every`."""
    count, totals = TokenCounter(), collections.defaultdict(lambda: [0, 0, 0])
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for i, (name, line) in enumerate(found):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            total = totals[name]
            total[0] += 1
            if i % every == 0:
                tokens = count(line)
                total[1] += tokens * every
                total[2] = max(total[2], tokens)
    return totals


def report(totals: dict[str, list[int]]) -> str:
    """The totals as a table."""
    everything = sum(tokens for _, tokens, _ in totals.values()) or 1
    rows = [f"{'kind':12}{'documents':>12}{'tokens, about':>16}{'share':>8}{'longest':>9}"]
    for name, (number, tokens, longest) in totals.items():
        rows.append(f"{name:12}{number:>12,}{tokens:>16,}{tokens / everything:>8.1%}{longest:>9}")
    number, longest = sum(t[0] for t in totals.values()), max(t[2] for t in totals.values())
    return "\n".join([*rows, f"{'all':12}{number:>12,}{everything:>16,}{1:>8.1%}{longest:>9}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for train.jsonl and eval.jsonl")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default: %(default)s)")
    parser.add_argument("--size", type=int, default=220_000, help="documents to train on (default: %(default)s)")
    parser.add_argument("--mixture", choices=MIXTURES, default="first", help="shares of the kinds (default: %(default)s)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, held, size, every in (("train", False, options.size, COUNTED), ("eval", True, EVAL_LINES, 1)):
        path = options.out / f"{name}.jsonl"
        totals = write(path, itertools.islice(documents(options.seed, held, options.mixture), size), every)
        print(f"{path}\n{report(totals)}\n")


if __name__ == "__main__":
    main()
