"""Writes the training data with which the packaged model learns to see, mixed with its text: the same bytes every time.

    python -m scripts.tiny_pictures --out DIR [--first] [--seed 2] [--size 120000] [--text 0.45] [--mixture third]

DIR/train.jsonl has the training side of every scene (`tiny_scenes`) and text of a mixture of `tiny_data`, DIR/eval.jsonl 500
lines of the held-out side. A picture is a data: URL in its line, a clip a list of such. With --first it is what is learned first:
what is hard to find in a tower's rows, and was not found in 3,600 steps where all else was asked as well (docs/lab_notes.md).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from scripts import tiny_data, tiny_drawing, tiny_scenes

EVAL_LINES = 500
FIRST = {"placed": 0.2, "paired": 0.2, "moving": 0.25, "charted": 0.15, "counted": 0.2}  # kinds of scenes, shares
FIRST_SKILLS = ("place", "what is where", "direction of motion", "tallest bar", "shortest bar", "count to five")


def chat(rng: random.Random, held: bool, first: bool = False) -> dict:
    """A scene and one to three questions about it; what is shown stands before the first, now and then behind it."""
    scene = tiny_scenes.scene(rng, held, rng.choices(list(FIRST), list(FIRST.values()))[0] if first else None)
    asked = [one for one in scene.asked if not first or one.skill in FIRST_SKILLS]
    asked = rng.sample(asked, rng.randint(1, len(asked)))
    messages = []
    for i, one in enumerate(asked):
        content: object = one.question
        if not i:
            parts = [scene.part(tiny_drawing.data_url), {"type": "text", "text": one.question}]
            content = parts if rng.random() < 0.9 else parts[::-1]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": one.answer}]
    return {"messages": messages}


def documents(seed: int, text: float, held: bool = False, first: bool = False, mixture: str = "third") -> Iterator[dict]:
    """Lines without end, the share `text` of them without pictures; with `held` of the side that training never shows."""
    rng = random.Random(f"pictures {seed} {'held out' if held else 'training'}")
    texts = tiny_data.documents(seed, held, mixture)
    while True:
        yield next(texts)[1] if rng.random() < text else chat(rng, held, first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for train.jsonl and eval.jsonl")
    parser.add_argument("--first", action="store_true", help="only what is learned first, beside the text")
    parser.add_argument("--seed", type=int, default=2, help="of everything that is drawn (default: %(default)s)")
    parser.add_argument("--size", type=int, default=120_000, help="documents to train on (default: %(default)s)")
    parser.add_argument("--text", type=float, default=0.45, help="share of them without pictures (default: %(default)s)")
    parser.add_argument("--mixture", choices=tiny_data.MIXTURES, default="third", help="of the text (default: %(default)s)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, held, size in (("train", False, options.size), ("eval", True, EVAL_LINES)):
        path = options.out / f"{name}.jsonl"
        found = documents(options.seed, options.text, held, options.first, options.mixture)
        with path.open("w", encoding="utf-8", newline="\n") as file:
            for _ in range(size):
                file.write(json.dumps(next(found), ensure_ascii=False) + "\n")
        print(f"{path}: {size} documents, {path.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
