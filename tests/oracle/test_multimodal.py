"""Prompts with images and videos against transformers, live: positions, logits, greedy tokens; batches, chunks, meshes."""

from __future__ import annotations

import dataclasses
import functools
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the oracle needs torch")
pytest.importorskip("transformers", minversion="5.23", reason="the oracle needs transformers 5.23 or newer")

import qwen35_jax  # noqa: E402
from qwen35_jax.generate.multimodal import Prepared, as_pictures, place  # noqa: E402
from tests.oracle import compare, hf_models  # noqa: E402

NEW_TOKENS = 24
SIZES = {"size": {"shortest_edge": 64, "longest_edge": 16384}}  # tiles of 8 x 8 pixels: a patch is 4 x 4, four are one token


@dataclasses.dataclass(frozen=True)
class Shown:
    """A prompt: numbers are runs of that much text, arrays images, pairs videos with their frames per second."""

    parts: tuple

    @property
    def images(self) -> list[np.ndarray]:
        return [p for p in self.parts if isinstance(p, np.ndarray)]

    @property
    def videos(self) -> list[tuple[np.ndarray, float]]:
        return [p for p in self.parts if isinstance(p, tuple)]


def picture(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def clip(frames: int, height: int = 16, width: int = 24, fps: float = 2.0) -> tuple[np.ndarray, float]:
    return np.random.default_rng(frames).integers(0, 256, (frames, height, width, 3), np.uint8), fps


PROMPTS = {
    "one image": Shown((20, picture(48, 64, 1), 30)),
    "one image first": Shown((picture(40, 40, 2), 9)),
    "several images": Shown((5, picture(48, 64, 1), 11, picture(16, 80, 2), picture(8, 8, 3), 70, picture(51, 37, 4), 4)),
    "videos": Shown((3, clip(2), 8, clip(9, 24, 16), 5)),
    "both": Shown((250, picture(48, 64, 1), 17, clip(5), picture(64, 24, 2), clip(3, 32, 8), 160, picture(24, 8, 5))),
    "text": Shown((150,)),
} | {f"{n} frames": Shown((6, clip(n), 12)) for n in range(2, 10)}  # fmt: skip
LONG = "both"


class Pictured:
    """What the oracle says about prompts with pictures, and our model of the same checkpoint."""

    def __init__(self, reference):
        self.reference, self.model, self.case = reference, reference.oracle.model, reference.case
        for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
            with open(f"{reference.directory}/{name}", "w") as file:
                json.dump(SIZES, file)
        self.lm = functools.cache(lambda mesh: qwen35_jax.load(reference.directory, mesh=mesh, dtype="float32"))
        self.prepared = functools.cache(self.prepared)
        self.logits = functools.cache(self.logits)
        self.greedy = functools.cache(self.greedy)

    def prepared(self, name: str) -> Prepared:
        """Ids with expanded placeholders: each frame of a video behind its time (three tokens) and between start and end."""
        shown, v = PROMPTS[name], self.case.vocab
        image, video, start, end = (v - n for n in (2, 3, 4, 5))
        visuals = self.lm("1x1").vision.read(as_pictures(shown.images, shown.videos))
        waiting = {kind: [x for x in visuals if x.kind == kind] for kind in ("image", "video")}
        draw, ids = np.random.default_rng(len(name)), []
        for part in shown.parts:
            if isinstance(part, int):
                ids += draw.integers(0, v - 8, part).tolist()
            elif isinstance(part, tuple):
                one = waiting["video"].pop(0)
                for _ in range(one.grid[0]):
                    ids += [*draw.integers(0, v - 8, 3).tolist(), start, *[video] * one.frame_tokens, end]
            else:
                ids += [start, *[image] * waiting["image"].pop(0).tokens, end]
        return Prepared([int(i) for i in ids], tuple(visuals))

    def inputs(self, name: str, more: list[int] = ()) -> dict:
        """Arguments of transformers' forward pass."""
        prepared, v = self.prepared(name), self.case.vocab
        result = hf_models.pictured_inputs(dataclasses.replace(prepared, token_ids=prepared.token_ids + list(more)), v - 2, v - 3)
        self.model.model.rope_deltas = None  # transformers keeps those of the last call
        return result

    @torch.inference_mode()
    def logits(self, name: str, more: tuple[int, ...] = ()) -> np.ndarray:
        return self.model(**self.inputs(name, list(more)), use_cache=False).logits[0].numpy()

    @torch.inference_mode()
    def greedy(self, name: str) -> list[int]:
        out = self.model(**self.inputs(name), use_cache=True)
        tokens = [int(out.logits[0, -1].argmax())]
        while len(tokens) < NEW_TOKENS:
            out = self.model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)
            tokens.append(int(out.logits[0, -1].argmax()))
        return tokens

    def check_greedy(self, name: str, tokens: list[int], label: str, error: float) -> None:
        count = len(self.prepared(name).token_ids)
        compare.check_greedy(
            self.greedy(name), tokens, lambda said: self.logits(name, tuple(said))[count - 1 : -1], f"{label}, {name}", error
        )


