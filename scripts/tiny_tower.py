"""Trains the packaged model's vision tower before the text model sees it: to tell the answers apart by its rows alone.

    python -m scripts.tiny_tower --source TEXT_MODEL --out DIR [--steps 5000] [--seed 0]

DIR becomes a checkpoint of the source's text model, unchanged, with the tower, from which configs/tiny_vision.py goes on; a tower
that the source has is trained on. Read by the text model from the start, a random tower learns colours and little else
(docs/lab_notes.md). Here the mean of a picture's rows is read by one matrix, which is thrown away. The tower is described below,
in `TOWER`; how large pictures are, in qwen35_jax/assets/tiny.
"""

from __future__ import annotations

import argparse
import collections
import random
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from qwen35_jax.checkpoint import check_export_target, export_hf
from qwen35_jax.config import ASSETS
from qwen35_jax.errors import UserError
from qwen35_jax.model import VisionModel
from qwen35_jax.ops.norm import rms_norm
from qwen35_jax.train.config import MAX_SEED, default_config
from qwen35_jax.train.optimizer import make_optimizer
from qwen35_jax.train.partition import logical_axes
from qwen35_jax.train.run import find_origin, initial_state, make_run
from qwen35_jax.train.vision import settings
from qwen35_jax.vision_io import VisionSettings, image_visual, patch_places, video_visual
from scripts import tiny_drawing, tiny_scenes

TOWER = {
    "depth": 4,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_heads": 4,
    "out_hidden_size": 128,
    "in_channels": 3,
    "patch_size": 8,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "num_position_embeddings": 64,
}
BATCH, REPORT_EVERY = 64, 100
# Those whose answer is in one picture, or two frames, whatever the question's words are.
BARS = ("tallest bar", "shortest bar", "number of bars")
SKILLS = ("colour", "shape", "digit", "count to five", "place", *BARS, "direction of motion")
VOCABULARY_SCENES = 6000  # enough to meet every answer
MOST_PATCHES = max(width * height for width, height in tiny_drawing.SIZES) // TOWER["patch_size"] ** 2


def run_config(options: argparse.Namespace) -> ConfigDict:
    """A run's configuration, as far as it is about weights and the optimizer."""
    c = default_config()
    c.model.source, c.seed, c.steps, c.dtype = options.source, options.seed, options.steps, "float32"
    c.model.tokenizer = str(ASSETS / "tiny")
    c.data.patches = MOST_PATCHES
    o = c.optimizer
    o.name, o.learning_rate, o.muon_learning_rate, o.schedule, o.final_fraction = "muon", 2e-3, 5e-3, "cosine", 0.02
    o.warmup_steps = min(o.warmup_steps, options.steps)
    return c


def scenes(rng: random.Random):
    """Scenes of the training side about which something of SKILLS is asked, without end."""
    while True:
        scene = tiny_scenes.scene(rng, False)
        if any(asked.skill in SKILLS for asked in scene.asked):
            yield scene


def alike(rng: random.Random):
    """BATCH scenes of one size, without end: those of each size together as soon as there are so many."""
    waiting = collections.defaultdict(list)
    for scene in scenes(rng):
        size = scene.frames[0].size
        waiting[size].append(scene)
        if len(waiting[size]) == BATCH:
            yield waiting.pop(size)


def answers(seed: int) -> dict[str, list[str]]:
    """All answers of each skill."""
    found: dict[str, set[str]] = {skill: set() for skill in SKILLS}
    source = scenes(random.Random(f"answers {seed}"))
    for _ in range(VOCABULARY_SCENES):
        for asked in next(source).asked:
            if asked.skill in found:
                found[asked.skill].add(asked.answer)
    return {skill: sorted(known) for skill, known in found.items()}


