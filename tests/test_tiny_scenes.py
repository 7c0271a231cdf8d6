"""The pictures of the packaged model: none that is held out is shown in training, and the answers are what the pixels say."""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import random
import shutil

import numpy as np
import pytest

from benchmarks import tiny_skills
from qwen35_jax.config import ASSETS
from qwen35_jax.errors import UserError
from qwen35_jax.vision_io import VisionSettings
from scripts import tiny_drawing, tiny_pictures, tiny_scenes, tiny_tower
from scripts.tiny_cases import held_out
from scripts.tiny_drawing import COLOURS


def scenes(kind: str, count: int, held: bool = False) -> list[tiny_scenes.Scene]:
    rng = random.Random(f"{kind} {held}")
    return [tiny_scenes.scene(rng, held, kind) for _ in range(count)]


def drawn(frame) -> np.ndarray:
    """bool [H, W]: pixels that are not background (that of the corner)."""
    pixels = np.asarray(frame).astype(int)
    return np.abs(pixels - pixels[0, 0]).max(axis=2) > 30


def pieces(mask: np.ndarray) -> int:
    """Connected pieces of a mask, diagonals included."""
    left, count = {tuple(p) for p in np.argwhere(mask)}, 0
    while left:
        queue, count = [left.pop()], count + 1
        while queue:
            y, x = queue.pop()
            for near in itertools.product((y - 1, y, y + 1), (x - 1, x, x + 1)):
                if near in left:
                    left.remove(near)
                    queue.append(near)
    return count


def centre(frame) -> np.ndarray:
    """(x, y) of what is drawn, from 0 to 1."""
    mask = drawn(frame)
    return np.argwhere(mask).mean(axis=0)[::-1] / np.array(mask.shape)[::-1]


def nearest(pixel) -> str:
    return min(COLOURS, key=lambda name: np.abs(np.array(COLOURS[name]) - pixel).sum())


def colours(frame, mask) -> list[str]:
    """Colours of the pixels of a mask, the most frequent first."""
    found, counts = np.unique([nearest(p) for p in np.asarray(frame).astype(int)[mask]], return_counts=True)
    return [str(c) for c in found[np.argsort(-counts)]]


@pytest.mark.parametrize("kind", tiny_scenes.KINDS)
def test_no_held_out_scene_is_in_training(kind):
    training, held = scenes(kind, 300), scenes(kind, 100, held=True)
    assert not any(held_out(s.name) for s in training) and all(held_out(s.name) for s in held)
    assert not {s.name for s in training} & {s.name for s in held}


def looks(scene: tiny_scenes.Scene) -> set[tuple[str, str, str]]:
    """(colour, shape, background) of all that is shown, from the scene's name."""
    kind, case = scene.name.split(":", 1)
    match kind, ast.literal_eval(case):
        case "shape", look:
            return {look}
        case (("count" | "place" | "motion"), (_, look)):
            return {look}
        case "pair", (_, one, other, background):
            return {(*one, background), (*other, background)}
        case "order", (first, last, shape, background):
            return {(first, shape, background), (last, shape, background)}
    return set()  # digits and bars


def test_no_held_out_look_is_in_training_under_another_kind():
    held = set().union(*(looks(s) for s in scenes("single", 300, held=True)))
    shown = [set().union(*(looks(s) for s in scenes(kind, 600))) for kind in tiny_scenes.KINDS]
    assert len(held) > 15 and sum(map(bool, shown)) == 6
    assert not held & set().union(*shown)


def test_counts_and_colours():
    for scene in scenes("counted", 60):
        mask = drawn(scene.frames[0])
        assert f" {pieces(mask)} " in scene.asked[0].answer
        asked = {a.skill: a.answer for a in scene.asked}
        assert asked["colour"].removesuffix(".").split()[-1] == colours(scene.frames[0], mask)[0]
        assert asked["shape"].split()[-1] == asked["count to five"].split()[-1]  # They are crosses. There are 3 crosses.
    for scene in scenes("single", 60):
        asked = {a.skill: a.answer for a in scene.asked}
        assert asked["colour"] == f"It is {colours(scene.frames[0], drawn(scene.frames[0]))[0]}."
        shape = asked["shape"].removeprefix("It is a ").rstrip(".")
        assert asked["colour and shape"].split()[1:] == [asked["colour"].split()[-1].rstrip("."), f"{shape}."]


def test_places():
    def says(frame) -> str:
        x, y = centre(frame) - 0.5
        if max(abs(x), abs(y)) < 0.13:
            return "in the middle"
        sides = ("on the left", "on the right") if abs(x) > abs(y) else ("at the top", "at the bottom")
        return sides[int((x if abs(x) > abs(y) else y) > 0)]

    for scene in scenes("placed", 60):
        assert scene.asked[0].answer.endswith(f" is {says(scene.frames[0])}.")


