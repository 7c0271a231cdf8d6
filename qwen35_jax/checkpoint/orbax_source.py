"""Reading a converted directory: an Orbax checkpoint with one Zarr array per tensor, and the record of its source.

Slices are read through TensorStore, which Orbax writes with; importing Orbax itself is left to the writer.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from qwen35_jax.checkpoint.safetensors_file import DTYPE_NAMES, DTYPES, Header, Index, is_local, parse_header
from qwen35_jax.checkpoint.source import RECORD, Spec, read_json, text_files
from qwen35_jax.errors import UserError

FORMAT = "qwen35_jax converted checkpoint"
VERSION = 1
STATE = "state"  # where Orbax puts the tree of a checkpoint
REMEDY = "convert the checkpoint again"
CACHE_BYTES = 128 << 20  # so that neighbouring slices of one chunk read it once


@dataclasses.dataclass(frozen=True)
class Stored:
    dtype: np.dtype
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Record:
    """What a conversion wrote down: the tensors as stored, and the source's headers and index, byte for byte."""

    tensors: dict[str, Stored]
    shards: dict[str, Header]
    index: str | None

    def to_json(self, fused: dict[str, bool]) -> str:
        tensors = {
            name: {"dtype": DTYPE_NAMES[t.dtype], "shape": list(t.shape), "fused": fused[name]}
            for name, t in self.tensors.items()
        }
        shards = {name: header.raw.decode() for name, header in self.shards.items()}
        return json.dumps(
            {"format": FORMAT, "version": VERSION, "tensors": tensors, "headers": shards, "index": self.index}, indent=1
        )

    @classmethod
    def read(cls, path: epath.Path) -> Record:
        raw = read_json(path, REMEDY)
        if raw.get("format") != FORMAT or raw.get("version") != VERSION:
            have = f"format {raw.get('format')!r:.50}, version {raw.get('version')!r:.50}"
            raise UserError(f"{path} says {have}; expected {FORMAT!r}, {VERSION}")
        tensors, headers, index = raw.get("tensors"), raw.get("headers"), raw.get("index")
        if not isinstance(tensors, dict) or not isinstance(headers, dict) or not isinstance(index, str | None):
            raise UserError(f"{path} is damaged: {REMEDY}")
        for name in headers:
            _check_name(name, path)
        shards = {name: parse_header(str(text).encode(), f"{path}: {name}") for name, text in headers.items()}
        return cls({name: _stored(name, entry, path) for name, entry in tensors.items()}, shards, index)


def _check_name(name: str, path: epath.Path) -> None:
    if not re.fullmatch(r"[\w-][\w.-]*", name, re.ASCII):
        raise UserError(f"{path} names {name!r:.200}, which is no plain name; {REMEDY}")


def _stored(name: str, entry: Any, path: epath.Path) -> Stored:
    _check_name(name, path)
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape) or entry.get("dtype") not in DTYPES:
        raise UserError(f"{path} is damaged at tensor {name}: {REMEDY}")
    return Stored(DTYPES[entry["dtype"]], tuple(shape))


class OrbaxSource:
    """A directory that `convert` made; a TensorSource under canonical names."""

    def __init__(self, path: epath.PathLike):
        self.directory = epath.Path(path)
        self.config = read_json(self.directory / "config.json", REMEDY)
        self.files = text_files(self.directory)
        self.record = Record.read(self.directory / RECORD)
        self.tensors: dict[str, Spec] = dict(self.record.tensors)
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
        self._open: dict[str, ts.TensorStore] = {}

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        stored = self._array(name)
        try:
            return stored[index].read().result() if index else stored.read().result()
        except (ValueError, OSError) as e:
            raise UserError(f"{self.directory}: cannot read tensor {name}: {str(e)[:300]}") from None

    def release(self, name: str) -> None:
        self._open.pop(name, None)

    def chunk_rows(self, name: str) -> int:
        chunks = self._array(name).chunk_layout.read_chunk.shape
        return chunks[0] if chunks else 1

    def _array(self, name: str) -> ts.TensorStore:
        if name not in self._open:
            self._open[name] = self._open_array(name)
        return self._open[name]

    def _open_array(self, name: str) -> ts.TensorStore:
        directory = os.fspath(self.directory / STATE / name) + "/"
        place: Any = {"driver": "file", "path": directory} if is_local(directory) else directory
        try:
            spec = {"driver": "zarr", "kvstore": place, "fill_missing_data_reads": False}  # a lost chunk is no zeros
            stored = ts.open(spec, context=self._context, open=True, read=True).result()
        except (ValueError, OSError) as e:
            raise UserError(f"{self.directory}: tensor {name} is missing or damaged ({str(e)[:200]}); {REMEDY}") from None
        wanted = self.tensors[name]
        if (stored.shape, stored.dtype.numpy_dtype) != (wanted.shape, wanted.dtype):
            have = f"{stored.dtype.name} {list(stored.shape)}"
            raise UserError(f"{self.directory}: tensor {name} is {have}, not as {RECORD} says; {REMEDY}")
        return stored
