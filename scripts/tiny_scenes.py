"""Scenes that the packaged model is shown, with questions about them: pictures of shapes, digits and bars, and short clips.

A scene has a name of what makes it: the answer, shapes, colours, background. One name in ten is held out (`tiny_cases.held_out`):
training never shows a picture with that combination, and every picture of the benchmark has such a one. A look, one shape in its
colour on a background, that is held out of pictures of a single shape is held out of all.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable
from typing import TypeVar

from PIL import Image

from scripts import tiny_drawing as drawing
from scripts.tiny_cases import draw, relaxed
from scripts.tiny_drawing import BACKGROUNDS, COLOURS, SHAPES

FRAMES, FPS = 4, 2.0  # of a clip
PLACES = {"on the left": (0.2, 0.5), "on the right": (0.8, 0.5), "at the top": (0.5, 0.2), "at the bottom": (0.5, 0.8)}
MIDDLE = {"in the middle": (0.5, 0.5)}
DIRECTIONS = {"to the left": (-1, 0), "to the right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question, its one right answer, and the skill that it takes."""

    skill: str
    question: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Scene:
    """`frames`: one picture, or those of a clip. `asked`: all that can be asked, one for each skill."""

    name: str
    frames: tuple[Image.Image, ...]
    asked: tuple[Asked, ...]

    def part(self, source: Callable[[Image.Image], object]) -> dict:
        """The scene as a part of a message; `source` is what each picture is given as."""
        if len(self.frames) == 1:
            return {"type": "image", "image": source(self.frames[0])}
        return {"type": "video", "video": [source(frame) for frame in self.frames], "fps": FPS}


Case = TypeVar("Case")


def case_of(rng: random.Random, kind: str, make: Callable[[random.Random], Case], held: bool) -> tuple[str, Case]:
    """(name, what `make` drew): a scene's, held out or not as `held` says."""
    case = draw(rng, make, lambda case: f"{kind}:{case}", held)
    return f"{kind}:{case}", case


def ask(rng: random.Random, skill: str, questions: tuple[str, ...], answer: str, **words: str) -> Asked:
    return Asked(skill, relaxed(rng, rng.choice(questions).format(**words)), answer)


def plural(shape: str, count: int = 2) -> str:
    return shape if count == 1 else shape + ("es" if shape.endswith("s") else "s")


def named(colour: str, shape: str) -> str:
    return f"{'An' if colour[0] in 'aeiou' else 'A'} {colour} {shape}."


def _look(rng: random.Random) -> tuple[str, str, str]:
    """Colour, shape and a background on which it is seen."""
    background = rng.choice(list(BACKGROUNDS))
    colour = rng.choice([c for c in COLOURS if drawing.visible(c, background)])
    return colour, rng.choice(SHAPES), background


def _known_look(rng: random.Random) -> tuple[str, str, str]:
    """A look that training may show."""
    return case_of(rng, "shape", _look, False)[1]


def _look_questions(rng: random.Random, colour: str, shape: str, count: int = 1) -> tuple[Asked, Asked]:
    """What can be asked wherever all shapes are alike."""
    if count > 1:
        colours = ("What colour are they?", "What colour are the {shapes}?", "Which colour are the {shapes}?")
        shapes, it = ("What shape are they?", "Which shapes are these?", "What shapes do you see?"), "They are"
    else:
        colours = ("What colour is it?", "What colour is the {shape}?", "Which colour is the {shape}?", "Name the colour.")
        shapes, it = ("What shape is it?", "Which shape is this?", "What shape do you see?", "Name the shape."), "It is"
    words = {"shape": shape, "shapes": plural(shape)}
    is_shape = f"{it} {plural(shape) if count > 1 else f'a {shape}'}."
    return ask(rng, "colour", colours, f"{it} {colour}.", **words), ask(rng, "shape", shapes, is_shape)


def _turn(rng: random.Random) -> float:
    """A little off the upright, so that a square does not become a diamond."""
    return rng.uniform(-0.04, 0.04)


def single(rng: random.Random, held: bool) -> Scene:
    """One shape somewhere, large or small."""
    name, (colour, shape, background) = case_of(rng, "shape", _look, held)
    image = drawing.canvas(rng, background)
    radius = rng.uniform(9, 0.4 * min(image.size))
    (centre,) = drawing.spread(rng, image.size, 1, radius)
    drawing.shape(image, shape, centre, radius, drawing.shade(rng, COLOURS[colour]), _turn(rng))
    both = ("What do you see?", "Describe the picture.", "What is in the picture?", "What is this?")
    return Scene(name, (image,), (*_look_questions(rng, colour, shape), ask(rng, "colour and shape", both, named(colour, shape))))


