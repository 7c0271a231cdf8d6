"""Short stories from six plots: one hero, one friend, a place and a thing that stay the same from beginning to end."""

from __future__ import annotations

import dataclasses
import random

from scripts.tiny_cases import Exchange, draw, relaxed

HEROES = """
fox rabbit bear mouse owl cat dog frog duck lion horse goat pig wolf tiger bird monkey sheep boy girl king queen prince
farmer sailor teacher cook
""".split()
SHE = "Alice Clara Emma Grace Ida Kate Maria Nina Rosa Vera Zoe".split()
HE = "Ben David Felix Henry Jack Leo Oscar Paul Sam Tom William".split()
GIRLS, BOYS = ("girl", "queen"), ("boy", "king", "prince")
PLACES = "forest garden village valley meadow castle".split()
THINGS = "ball hat key lamp book kite bell drum ring map".split()
ADJECTIVES = "little brave kind clever happy old young quiet".split()
FOODS = "soup bread cake apples pears rice".split()
SPOTS = "under a tree|behind a stone|next to the river|under the bridge|behind the door".split("|")
ENDINGS = (
    "From that day on, {hero} and {friend} were the best of friends. The end.",
    "{hero} went home and slept well that night. The end.",
    "And {hero} never forgot that day. The end.",
)
OPENINGS = (
    "Once upon a time there was {article} {adjective} {kind} named {hero}. {She} lived in a {place}.",
    "There once was {article} {adjective} {kind} named {hero}, who lived in a {place}.",
    "In a {place} there lived {article} {adjective} {kind} named {hero}.",
)
# Of each sentence of a plot one of the forms is taken.
PLOTS = (
    (  # lost and found
        ("One day {hero} lost {her} {thing}.", "One morning {hero} could not find {her} {thing}."),
        ("{She} looked for the {thing} everywhere in the {place}.", "{She} looked in every corner of the {place}."),
        ("Then {she} met {friend}, and {friend} said: I will help you.", "{friend} saw {her_object} and wanted to help."),
        ("Together they found the {thing} {spot}.", "At last {friend} saw the {thing} {spot}."),
        ("{hero} was very happy and shared some {food} with {friend}.", "{hero} thanked {friend} and gave {friend} some {food}."),
    ),
    (  # a friend in need
        ("One day {hero} heard a cry in the {place}.", "One evening {hero} heard somebody call for help."),
        ("It was {friend}, who had lost the way.", "It was {friend}, and {friend} was lost."),
        ("It was dark, but {hero} had a {thing} in {her} bag.", "{hero} took {her} {thing} and went to look."),
        ("{hero} used the {thing} to show {friend} the way home.", "With the {thing} {hero} led {friend} home."),
        ("There they ate {food} and laughed about it.", "{friend} made {food} for {hero} to say thank you."),
    ),
    (  # fear
        ("{hero} was afraid of the dark.", "But {hero} was afraid of the night."),
        ("One night a storm came and the wind was loud.", "One evening it rained and the sky was black."),
        ("{friend} came and gave {hero} a {thing}.", "Then {friend} came with a {thing} for {hero}."),
        ("Hold the {thing}, said {friend}, and count to ten.", "{friend} said: hold this {thing} and think of the sun."),
        ("{hero} held the {thing}, and soon {she} was not afraid.", "{She} held the {thing} until the morning came."),
    ),
    (  # a find
        ("One day {hero} found a box {spot}.", "One morning {hero} saw an old box {spot}."),
        ("{She} could not open it, so {she} asked {friend}.", "The box was closed, and {hero} called {friend}."),
        ("{friend} pulled and {hero} pushed, and the box was open.", "Together {hero} and {friend} opened the box."),
        ("Inside there was a golden {thing}.", "In the box there was a beautiful {thing}."),
        ("They gave the {thing} to the people of the {place}.", "They hung the {thing} up where all could see it."),
    ),
    (  # the race
        (
            "There was a race in the {place}, and {hero} wanted to win a {thing}.",
            "{hero} dreamed of a race and its prize, a {thing}.",
        ),
        ("But {she} was slow, and the others laughed.", "But {hero} had never been fast."),
        ("{friend} helped {her_object}, and they ran every day.", "Every day {hero} ran with {friend}."),
        ("When the day came, {hero} was the first.", "On the day of the race {hero} ran like the wind."),
        ("{She} won the {thing} and shared the joy with {friend}.", "{She} got the {thing}, and {friend} was proud."),
    ),
    (  # winter
        ("Winter came, and there was snow in the {place}.", "One day it was very cold in the {place}."),
        ("{hero} had a warm house and a lot of {food}.", "{hero} sat at home and cooked {food}."),
        (
            "Somebody rang with a {thing}: it was {friend}, who was cold and hungry.",
            "{friend} came to the door with a {thing}, cold and hungry.",
        ),
        ("Come in, said {hero}, and eat with me.", "{hero} opened the door and gave {friend} some {food}."),
        ("{friend} was warm again and gave {hero} the {thing}.", "To say thank you, {friend} gave {hero} the {thing}."),
    ),
)
ASKED_BY_NAME = (
    "Tell me a short story about {article} {kind} named {hero}.",
    "Tell me a story about {article} {kind} named {hero}.",
    "Write a short story about {article} {kind} called {hero}.",
    "Write a story about {hero} the {kind}.",
)
ASKED_BY_KIND = (
    "Tell me a short story about {article} {kind}.",
    "Tell me a story about {article} {kind}.",
    "Write a short story about {article} {kind}.",
    "Can you tell me a story about {article} {kind}?",
)
ASKED = (
    "Tell me a story.",
    "Tell me a short story.",
    "Write a short story.",
    "Please tell me a story.",
    "Can you tell me a story?",
)


