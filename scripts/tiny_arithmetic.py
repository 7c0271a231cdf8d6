"""Sums and differences of numbers below 100, directly and digit by digit, and in lines of plain text.

Cases with two two-digit numbers are held out by a + b and a - b alike in both orders: who has seen 58 + 37 has not seen 37 + 58.
"""

from __future__ import annotations

import dataclasses
import random

from scripts.tiny_cases import Exchange, draw, held_out, relaxed
from scripts.tiny_corpus import NAMES

LIMIT = 100
EITHER = (
    "What is {a} {sign} {b}?",
    "What is {a} {sign} {b}?",
    "What is {a}{sign}{b}?",
    "What's {a} {sign} {b}?",
    "What is {a} {word} {b}?",
    "How much is {a} {sign} {b}?",
    "How much is {a} {word} {b}?",
    "Calculate {a} {sign} {b}.",
    "Calculate {a}{sign}{b}",
    "Compute {a} {sign} {b}.",
    "Please calculate {a} {word} {b}.",
    "Can you tell me what {a} {sign} {b} is?",
    "{a} {sign} {b} = ?",
    "{a} {sign} {b} =",
    "{a} {sign} {b}",
    "{a}{sign}{b}=",
    "{a}{sign}{b}",
)
SUMS = EITHER + ("Add {a} and {b}.", "What is the sum of {a} and {b}?", "Add {b} to {a}.")
DIFFERENCES = EITHER + ("Subtract {b} from {a}.", "Take {b} away from {a}.", "What is {a} less {b}?")
THINGS = "apples pears eggs books stones stars flowers pencils oranges shells coins cards".split()
SUM_STORIES = (
    "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
    "There are {a} {things} on the table and {b} {things} in the box. How many {things} are there?",
)
DIFFERENCE_STORIES = (
    "{name} has {a} {things} and gives away {b}. How many {things} does {name} have now?",
    "There are {a} {things} in the box. {name} takes {b} of them. How many {things} are left?",
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """a + b or a - b, each number from 0 to 99; `sign` is "+" or "-"."""

    a: int
    sign: str
    b: int

    @property
    def value(self) -> int:
        return self.a + self.b if self.sign == "+" else self.a - self.b

    @property
    def expression(self) -> str:
        return f"{self.a} {self.sign} {self.b}"

    @property
    def case(self) -> str:
        """The case's name, for `held_out`: one for both orders of the numbers."""
        low, high = sorted((self.a, self.b))
        return f"{'sum' if self.sign == '+' else 'difference'}:{low},{high}"

    @property
    def held_out(self) -> bool:
        """Only problems of two two-digit numbers are: the others are what those are built from."""
        return min(self.a, self.b) >= 10 and held_out(self.case)


def problem(rng: random.Random, held: bool = False, sign: str | None = None) -> Problem:
    """A random problem from the training side, or with `held` one of two two-digit numbers that training never shows."""
    if held:
        return draw(rng, lambda r: _any(r, sign, 10), lambda p: p.case, True)
    while True:
        # Single digits come up more often than their share: sums of digits are what everything else needs.
        found = _any(rng, sign, 0 if rng.random() < 0.9 else -90)
        if not found.held_out:
            return found


def _any(rng: random.Random, sign: str | None, low: int) -> Problem:
    chosen = sign or ("+" if rng.random() < 0.45 else "-")
    if low < 0:
        return Problem(rng.randrange(LIMIT + low), chosen, rng.randrange(LIMIT + low))
    return Problem(rng.randrange(low, LIMIT), chosen, rng.randrange(low, LIMIT))


def exchange(rng: random.Random, p: Problem) -> Exchange:
    """The problem asked in one of many ways."""
    if rng.random() < 0.06 and p.value >= 0:
        stories = SUM_STORIES if p.sign == "+" else DIFFERENCE_STORIES
        question = rng.choice(stories).format(a=p.a, b=p.b, name=rng.choice(NAMES), things=rng.choice(THINGS))
    else:
        word = "plus" if p.sign == "+" else "minus"
        phrase = rng.choice(SUMS if p.sign == "+" else DIFFERENCES)
        question = relaxed(rng, phrase.format(a=p.a, b=p.b, sign=p.sign, word=word))
    return Exchange(question, f"{p.expression} = {p.value}", working(p))


def working(p: Problem) -> str:
    """The problem digit by digit; every step needs only numbers that are already there."""
    if p.sign == "+":
        return _working_of_sum(p.a, p.b)
    if p.a < p.b:
        return f"{p.a} is less than {p.b}, so it is minus {p.b} - {p.a}.\n{_working_of_difference(p.b, p.a, '-')}"
    return f"{p.a} is not less than {p.b}.\n{_working_of_difference(p.a, p.b, '')}"


def _working_of_sum(a: int, b: int) -> str:
    ones = a % 10 + b % 10
    carry, tens = ones // 10, a // 10 + b // 10 + ones // 10
    return (
        f"Ones: {a % 10} + {b % 10} = {ones}, write {ones % 10}, carry {carry}.\n"
        f"Tens: {a // 10} + {b // 10} + {carry} = {tens}.\n"
        f"Result: {a + b}"
    )


def _working_of_difference(a: int, b: int, minus: str) -> str:
    borrow = int(a % 10 < b % 10)
    ones, tens = a % 10 + 10 * borrow - b % 10, a // 10 - borrow - b // 10
    return (
        f"Ones: {a % 10 + 10 * borrow} - {b % 10} = {ones}, borrow {borrow}.\n"
        f"Tens: {a // 10} - {b // 10} - {borrow} = {tens}.\n"
        f"Result: {minus}{a - b}"
    )


def equations(rng: random.Random, held: bool = False, lines: int = 12) -> str:
    """Solved problems, one a line."""
    found = (problem(rng, held) for _ in range(lines))
    return "\n".join(f"{p.expression} = {p.value}" for p in found)