def batches(seed: int, known: dict[str, list[str]], looked_at: VisionSettings):
    """(patches uint8 [BATCH, P, width], their places int32 [P, 4], numbers of the answers or -1 int32 [BATCH, skills])."""
    number = {s: {a: i for i, a in enumerate(known[s])} for s in SKILLS}
    for shown in alike(random.Random(f"tower {seed}")):
        targets = np.full((BATCH, len(SKILLS)), -1, np.int32)
        for row, scene in zip(targets, shown, strict=True):
            for asked in scene.asked:
                if asked.skill in number:
                    row[SKILLS.index(asked.skill)] = number[asked.skill].get(asked.answer, -1)
        width, height = (side // TOWER["patch_size"] for side in shown[0].frames[0].size)
        places = patch_places(height, width, TOWER["spatial_merge_size"])
        yield np.stack([_patches(scene, looked_at) for scene in shown]), places, targets


def _patches(scene: tiny_scenes.Scene, looked_at: VisionSettings) -> np.ndarray:
    """Of the picture, or of the first two frames of a clip."""
    frames = np.stack([np.asarray(frame) for frame in scene.frames[:2]])
    if len(frames) == 1:
        return image_visual(frames[0], looked_at).patches
    return video_visual(frames, (0.0, 1 / tiny_scenes.FPS), looked_at).patches


def make_loss(tower: VisionModel, known: dict[str, list[str]]):
    """(parameters, patches, places, targets) -> (mean cross entropy, right answers int32 [BATCH, skills])."""
    ends = np.cumsum([len(known[skill]) for skill in SKILLS])

    def loss(params: dict, patches: jax.Array, places: jax.Array, targets: jax.Array):
        at = jnp.broadcast_to(places, (len(patches), *places.shape))
        rows = tower(params["vision"], patches, at, jnp.ones(at.shape[:2], jnp.int32))
        read = rms_norm(rows.mean(axis=1), jnp.zeros(rows.shape[-1])) @ params["head"] + params["bias"]
        logits = jnp.split(read, ends[:-1], axis=-1)
        asked = targets >= 0
        losses = [
            optax.softmax_cross_entropy_with_integer_labels(x, jnp.maximum(t, 0)) for x, t in zip(logits, targets.T, strict=True)
        ]
        right = jnp.stack([x.argmax(axis=-1) for x in logits], axis=1) == targets
        return jnp.sum(jnp.stack(losses, axis=1) * asked) / jnp.sum(asked), right

    return loss


def train(options: argparse.Namespace) -> None:
    if options.steps < 1 or not 0 <= options.seed <= MAX_SEED:
        raise UserError(f"--steps must be at least 1, and --seed from 0 to {MAX_SEED}")
    check_export_target(options.out)
    config = run_config(options)
    had = find_origin(config).config.vision
    if had is None:
        config.model.vision.update(TOWER)
    elif any(getattr(had, name) != value for name, value in TOWER.items()):
        raise UserError(f"{options.source} has another tower than the one that is trained here")
    origin = find_origin(config)
    run = make_run(config, origin)
    state, known = initial_state(run), answers(options.seed)
    width, classes = TOWER["out_hidden_size"], sum(map(len, known.values()))
    params = {"vision": state["params"]["vision"], "head": jnp.zeros((width, classes)), "bias": jnp.zeros(classes)}
    axes = {"vision": logical_axes(run.model, run.tower)["vision"], "head": "D V", "bias": "V"}
    optimizer = make_optimizer(config.optimizer, config.steps, axes, params)
    gradient = jax.value_and_grad(make_loss(run.tower, known), has_aux=True)

    @jax.jit
    def step(params, moments, patches, places, targets):
        (loss, right), grads = gradient(params, patches, places, targets)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, loss, right

    moments, begin, seen = optimizer.init(params), time.perf_counter(), []
    data = batches(options.seed, known, settings(config.data, origin.tokenizer_dir, run.model.config.vision))
    for i in range(1, config.steps + 1):
        patches, places, targets = next(data)
        params, moments, loss, right = step(params, moments, patches, places, targets)
        seen.append((loss, right, targets >= 0))
        if i % REPORT_EVERY == 0 or i == config.steps:
            report(i, config.steps, seen, time.perf_counter() - begin)
            seen.clear()
    state["params"]["vision"] = params["vision"]
    export_hf(run.merged(state), run.model.config, options.out, template_dir=origin.tokenizer_dir, hf_config=origin.hf_config)


def report(step: int, steps: int, seen: list, seconds: float) -> None:
    """One line: of the pictures since the last one, each of which was new when it was asked about."""
    losses, right, asked = (np.asarray(jax.device_get(part)) for part in zip(*seen, strict=True))
    shares = [f"{skill} {100 * right[..., i].sum() / max(1, asked[..., i].sum()):.0f}" for i, skill in enumerate(SKILLS)]
    print(f"step {step}/{steps}  {seconds:.0f} s  loss {losses.mean():.3f}  right, %: {', '.join(shares)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint to write")
    parser.add_argument("--source", required=True, help="checkpoint to give a tower, or with this one: a directory, or tiny")
    parser.add_argument("--steps", type=int, default=5000, help="of 64 pictures (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default: %(default)s)")
    try:
        train(parser.parse_args())
    except UserError as e:
        parser.error(str(e))


if __name__ == "__main__":
    main()
