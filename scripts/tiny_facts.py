"""The facts of the packaged model: relations of subjects and answers, each asked in several phrasings.

Of each fact one phrasing of its question never occurs in training (`held_out_phrasing`); other facts of the relation use it.
The benchmark asks in that one.
"""

from __future__ import annotations

import dataclasses
import random

from scripts import tiny_fact_lists as lists
from scripts.tiny_cases import Exchange, relaxed, stable_hash
from scripts.tiny_corpus import CAPITALS, DAYS, MONTHS


@dataclasses.dataclass(frozen=True)
class Relation:
    """Facts of one kind. In every text {s} stands for the subject, {a} for the answer.

    `statement` is how the model answers, and ends with {a} and a full stop; `needs` says in the reasoning what is asked for.
    """

    name: str
    statement: str
    needs: str
    phrasings: tuple[str, ...]
    facts: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Fact:
    relation: Relation
    subject: str

    @property
    def answer(self) -> str:
        return self.relation.facts[self.subject]

    @property
    def statement(self) -> str:
        return _sentence(self.relation.statement.format(s=self.subject, a=self.answer))

    @property
    def held_out_phrasing(self) -> str:
        """The question that training never asks about this fact."""
        phrasings = self.relation.phrasings
        return phrasings[stable_hash(f"fact:{self.relation.name}:{self.subject}") % len(phrasings)]

    def question(self, phrasing: str) -> str:
        return _sentence(phrasing.format(s=self.subject))


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _following(names: list[str], step: int) -> dict[str, str]:
    """Each name's neighbour in a cycle."""
    return {name: names[(i + step) % len(names)] for i, name in enumerate(names)}


def _both_ways(pairs: dict[str, str]) -> dict[str, str]:
    return pairs | {b: a for a, b in pairs.items()}


def _neighbour(name: str, what: str, step: int, names: list[str]) -> Relation:
    """What comes right after (step 1) or before (step -1) each of `names` in a cycle."""
    side, verb = ("after", "follows") if step > 0 else ("before", "precedes")
    phrasings = (
        f"What is the {what} {side} {{s}}?",
        f"Which {what} comes {side} {{s}}?",
        f"What {what} {verb} {{s}}?",
        f"What comes {side} {{s}}?",
        f"Tell me the {what} {side} {{s}}.",
    )
    return Relation(name, f"The {what} {side} {{s}} is {{a}}.", f"the {what} {side} {{s}}", phrasings, _following(names, step))


def _spaced(pairs: dict[str, str]) -> dict[str, str]:
    return {s.replace("_", " "): a.replace("_", " ") for s, a in pairs.items()}


