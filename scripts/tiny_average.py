"""Writes a checkpoint whose weights are the average of others', which were trained from the same weights.

    python -m scripts.tiny_average FIRST SECOND … --shares 0.6 0.4 --out DIR

All that is not weights is the first's. Runs that part from the same weights err in different cases, and their average in fewer
than each (Wortsman et al., 2022: Model soups, arXiv 2203.05482).
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np

from qwen35_jax.checkpoint import check_export_target
from qwen35_jax.checkpoint.safetensors_file import SafetensorsFile, make_header, write_safetensors
from qwen35_jax.errors import UserError

WEIGHTS = "model.safetensors"


def average(directories: list[Path], shares: list[float], out: Path) -> None:
    """Writes `out`, in the dtypes of the first. UserError where they do not go together or shares are not one each, 1 in all."""
    if len(shares) != len(directories) or not abs(sum(shares) - 1) <= 1e-6:
        raise UserError(f"--shares {shares}: give one for each of the {len(directories)} directories, 1 in all")
    for directory in directories:
        if not (directory / WEIGHTS).is_file():
            raise UserError(f"{directory} has no {WEIGHTS}: name a directory that --export_hf wrote, with one file of weights")
    check_export_target(out)
    files = [SafetensorsFile(directory / WEIGHTS) for directory in directories]
    shapes = [{name: info.shape for name, info in file.tensors.items()} for file in files]
    for directory, other in zip(directories, shapes, strict=True):
        if wrong := sorted({name for name, _ in shapes[0].items() ^ other.items()}):
            raise UserError(f"{directory} differs from {directories[0]} in {len(wrong)} tensors, such as {wrong[0]}")
    if small := [name for name, info in files[0].tensors.items() if info.dtype.itemsize < 2]:
        raise UserError(
            f"{directories[0]}: {small[0]} is in FP8, whose numbers mean nothing without their scales; average before quantising"
        )
    out.mkdir(parents=True, exist_ok=True)
    for path in directories[0].iterdir():
        if path.is_file() and path.name != WEIGHTS:
            shutil.copy(path, out)
    tensors = files[0].tensors
    header = make_header({name: (info.dtype, info.shape) for name, info in tensors.items()}, {"format": "pt"})
    write_safetensors(out / WEIGHTS, header, (_mean([f.read(name) for f in files], shares) for name in tensors))


def _mean(values: list[np.ndarray], shares: list[float]) -> np.ndarray:
    return sum(share * value.astype(np.float32) for share, value in zip(shares, values, strict=True)).astype(values[0].dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directories", type=Path, nargs="+", help="checkpoints of one model")
    parser.add_argument("--shares", type=float, nargs="+", required=True, help="of each, 1 in all")
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint to write")
    options = parser.parse_args()
    try:
        average(options.directories, options.shares, options.out)
    except UserError as e:
        parser.error(str(e))


if __name__ == "__main__":
    main()
