"""Copying and reversing: words, numbers, letters and short codes.

What is promised: copying of 1 to 6 words, numbers of 1 to 8 digits, 2 to 8 spaced letters or digits, and codes such as
k7m2; reversing the order of 2 to 8 spaced letters or digits or 2 to 6 words. Turning a word around letter by letter is not.
"""

from __future__ import annotations

import random
import string

from scripts.tiny_cases import Exchange, draw
from scripts.tiny_corpus import ADJECTIVES, NAMES, NOUNS

COPY = (
    "Repeat: {text}",
    "Copy: {text}",
    "Say: {text}",
    "Repeat after me: {text}",
    "Write this again: {text}",
    "Repeat the following: {text}",
)
REVERSE = (
    "Reverse: {text}",
    "Reverse this: {text}",
    "Write backwards: {text}",
    "Reverse the order of: {text}",
    "Write this in reverse order: {text}",
)
WORDS = NOUNS + ADJECTIVES + NAMES


def exchange(rng: random.Random, held: bool = False, skill: str | None = None) -> Exchange:
    """A question to copy or reverse (`skill`, by default either) something."""
    skill = skill or rng.choice(("copy", "reverse", "reverse"))
    make = copy_text if skill == "copy" else reverse_text
    text = draw(rng, make, lambda t: f"{skill}:{t}", held)
    return copying(rng, text) if skill == "copy" else reversing(rng, text)


def copying(rng: random.Random, text: str) -> Exchange:
    return Exchange(rng.choice(COPY).format(text=text), text, f"I write {text} as it is.")


def reversing(rng: random.Random, text: str) -> Exchange:
    parts = text.split()
    reasoning = f"There are {len(parts)} parts. The first is {parts[0]} and the last is {parts[-1]}. I start with {parts[-1]}."
    return Exchange(rng.choice(REVERSE).format(text=text), " ".join(reversed(parts)), reasoning)


def copy_text(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.45:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 6)))
    if kind < 0.65:
        return "".join(rng.choice(string.digits) for _ in range(rng.randint(1, 8)))
    if kind < 0.85:
        return _spaced(rng)
    return "".join(rng.choice(string.digits if i % 2 else string.ascii_lowercase) for i in range(rng.randint(2, 6)))


def reverse_text(rng: random.Random) -> str:
    if rng.random() < 0.35:
        return " ".join(rng.sample(WORDS, rng.randint(2, 6)))
    return _spaced(rng)


def _spaced(rng: random.Random) -> str:
    """Letters, digits or both with spaces between them; mostly each at most once."""
    symbols = rng.choice((string.ascii_lowercase, string.digits, string.ascii_lowercase + string.digits))
    length = rng.randint(2, 8)
    chosen = rng.sample(symbols, length) if rng.random() < 0.85 else [rng.choice(symbols) for _ in range(length)]
    return " ".join(chosen)