def counted(rng: random.Random, held: bool) -> Scene:
    """One to five shapes of a kind and colour."""
    name, (count, (colour, shape, background)) = case_of(rng, "count", lambda rng: (rng.randint(1, 5), _known_look(rng)), held)
    image = drawing.canvas(rng, background)
    radius = rng.uniform(5, 9)
    while (centres := drawing.spread(rng, image.size, count, radius)) is None:
        radius *= 0.9
    for centre in centres:
        drawing.shape(image, shape, centre, radius, drawing.shade(rng, COLOURS[colour]), _turn(rng))
    questions = ("How many {shapes} are there?", "Count the {shapes}.", "How many {shapes} do you see?")
    answer = f"There {'is' if count == 1 else 'are'} {count} {plural(shape, count)}."
    asked = ask(rng, "count to five", questions, answer, shapes=plural(shape))
    return Scene(name, (image,), (asked, *_look_questions(rng, colour, shape, count)))


def digit(rng: random.Random, held: bool) -> Scene:
    """One digit, upright but for some degrees."""

    def make(rng: random.Random):
        colour, _, background = _look(rng)
        return rng.randrange(10), colour, background

    name, (number, colour, background) = case_of(rng, "digit", make, held)
    image = drawing.canvas(rng, background)
    height = rng.randint(26, 48)
    (centre,) = drawing.spread(rng, image.size, 1, 0.4 * height)
    drawing.digit(image, str(number), centre, height, drawing.shade(rng, COLOURS[colour]), rng.uniform(-10, 10))
    questions = ("Which digit is this?", "What number do you see?", "Read the digit.", "Which number is in the picture?")
    return Scene(name, (image,), (ask(rng, "digit", questions, f"It is {number}."),))


def placed(rng: random.Random, held: bool) -> Scene:
    """One shape at a side or in the middle."""
    places = PLACES | MIDDLE
    name, (place, look) = case_of(rng, "place", lambda rng: (rng.choice(list(places)), _known_look(rng)), held)
    colour, shape, background = look
    image = drawing.canvas(rng, background)
    centre = [(at + rng.uniform(-0.06, 0.06)) * side for at, side in zip(places[place], image.size, strict=True)]
    drawing.shape(image, shape, tuple(centre), rng.uniform(6, 11), drawing.shade(rng, COLOURS[colour]), _turn(rng))
    questions = ("Where is the {shape}?", "Where do you see the {shape}?", "In which part of the picture is the {shape}?")
    asked = ask(rng, "place", questions, f"The {shape} is {place}.", shape=shape)
    return Scene(name, (image,), (asked, *_look_questions(rng, colour, shape)))


def paired(rng: random.Random, held: bool) -> Scene:
    """Two different shapes, side by side or one above the other: what is where."""

    def make(rng: random.Random):
        while True:
            (first, one, background), (second, other, at) = _known_look(rng), _known_look(rng)
            if first != second and one != other and at == background:
                return rng.random() < 0.5, (first, one), (second, other), background

    name, (beside, *looks, background) = case_of(rng, "pair", make, held)
    image = drawing.canvas(rng, background)
    sides = list(PLACES)[:2] if beside else list(PLACES)[2:]
    for place, (colour, shape) in zip(sides, looks, strict=True):
        centre = [(at + rng.uniform(-0.05, 0.05)) * side for at, side in zip(PLACES[place], image.size, strict=True)]
        drawing.shape(image, shape, tuple(centre), rng.uniform(7, 11), drawing.shade(rng, COLOURS[colour]), _turn(rng))
    which = rng.randrange(2)
    questions = ("What is {place}?", "What do you see {place}?", "Which shape is {place}?")
    return Scene(name, (image,), (ask(rng, "what is where", questions, named(*looks[which]), place=sides[which]),))