@dataclasses.dataclass(frozen=True)
class Hero:
    kind: str
    name: str

    @property
    def case(self) -> str:
        return f"story:{self.kind},{self.name}"


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def hero(rng: random.Random, held: bool = False) -> Hero:
    """A random hero whose kind and name training shows together or, with `held`, never does."""
    return draw(rng, _hero, lambda h: h.case, held)


def _hero(rng: random.Random) -> Hero:
    kind = rng.choice(HEROES)
    return Hero(kind, rng.choice(SHE if kind in GIRLS else HE if kind in BOYS else SHE + HE))


def story(rng: random.Random, h: Hero) -> str:
    """Eight or nine sentences about the hero, "The end." among them."""
    she, her, her_object = ("she", "her", "her") if h.name in SHE else ("he", "his", "him")
    adjective = rng.choice(ADJECTIVES)
    friend = rng.choice([n for n in SHE + HE if n != h.name])
    words = {"hero": h.name, "kind": h.kind, "adjective": adjective, "article": article(adjective), "friend": friend}
    words |= {"she": she, "She": she.capitalize(), "her": her, "her_object": her_object}
    words |= {"place": rng.choice(PLACES), "thing": rng.choice(THINGS), "food": rng.choice(FOODS), "spot": rng.choice(SPOTS)}
    sentences = [rng.choice(OPENINGS), *(rng.choice(forms) for forms in rng.choice(PLOTS)), rng.choice(ENDINGS)]
    return " ".join(sentence.format(**words) for sentence in sentences)


def asked_by_name(rng: random.Random, h: Hero) -> str:
    return rng.choice(ASKED_BY_NAME).format(article=article(h.kind), kind=h.kind, hero=h.name)


def exchange(rng: random.Random, held: bool = False) -> Exchange:
    """A request for a story, about a named hero, a kind of hero or nothing in particular, and the story."""
    h, form = hero(rng, held), rng.random()
    if form < 0.5:
        question = asked_by_name(rng, h)
    elif form < 0.85:
        question = rng.choice(ASKED_BY_KIND).format(article=article(h.kind), kind=h.kind)
    else:
        question = rng.choice(ASKED)
    return Exchange(relaxed(rng, question), story(rng, h), f"The story is about {h.name} the {h.kind}. It needs an end.")