def test_pairs():
    for scene in scenes("paired", 60):
        asked, frame = scene.asked[0], scene.frames[0]
        place = next(p for p in tiny_scenes.PLACES if p in asked.question)
        mask = drawn(frame)
        (height, width), half = mask.shape, np.zeros_like(mask)
        sides = {"on the left": (slice(None), slice(0, width // 2)), "on the right": (slice(None), slice(width // 2, None))}
        sides |= {"at the top": (slice(0, height // 2), slice(None)), "at the bottom": (slice(height // 2, None), slice(None))}
        half[sides[place]] = True
        assert asked.answer.split()[1] == colours(frame, mask & half)[0]


def test_charts():
    for scene in scenes("charted", 60):
        asked, frame = {a.skill: a.answer for a in scene.asked}, scene.frames[0]
        mask = drawn(frame)
        tallest, lowest = np.argwhere(mask)[0], np.count_nonzero(mask, axis=0)
        assert asked["tallest bar"] == f"The {nearest(np.asarray(frame)[tuple(tallest + [1, 1])])} bar is the tallest."
        column = int(np.argmin(np.where(lowest > 0, lowest, 10**6)))
        shortest = nearest(np.asarray(frame)[mask.shape[0] - 6, column + 1])
        assert asked["shortest bar"] == f"The {shortest} bar is the shortest."
        assert f" {pieces(mask)} " in asked["number of bars"]


def test_motion_and_order():
    for scene in scenes("moving", 60):
        x, y = centre(scene.frames[-1]) - centre(scene.frames[0])
        way = ("to the left", "to the right")[int(x > 0)] if abs(x) > abs(y) else ("up", "down")[int(y > 0)]
        assert scene.asked[0].answer == f"It moves {way}." and min(abs(x), abs(y)) < 0.01
        assert all(drawn(f).sum() == pytest.approx(drawn(scene.frames[0]).sum(), rel=0.25) for f in scene.frames)  # never cut off
    for scene in scenes("changing", 60):
        asked = {a.skill: a.answer.split()[0].lower() for a in scene.asked}
        seen = [colours(frame, drawn(frame))[0] for frame in scene.frames]
        assert seen == [asked["first colour"]] * 2 + [asked["last colour"]] * 2


def test_lines_are_the_same_every_time_and_hold_their_pictures():
    lines, again = (list(itertools.islice(tiny_pictures.documents(2, 0.4), 60)) for _ in range(2))
    assert lines == again
    shown = [line for line in lines if "data:image/png;base64," in json.dumps(line)]
    assert 20 < len(shown) < 50
    early = list(itertools.islice(tiny_pictures.documents(2, 0.0, first=True), 60))
    said = {" ".join(m["content"].split()[:2]) for line in early for m in line["messages"] if m["role"] == "assistant"}
    known = {"The", "There is", "There are", "It moves", "A", "An"}  # places and bars, counts, motion, pairs
    assert {words if words in known else words.split()[0] for words in said} == known
    assert not any("bars" in m["content"] for line in early for m in line["messages"] if m["role"] == "assistant")
    for line in shown + early:
        assert [m["role"] for m in line["messages"]] == ["user", "assistant"] * (len(line["messages"]) // 2)


def test_what_the_vision_tower_is_trained_on():
    """Pictures, and the first two frames of clips, of one size in a batch, and the number of the answer to each skill, or -1."""
    known, sizes = tiny_tower.answers(0), set()
    shown, draw = tiny_tower.alike(random.Random("tower 0")), tiny_tower.batches(0, known, VisionSettings(patch_size=8))
    for scenes, (patches, places, targets) in itertools.islice(zip(shown, draw, strict=False), 20):
        width, height = scenes[0].frames[0].size
        count = width * height // 64
        sizes.add((width, height))
        assert patches.shape == (tiny_tower.BATCH, count, 3 * 2 * 8 * 8) and targets.shape == (tiny_tower.BATCH, len(known))
        assert places.shape == (count, 4) and (places[:, 2:] == [height // 8, width // 8]).all()
        for mine, target, scene in zip(patches, targets, scenes, strict=True):
            frames = [np.asarray(frame) for frame in scene.frames[:2]]
            first = mine.reshape(count, 3, 2, 8, 8)[0, :, :, 0, 0]  # the pixel in the corner, in both frames
            assert (first == np.stack([frames[0][0, 0], frames[-1][0, 0]], axis=1)).all()
            told = {skill: known[skill][i] for skill, i in zip(known, target, strict=True) if i >= 0}
            assert told and told == {a.skill: a.answer for a in scene.asked if a.skill in known}
    assert sizes == set(tiny_drawing.SIZES)


def test_another_tower_is_not_trained_on(tmp_path):
    shutil.copytree(ASSETS / "tiny", tmp_path / "source")
    config = json.loads((ASSETS / "tiny" / "config.json").read_text())
    config["vision_config"] = tiny_tower.TOWER | {"depth": 2}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    options = argparse.Namespace(source=str(tmp_path / "source"), out=tmp_path / "out", steps=1, seed=0)
    with pytest.raises(UserError, match="has another tower than the one that is trained here"):
        tiny_tower.train(options)
    assert not (tmp_path / "out").exists()


def test_the_benchmark_asks_for_held_out_scenes():
    for name, target, kind in tiny_skills.PICTURE_SKILLS:
        cases = tiny_skills.distinct(tiny_skills.shown(name, kind), name, 20)
        assert len(cases) == 20 and target <= 100 and all(held_out(case.scene) for case in cases)
        assert tiny_skills.score(name, target, cases, [(case.expected, True) for case in cases]).percent == 100
        assert tiny_skills.score(name, target, cases, [("noise", True)] * 20).right == 0
    assert {kind for _, _, kind in tiny_skills.PICTURE_SKILLS} == set(tiny_scenes.KINDS)


def test_a_picture_that_is_drawn_is_seen():
    assert all(tiny_drawing.visible(c, "white") for c in ("red", "black")) and not tiny_drawing.visible("white", "white")