@pytest.fixture(scope="module")
def pictured(references):
    return functools.cache(lambda name: Pictured(references(name)))


@pytest.mark.parametrize("name", PROMPTS)
def test_positions_and_offset(pictured, name):
    p = pictured("vision")
    inputs, prepared = p.inputs(name), p.prepared(name)
    kinds = inputs.get("mm_token_type_ids", torch.zeros_like(inputs["input_ids"]))
    grids = {key: inputs.get(key) for key in ("image_grid_thw", "video_grid_thw")}
    expected, offset = p.model.model.get_rope_index(inputs["input_ids"], kinds, **grids)
    rows = [np.zeros((x.tokens, 1)) for x in prepared.visuals]
    placed = place(prepared.token_ids, prepared.visuals, rows, p.lm("1x1").config)
    np.testing.assert_array_equal(placed.positions, expected[:, 0].numpy())
    assert placed.offset == int(offset)
    assert sum(s.count for s in placed.spans) == sum(x.tokens for x in prepared.visuals)


@pytest.mark.parametrize(
    ("case", "name"),
    [("vision", name) for name in ("one image", "several images", "videos", LONG)] + [("vision_moe", LONG)],
)
def test_logits(pictured, case, name):
    p = pictured(case)
    shown, prepared = PROMPTS[name], p.prepared(name)
    logits = p.lm("1x1").logits([prepared.token_ids], images=shown.images, videos=shown.videos)
    compare.check(p.logits(name), np.asarray(logits)[0], f"{case}, {name}, {len(prepared.token_ids)} tokens")


def test_logits_of_clips(pictured):
    """Two to nine frames, all in one packed row: an odd number repeats its last frame."""
    p = pictured("vision")
    names = [f"{n} frames" for n in range(2, 10)]
    ids = [p.prepared(name).token_ids for name in names]
    segments = np.concatenate([np.full(len(x), i) for i, x in enumerate(ids, 1)])
    videos = [v for name in names for v in PROMPTS[name].videos]
    logits = np.asarray(p.lm("1x1").logits([sum(ids, [])], segment_ids=segments[None], videos=videos))[0]
    for i, name in enumerate(names, 1):
        compare.check(p.logits(name), logits[segments == i], name)


@pytest.mark.parametrize("mesh", ("1x1", "4x2", "8x1"))
def test_greedy_tokens(pictured, mesh):
    """A batch of prompts of unequal length, one of them text alone, in one piece and in chunks that cut through pictures."""
    p = pictured("vision")
    names = ("text", "one image", "videos", LONG)
    ids, image = p.prepared(LONG).token_ids, p.case.vocab - 2
    assert any(ids[end - 1] == ids[end] == image for end in range(64, len(ids), 64)), "no chunk of 64 ends inside an image"
    lm, prompts = p.lm(mesh), [p.prepared(name) for name in names]
    shown = PROMPTS[LONG]
    logits = lm.logits([prompts[-1].token_ids], images=shown.images, videos=shown.videos)
    error = compare.check(p.logits(LONG), np.asarray(logits)[0], f"{LONG} on {mesh}").error
    for chunk in (64, 2048) if mesh == "1x1" else (64,):
        answers = lm.generate(prompts, max_new_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, prefill_chunk=chunk)
        for name, answer in zip(names, answers, strict=True):
            p.check_greedy(name, answer.token_ids, f"{mesh}, chunks of {chunk}", error)


def test_text_beside_pictures_says_what_it_says_alone(pictured):
    p = pictured("vision")
    options = {"max_new_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    together = p.lm("1x1").generate([p.prepared("one image"), p.prepared("text")], **options)[1]
    assert together.token_ids == p.lm("1x1").generate([p.prepared("text").token_ids], **options)[0].token_ids
