"""A checkpoint as the published FP8 ones are: linear layers in e4m3 with a bfloat16 scale for each 128x128 block.

Layers and names are those of the published files: projections of attention and Gated DeltaNet, dense, routed and shared experts,
MTP's too; one tensor for each expert and projection; `….weight_scale_inv` beside `….weight`. Embedding, head, norms, router,
gates, convolutions, decay, the projections of a and b, mtp.fc and the vision tower stay as they are.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np
from etils import epath

from qwen35_jax.checkpoint.accounting import FP8
from qwen35_jax.checkpoint.canonical import CanonicalSource, source_has_mtp
from qwen35_jax.checkpoint.names import BLOCK, scale_name, scale_shape, tensor_parts
from qwen35_jax.checkpoint.safetensors_file import Index
from qwen35_jax.checkpoint.shards import Spec, nbytes, shards_of, write_shards
from qwen35_jax.config import ModelConfig
from qwen35_jax.errors import UserError
from qwen35_jax.ops.fp8 import quantize_weight

BF16 = np.dtype(ml_dtypes.bfloat16)
PIECE_ELEMENTS = 1 << 24  # of a weight that is quantised at once
PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclasses.dataclass(frozen=True)
class Part:
    """A tensor of the result: rows of a tensor of the source, or of one of its experts. `quantise`: to FP8."""

    source: str
    shape: tuple[int, ...]
    dtype: np.dtype
    quantise: bool
    index: Index = ()


class Quantised:
    """The FP8 checkpoint that a source makes: `tensors` (dtype and shape by name), and their data, made as it is written."""

    def __init__(self, source: CanonicalSource, config: ModelConfig):
        if any(entry.dtype == FP8 for entry in source.tensors.values()):
            raise UserError(
                f"{source.directory} holds FP8 weights already: quantise the BF16 checkpoint that they were made from"
            )
        self.source = source
        self.parts = dict(_parts(source, config))
        self.tensors: dict[str, Spec] = {}
        for name, part in self.parts.items():
            self.tensors[name] = (FP8 if part.quantise else part.dtype, part.shape)
            if part.quantise:
                self.tensors[scale_name(name)] = (BF16, scale_shape(part.shape, 1))
        self._scales: dict[str, np.ndarray] = {}

    @property
    def nbytes(self) -> int:
        return sum(nbytes(spec) for spec in self.tensors.values())

    def config(self) -> dict[str, Any]:
        """config.json of the result: that of the source, and which modules are not FP8."""
        modules = {
            n.rpartition(".")[0] for n, part in self.parts.items() if not part.quantise and n.endswith((".weight", ".bias"))
        }
        fp8 = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": sorted(modules),
        }
        return {**self.source.config, "quantization_config": fp8}

    def write(self, directory: epath.Path, advance: Callable[[int], None]) -> None:
        """Weights and config.json. One piece of a tensor is in memory at a time; `advance` is told the bytes written."""
        directory.mkdir()
        write_shards(directory, self.tensors, shards_of(self.tensors), functools.partial(self._data, advance))
        (directory / "config.json").write_text(json.dumps(self.config(), indent=2, ensure_ascii=False) + "\n")

    def _data(self, advance: Callable[[int], None], names: list[str]) -> Iterator[np.ndarray]:
        for name in names:
            pieces = [self._scales.pop(name)] if name in self._scales else self._pieces(name, self.parts[name])
            for piece in pieces:
                yield piece
                advance(piece.nbytes)

    def _pieces(self, name: str, part: Part) -> Iterator[np.ndarray]:
        """The tensor in whole blocks of rows; its scales are kept until it is their turn, next."""
        scales = []
        for piece in self._rows(part):
            if part.quantise:
                piece, scale = (np.asarray(a) for a in _quantise(piece))
                scales.append(scale)
            yield piece
        if part.quantise:
            self._scales[scale_name(name)] = np.concatenate(scales)
        self.source.release(part.source)

    def _rows(self, part: Part) -> Iterator[np.ndarray]:
        if not part.shape:
            yield self.source.read(part.source)
            return
        step = max(1, PIECE_ELEMENTS // max(1, int(np.prod(part.shape[1:])) * BLOCK)) * BLOCK
        lead, rows = part.index[:-1], part.index[-1] if part.index else slice(0, part.shape[0])
        for start in range(rows.start, rows.stop, step):
            piece = self.source.read(part.source, (*lead, slice(start, min(start + step, rows.stop))))
            yield piece[0] if lead else piece


@jax.jit
def _quantise(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    w = quantize_weight(rows, (0, 1))
    return w.values, w.scales


def _parts(source: CanonicalSource, config: ModelConfig) -> Iterator[tuple[str, Part]]:
    views = tensor_parts(config, mtp=source_has_mtp(source))
    for name, entry in source.tensors.items():
        fp8 = name in views and views[name][0][1].fp8
        base, _, kind = name.rpartition(".")
        if kind not in PROJECTIONS:
            yield name, Part(name, entry.shape, entry.dtype, fp8)
            continue
        experts, rows, columns = entry.shape  # routed experts, fused
        height = rows // len(PROJECTIONS[kind])
        for e in range(experts):
            for i, projection in enumerate(PROJECTIONS[kind]):
                index = slice(e, e + 1), slice(i * height, (i + 1) * height)
                yield f"{base}.{e}.{projection}.weight", Part(name, (height, columns), entry.dtype, fp8, index)
