"""Drawing for the packaged model's pictures: shapes, digits and bars of a few pixels, with Pillow."""

from __future__ import annotations

import base64
import functools
import io
import math
import random

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Point = tuple[float, float]
COLOURS: dict[str, Colour] = {
    "red": (220, 40, 40), "green": (40, 170, 60), "blue": (45, 80, 220), "yellow": (245, 220, 40), "orange": (245, 140, 30),
    "purple": (140, 60, 180), "pink": (250, 150, 190), "brown": (130, 80, 40), "black": (15, 15, 15), "white": (245, 245, 245),
}  # fmt: skip
BACKGROUNDS: dict[str, Colour] = {
    "white": (255, 255, 255), "grey": (135, 135, 135), "black": (0, 0, 0), "cream": (250, 240, 205), "sky": (195, 225, 255),
    "night": (35, 40, 70),
}  # fmt: skip
CONTRAST = 90  # the least distance, in RGB, of what is drawn from what it is drawn on
SIZES = ((64, 64),) * 6 + ((80, 64), (64, 80), (96, 96))  # width and height; multiples of 16
# Corners on a circle of radius 1, counted from the top: angle in turns and distance.
CORNERS: dict[str, list[tuple[float, float]]] = {
    "square": [(1 / 8 + i / 4, 1.0) for i in range(4)],
    "diamond": [(i / 4, 1.0 if i % 2 == 0 else 0.62) for i in range(4)],
    "triangle": [(i / 3, 1.0) for i in range(3)],
    "star": [(i / 10, 1.0 if i % 2 == 0 else 0.42) for i in range(10)],
}
SHAPES = ("circle", "cross", *CORNERS)


def visible(colour: str, background: str) -> bool:
    """Whether a colour is seen on a background."""
    return math.dist(COLOURS[colour], BACKGROUNDS[background]) >= CONTRAST


def shade(rng: random.Random, colour: Colour) -> Colour:
    """A colour near this one."""
    return tuple(min(255, max(0, c + rng.randint(-12, 12))) for c in colour)


def canvas(rng: random.Random, background: str, size: tuple[int, int] | None = None) -> Image.Image:
    return Image.new("RGB", size or rng.choice(SIZES), shade(rng, BACKGROUNDS[background]))


def shape(image: Image.Image, kind: str, centre: Point, radius: float, colour: Colour, turn: float = 0.0) -> None:
    """Draws a filled shape; `turn` in turns."""
    draw, (x, y) = ImageDraw.Draw(image), centre
    if kind == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif kind == "cross":
        for bar in ((1.0, 0.3), (0.3, 1.0)):
            corners = [(sx * bar[0] * radius, sy * bar[1] * radius) for sx, sy in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
            draw.polygon([_turned(c, centre, turn) for c in corners], fill=colour)
    else:
        corners = [(math.sin(a * math.tau) * d * radius, -math.cos(a * math.tau) * d * radius) for a, d in CORNERS[kind]]
        draw.polygon([_turned(c, centre, turn) for c in corners], fill=colour)


def _turned(corner: Point, centre: Point, turn: float) -> Point:
    sine, cosine = math.sin(turn * math.tau), math.cos(turn * math.tau)
    return centre[0] + corner[0] * cosine - corner[1] * sine, centre[1] + corner[0] * sine + corner[1] * cosine


def digit(image: Image.Image, text: str, centre: Point, height: int, colour: Colour, degrees: float) -> None:
    """Draws one digit in Pillow's own font, turned a little."""
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).text(centre, text, fill=255, font=_font(height), anchor="mm")
    mask = mask.rotate(degrees, Image.Resampling.BICUBIC, center=centre)
    image.paste(Image.new("RGB", image.size, colour), mask=mask)


@functools.cache
def _font(height: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(height)


def bars(image: Image.Image, heights: tuple[int, ...], colours: list[Colour]) -> None:
    """A bar chart: heights in tenths of the picture, from left to right, on a common floor."""
    draw, count = ImageDraw.Draw(image), len(heights)
    step, floor = image.width / count, image.height - 4
    for i, (height, colour) in enumerate(zip(heights, colours, strict=True)):
        left = i * step + 0.18 * step
        draw.rectangle((left, floor - height * (image.height - 8) / 10, left + 0.64 * step, floor), fill=colour)


def spread(rng: random.Random, size: tuple[int, int], count: int, radius: float) -> list[Point] | None:
    """Centres of so many circles of a radius that do not touch, inside a picture; None if they were not found."""
    found: list[Point] = []
    for _ in range(60 * count):
        point = tuple(rng.uniform(radius + 1, side - radius - 1) for side in size)
        if all(math.dist(point, other) > 2 * radius + 3 for other in found):
            found.append(point)
            if len(found) == count:
                return found
    return None


def data_url(image: Image.Image) -> str:
    """The picture as it stands in a line of JSON."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