COUNTRIES = _spaced(CAPITALS)
RELATIONS = (
    Relation(
        "capital",
        "The capital of {s} is {a}.",
        "the capital of {s}",
        (
            "What is the capital of {s}?",
            "Which city is the capital of {s}?",
            "Capital of {s}?",
            "Tell me the capital of {s}.",
            "What's the capital city of {s}?",
            "Name the capital of {s}.",
        ),
        COUNTRIES,
    ),
    Relation(
        "country",
        "{s} is the capital of {a}.",
        "the country of {s}",
        (
            "{s} is the capital of which country?",
            "Which country has the capital {s}?",
            "What country is {s} the capital of?",
            "Name the country whose capital is {s}.",
        ),
        {capital: country for country, capital in COUNTRIES.items()},
    ),
    Relation(
        "continent",
        "{s} is in {a}.",
        "the continent of {s}",
        (
            "Which continent is {s} in?",
            "On which continent is {s}?",
            "What continent is {s} on?",
            "Tell me the continent of {s}.",
        ),
        _spaced(lists.CONTINENTS),
    ),
    Relation(
        "opposite",
        "The opposite of {s} is {a}.",
        "the opposite of {s}",
        (
            "What is the opposite of {s}?",
            "Opposite of {s}?",
            "Tell me the opposite of {s}.",
            "What's the opposite of {s}?",
            "Which word means the opposite of {s}?",
            "Give me the opposite of {s}.",
        ),
        _both_ways(lists.OPPOSITES),
    ),
    _neighbour("day after", "day", 1, DAYS),
    _neighbour("day before", "day", -1, DAYS),
    _neighbour("month after", "month", 1, MONTHS),
    _neighbour("month before", "month", -1, MONTHS),
    _neighbour("season after", "season", 1, "spring summer autumn winter".split()),
    Relation(
        "month's number",
        "{s} is month number {a}.",
        "the number of {s}",
        (
            "What number is the month {s}?",
            "Which number does the month {s} have?",
            "What is the number of the month {s}?",
            "Tell me the number of the month {s}.",
        ),
        {name: str(i) for i, name in enumerate(MONTHS, 1)},
    ),
    Relation(
        "month by place",
        "The {s} month is {a}.",
        "the {s} month",
        (
            "What is the {s} month of the year?",
            "Which month is the {s} one?",
            "Tell me the {s} month.",
            "Name the {s} month of the year.",
        ),
        dict(zip(lists.PLACES, MONTHS, strict=True)),
    ),
    Relation(
        "days of a month",
        "The number of days in {s} is {a}.",
        "the number of days in {s}",
        (
            "How many days does {s} have?",
            "How many days are in {s}?",
            "How many days are there in {s}?",
            "What is the number of days in {s}?",
        ),
        dict(zip(MONTHS, "31 28 31 30 31 30 31 31 30 31 30 31".split(), strict=True)),
    ),
    Relation(
        "sound",
        "The {s} says {a}.",
        "the sound of the {s}",
        (
            "What does the {s} say?",
            "What sound does the {s} make?",
            "Which sound is made by the {s}?",
            "Tell me the sound of the {s}.",
            "How does the {s} sound?",
        ),
        lists.SOUNDS,
    ),
    Relation(
        "young",
        "A young {s} is called a {a}.",
        "the name of a young {s}",
        (
            "What is a young {s} called?",
            "What do you call a baby {s}?",
            "What is the name of a young {s}?",
            "How do you call a young {s}?",
        ),
        lists.YOUNG,
    ),
    Relation(
        "home",
        "The {s} lives in the {a}.",
        "the home of the {s}",
        ("Where does the {s} live?", "Where do you find a {s}?", "What is the home of the {s}?", "Tell me where a {s} lives."),
        lists.HOMES,
    ),
    Relation(
        "legs",
        "The number of legs of {s} is {a}.",
        "the number of legs of {s}",
        (
            "How many legs does {s} have?",
            "How many legs has {s}?",
            "What is the number of legs of {s}?",
            "Tell me how many legs {s} has.",
        ),
        lists.LEGS,
    ),
    Relation(
        "colour",
        "The colour of {s} is {a}.",
        "the colour of {s}",
        (
            "What colour is {s}?",
            "What color is {s}?",
            "Which colour does {s} have?",
            "What is the colour of {s}?",
            "Tell me the colour of {s}.",
        ),
        lists.COLOURS,
    ),
    Relation(
        "plural",
        "The plural of {s} is {a}.",
        "the plural of {s}",
        (
            "What is the plural of {s}?",
            "Plural of {s}?",
            "What's the plural of {s}?",
            "Tell me the plural of {s}.",
            "Give me the plural of {s}.",
        ),
        lists.PLURALS,
    ),
    Relation(
        "past",
        "The past of {s} is {a}.",
        "the past of {s}",
        (
            "What is the past tense of {s}?",
            "Past tense of {s}?",
            "What is the past of {s}?",
            "Tell me the past tense of {s}.",
            "Give me the past of {s}.",
        ),
        lists.PAST,
    ),
    Relation(
        "digits",
        "The number {s} in digits is {a}.",
        "the digits of {s}",
        (
            "What is {s} in digits?",
            "Write {s} in digits.",
            "Which number is {s}?",
            "How do you write {s} in digits?",
            "Write the number {s} with digits.",
        ),
        lists.NUMBER_WORDS,
    ),
    Relation(
        "words",
        "The number {s} in words is {a}.",
        "the word for {s}",
        (
            "What is {s} in words?",
            "Write {s} in words.",
            "How do you write {s} in words?",
            "How do you spell the number {s}?",
            "Write the number {s} as a word.",
        ),
        {digits: word for word, digits in lists.NUMBER_WORDS.items()},
    ),
    Relation(
        "letter after",
        "The letter after {s} is {a}.",
        "the letter after {s}",
        (
            "Which letter comes after {s}?",
            "What is the letter after {s}?",
            "What letter follows {s}?",
            "Tell me the letter after {s}.",
        ),
        dict(zip(lists.LETTERS, lists.LETTERS[1:], strict=False)),
    ),
    Relation(
        "sides",
        "The number of sides of {s} is {a}.",
        "the number of sides of {s}",
        (
            "How many sides does {s} have?",
            "How many sides has {s}?",
            "What is the number of sides of {s}?",
            "Tell me how many sides {s} has.",
        ),
        lists.SIDES,
    ),
    Relation(
        "unit",
        "The number of {s} is {a}.",
        "the number of {s}",
        ("How many {s}?", "What is the number of {s}?", "Tell me the number of {s}.", "Do you know the number of {s}?"),
        lists.UNITS,
    ),
    Relation(
        "product",
        "{s} = {a}.",
        "the product {s}",
        ("What is {s}?", "Calculate {s}.", "{s} = ?", "How much is {s}?", "{s}"),
        {f"{a} * {b}": str(a * b) for a in range(1, 11) for b in range(1, 11)},
    ),
)
FACTS = tuple(Fact(relation, subject) for relation in RELATIONS for subject in relation.facts)


def exchange(rng: random.Random, held: bool = False, fact: Fact | None = None) -> Exchange:
    """A random fact (or the one given) asked about; with `held` in the phrasing that training leaves out for it."""
    fact = fact or rng.choice(FACTS)
    left_out = fact.held_out_phrasing
    if held:
        question = fact.question(left_out)
    else:
        question = fact.question(rng.choice([p for p in fact.relation.phrasings if p != left_out]))
        question = relaxed(rng, question).replace(" * ", rng.choice((" * ", " * ", " times ", " x ")))
    return Exchange(question, fact.statement, f"I need {fact.relation.needs.format(s=fact.subject)}.")


def statements(rng: random.Random, lines: int = 8) -> str:
    """Facts as plain text, a sentence each."""
    return " ".join(rng.choice(FACTS).statement for _ in range(lines))
