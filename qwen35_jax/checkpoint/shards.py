"""Safetensors files of at most 5 GB and their index, as Hugging Face repositories have them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from etils import epath

from qwen35_jax.checkpoint.safetensors_file import make_header, write_safetensors
from qwen35_jax.checkpoint.source import INDEX, SINGLE

SHARD_BYTES = 5_000_000_000

Spec = tuple[np.dtype, tuple[int, ...]]


def shards_of(tensors: Mapping[str, Spec]) -> list[list[str]]:
    """Names in order, cut where a file would grow beyond SHARD_BYTES."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in tensors.items():
        if shards[-1] and size + nbytes(spec) > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes(spec)
    return shards


def write_shards(
    directory: epath.Path,
    tensors: Mapping[str, Spec],
    shards: list[list[str]],
    data: Callable[[list[str]], Iterable[np.ndarray]],
) -> None:
    """One file, or several and their index. `data(names)` yields the tensors of a file in order, in pieces of any size."""
    files = [SINGLE] if len(shards) == 1 else _file_names(len(shards))
    for file, names in zip(files, shards, strict=True):
        header = make_header({name: tensors[name] for name in names}, {"format": "pt"})
        write_safetensors(directory / file, header, data(names))
    if len(files) > 1:
        size = sum(nbytes(spec) for spec in tensors.values())
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2) + "\n")


def _file_names(count: int) -> list[str]:
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def nbytes(spec: Spec) -> int:
    return spec[0].itemsize * math.prod(spec[1])
