"""Writes tests/golden: two tiny checkpoints and what transformers computes with them, for tests without torch.

    python -m tests.oracle.make_golden

Each folder holds a Hugging Face checkpoint and expected.npz (numbers in fp32): `ids` [120], `logits` [120, V], `states`
(hidden states [layers + 1, positions, D] at `positions`), `greedy` (the 32 tokens that follow), `greedy_margin` (the
least lead of the best logit while they are chosen) and, where the model has such a layer, `mtp_logits` [119, V]. Where it has
a vision tower, vision.npz holds the tower's `rows` [tokens, D] for the `patches` (uint8 [N, values]) of `grids` [pictures, 3].

resize.npz: `pixels` and what torch's uint8 kernel, bicubic with antialiasing, makes of them at other sizes (`64x96` …).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.oracle import hf_models

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENS, NEW_TOKENS = 120, 32
GRIDS = ((1, 4, 6), (3, 2, 4))
POSITIONS = (0, 1, 3, 63, 64, 100, 119)
SMALL = {"hidden": 32, "vocab": 256, "head_dim": 32, "gdn_head_dim": 16}
CASES = (
    hf_models.Case("dense", (4, 2), (4, 2), ffn=64, mtp=True, seed=103, **SMALL),
    hf_models.Case(
        "moe", (4, 1), (6, 2), experts=(6, 2, 16, 24), tied=True, vision=False, interval=2, layers=4, seed=102, **SMALL
    ),
)


def write(case: hf_models.Case, directory: Path) -> None:
    oracle = hf_models.build(case)
    hf_models.save(oracle, directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    ids = hf_models.random_tokens(case, (1, TOKENS), seed=case.seed)
    logits, states = hf_models.full_forward(oracle, ids, layers=True)
    greedy = hf_models.greedy(oracle, ids, NEW_TOKENS)
    best = hf_models.full_forward(oracle, torch.cat([ids, greedy], dim=1))[0, TOKENS - 1 : -1].topk(2).values
    expected = {
        "ids": ids[0].numpy().astype(np.int32),
        "logits": logits[0].numpy(),
        "positions": np.array(POSITIONS, np.int32),
        "states": torch.stack([x[0, list(POSITIONS)] for x in states]).numpy(),
        "greedy": greedy[0].numpy().astype(np.int32),
        "greedy_margin": (best[:, 0] - best[:, 1]).min().numpy(),
        "transformers": np.array(transformers.__version__),
    }
    if oracle.mtp:
        expected["mtp_logits"] = hf_models.mtp_logits(oracle, ids)[0].numpy()
    np.savez_compressed(directory / "expected.npz", **expected)
    size = sum(f.stat().st_size for f in directory.iterdir())
    print(json.dumps({"case": case.name, "bytes": size, "greedy_margin": float(expected["greedy_margin"])}))


@torch.inference_mode()
def write_vision(case: hf_models.Case, directory: Path) -> None:
    tower = hf_models.build(case).model.model.visual
    grids = np.array(GRIDS, np.int32)
    width = 3 * 2 * tower.config.patch_size**2
    patches = np.random.default_rng(case.seed).integers(0, 256, (grids.prod(axis=1).sum(), width), np.uint8)
    pixels = torch.tensor((patches.astype(np.float32) - 127.5) / 127.5)
    rows = tower(pixels, grid_thw=torch.tensor(grids, dtype=torch.long)).pooler_output.numpy()
    np.savez_compressed(directory / "vision.npz", grids=grids, patches=patches, rows=rows)


def write_resize(file: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 41, 3), np.uint8)
    channels = torch.tensor(pixels).permute(2, 0, 1)[None]
    arrays = {"pixels": pixels}
    for size in ((32, 32), (32, 64), (16, 64), (20, 30)):
        scaled = torch.nn.functional.interpolate(channels, size, mode="bicubic", antialias=True)
        arrays[f"{size[0]}x{size[1]}"] = scaled[0].permute(1, 2, 0).numpy()
    np.savez_compressed(file, **arrays)


def main() -> None:
    write_resize(GOLDEN / "resize.npz")
    for case in CASES:
        write(case, GOLDEN / case.name)
        if case.vision:
            write_vision(case, GOLDEN / case.name)


if __name__ == "__main__":
    main()