def charted(rng: random.Random, held: bool) -> Scene:
    """A chart of three or four bars, none as high as another: the tallest, the shortest, how many."""

    def make(rng: random.Random):
        background = rng.choice(list(BACKGROUNDS))
        colours = [c for c in COLOURS if drawing.visible(c, background)]
        count = rng.choice((3, 4))
        return tuple(rng.sample(range(2, 11), count)), tuple(rng.sample(colours, count)), background

    name, (heights, colours, background) = case_of(rng, "bars", make, held)
    image = drawing.canvas(rng, background)
    drawing.bars(image, heights, [drawing.shade(rng, COLOURS[c]) for c in colours])
    ordered = [colour for _, colour in sorted(zip(heights, colours, strict=True))]
    tall = ("Which bar is the tallest?", "Which bar is highest?", "What colour is the tallest bar?")
    short = ("Which bar is the shortest?", "Which bar is lowest?", "What colour is the shortest bar?")
    many = ("How many bars are there?", "How many bars does the chart have?", "Count the bars.")
    asked = (
        ask(rng, "tallest bar", tall, f"The {ordered[-1]} bar is the tallest."),
        ask(rng, "shortest bar", short, f"The {ordered[0]} bar is the shortest."),
        ask(rng, "number of bars", many, f"There are {len(heights)} bars."),
    )
    return Scene(name, (image,), asked)


def moving(rng: random.Random, held: bool) -> Scene:
    """A shape that moves straight to one side, over four frames."""
    name, (direction, look) = case_of(rng, "motion", lambda rng: (rng.choice(list(DIRECTIONS)), _known_look(rng)), held)
    colour, shape, background = look
    first = drawing.canvas(rng, background, (64, 64))
    radius, distance = rng.uniform(6, 10), rng.uniform(24, 34)
    step = [way * distance / (FRAMES - 1) for way in DIRECTIONS[direction]]
    start = [_start(rng, way, distance, radius) for way in DIRECTIONS[direction]]
    fill, turn, frames = drawing.shade(rng, COLOURS[colour]), _turn(rng), []
    for i in range(FRAMES):
        frames.append(first.copy())
        drawing.shape(frames[-1], shape, (start[0] + i * step[0], start[1] + i * step[1]), radius, fill, turn)
    questions = ("Which way does the {shape} move?", "Where does the {shape} go?", "In which direction does it move?")
    asked = ask(rng, "direction of motion", questions, f"It moves {direction}.", shape=shape)
    return Scene(name, tuple(frames), (asked, *_look_questions(rng, colour, shape)))


def _start(rng: random.Random, way: int, distance: float, radius: float) -> float:
    """Where a way of `distance` begins, so that it stays inside 64 pixels."""
    low, high = radius + 1, 63 - radius - abs(way) * distance
    at = rng.uniform(low, high)
    return 64 - at if way < 0 else at


def changing(rng: random.Random, held: bool) -> Scene:
    """A shape that changes its colour half way: which colour came first, and last."""

    def make(rng: random.Random):
        while True:
            (colour, shape, background), (other, *rest) = _known_look(rng), _known_look(rng)
            if other != colour and rest == [shape, background]:
                return colour, other, shape, background

    name, (first, last, shape, background) = case_of(rng, "order", make, held)
    image = drawing.canvas(rng, background, (64, 64))
    radius = rng.uniform(9, 22)
    (centre,), turn = drawing.spread(rng, image.size, 1, radius), _turn(rng)
    frames = []
    for colour in itertools.chain.from_iterable([c] * (FRAMES // 2) for c in (first, last)):
        frames.append(image.copy())
        drawing.shape(frames[-1], shape, centre, radius, drawing.shade(rng, COLOURS[colour]), turn)
    asked = (
        ask(rng, "first colour", ("Which colour came first?", "Which colour was first?"), f"{first.capitalize()} came first."),
        ask(rng, "last colour", ("Which colour came last?", "Which colour was last?"), f"{last.capitalize()} came last."),
    )
    return Scene(name, tuple(frames), asked)


# Makers of scenes, each with its share of the pictures that are trained on: more of what is learned last.
KINDS: dict[str, tuple[Callable[[random.Random, bool], Scene], float]] = {
    "single": (single, 0.1),
    "counted": (counted, 0.32),
    "digit": (digit, 0.14),
    "placed": (placed, 0.05),
    "paired": (paired, 0.14),
    "charted": (charted, 0.1),
    "moving": (moving, 0.07),
    "changing": (changing, 0.08),
}


def scene(rng: random.Random, held: bool, kind: str | None = None) -> Scene:
    """A scene of a kind, by default of any."""
    kind = kind or rng.choices(list(KINDS), [share for _, share in KINDS.values()])[0]
    return KINDS[kind][0](rng, held)
