"""One `.safetensors` file: a reader that believes nothing the file says before checking it, and a streaming writer.

Format: 8 bytes little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}` (plus `__metadata__`,
strings only), then the data. Tensors must tile the data without holes or overlaps, as in the reference implementation.
Local files are memory-mapped, so that a slice costs only the pages it touches; others (gs://) are read by byte range.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from qwen35_jax.errors import UserError, reachable

MAX_HEADER = 100_000_000  # the limit of the reference implementation
MAX_RANK = 16
MAX_DIMENSION = 2**48
METADATA = "__metadata__"

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `start` and `stop` are byte offsets into the data that follows the header."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Header:
    """A checked header: the tensors in the order of their data, the `__metadata__` strings, and the header's bytes."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    raw: bytes

    @property
    def data_size(self) -> int:
        return max((info.stop for info in self.tensors.values()), default=0)


def parse_header(raw: bytes, where: str) -> Header:
    """Checks a header (the JSON bytes alone). UserError, naming `where`, for anything the format does not allow."""
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: the safetensors header is not valid JSON ({_short(e)}); download the file again") from None
    if not isinstance(entries, dict):
        raise UserError(f"{where}: the safetensors header is no JSON object; download the file again")
    metadata = entries.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise UserError(f"{where}: {METADATA} in the safetensors header does not map strings to strings")
    infos = [(name, _parse_entry(entry, f"{where}: tensor {name!r:.200}")) for name, entry in entries.items()]
    infos.sort(key=lambda item: (item[1].start, item[1].stop))
    position = 0
    for name, info in infos:
        if info.start != position:
            problem = "overlaps the tensor before it" if info.start < position else "leaves a hole before it"
            raise UserError(f"{where}: the data of tensor {name!r:.200} {problem} (starts at {info.start}, expected {position})")
        position = info.stop
    return Header(dict(infos), metadata, raw)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _parse_entry(entry: Any, where: str) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{where} must have exactly dtype, shape and data_offsets in the safetensors header")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{where} has dtype {dtype!r:.50}; known are {', '.join(DTYPES)}")
    if not _whole_numbers(shape) or len(shape) > MAX_RANK or any(n > MAX_DIMENSION for n in shape):
        raise UserError(f"{where} has an impossible shape {shape!r:.100}")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise UserError(f"{where} has impossible data_offsets {offsets!r:.100}")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if size != offsets[1] - offsets[0]:
        raise UserError(
            f"{where} of shape {shape} and dtype {dtype} needs {size} bytes, but its data_offsets {offsets} span others"
        )
    return TensorInfo(DTYPES[dtype], tuple(shape), offsets[0], offsets[1])


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _short(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


class SafetensorsFile:
    """A checked file. `tensors` maps names to TensorInfo; `read` returns slices. Opening reads the header only."""

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)
        self.size = self.path.stat().length
        self.header = self._read_header()
        self.tensors = self.header.tensors
        self._data_start = 8 + len(self.header.raw)
        self._map: mmap.mmap | None = None
        self._check_size()

    def _read_header(self) -> Header:
        again = "download it again"
        with self.path.open("rb") as f:
            prefix = f.read(8)
            length = int.from_bytes(prefix, "little")
            if prefix == b"version ":
                raise UserError(f"{self.path} is a git-lfs pointer, not the file itself; run `git lfs pull` in its directory")
            if len(prefix) < 8:
                raise UserError(f"{self.path} is truncated: {self.size} bytes, too few for a safetensors header; {again}")
            if length > MAX_HEADER:
                raise UserError(f"{self.path} claims a header of {length} bytes (at most {MAX_HEADER}): no safetensors file")
            if 8 + length > self.size:
                raise UserError(f"{self.path} is truncated: {self.size} bytes, its header alone needs {8 + length}; {again}")
            raw = f.read(length)
        return parse_header(raw, os.fspath(self.path))

    def _check_size(self) -> None:
        expected = self._data_start + self.header.data_size
        if self.size < expected:
            raise UserError(f"{self.path} is truncated: {self.size} bytes, its header promises {expected}; download it again")
        if self.size > expected:
            raise UserError(f"{self.path} has {self.size} bytes, but its header accounts for {expected}; download it again")

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """The tensor, or `tensor[index]` for slices of step 1: a view of the mapped file; remote, an array."""
        info = self.tensors[name]
        if is_local(self.path):
            flat = np.frombuffer(self._mapped(), np.uint8, info.stop - info.start, self._data_start + info.start)
            return _typed(flat, info.dtype, info.shape)[index]
        if not info.shape or info.start == info.stop:
            return _typed(self._read_range(info.start, info.stop), info.dtype, info.shape)[index]
        first, last, _ = (index[0] if index else slice(None)).indices(info.shape[0])
        row = (info.stop - info.start) // info.shape[0]
        data = self._read_range(info.start + first * row, info.start + last * row)
        return _typed(data, info.dtype, (last - first, *info.shape[1:]))[(slice(None), *index[1:])]

    def release(self, name: str) -> None:
        """Lets the system drop the pages of a tensor that was read, so that resident memory stays small."""
        if self._map is not None:
            info = self.tensors[name]
            start = (self._data_start + info.start) // mmap.PAGESIZE * mmap.PAGESIZE
            stop = self._data_start + info.stop
            if stop > start:
                self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            with open(os.fspath(self.path), "rb") as f:
                self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map

    def _read_range(self, start: int, stop: int) -> np.ndarray:
        with reachable(self.path), self.path.open("rb") as f:
            f.seek(self._data_start + start)
            data = f.read(stop - start)
        if len(data) != stop - start:
            raise UserError(f"{self.path} ended while it was read: {len(data)} bytes instead of {stop - start}; try again")
        return np.frombuffer(data, np.uint8)


def _typed(flat: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    if flat.ctypes.data % dtype.itemsize:  # a header of odd length; NumPy and TensorStore want aligned elements
        flat = flat.copy()
    return flat.view(dtype).reshape(shape)


def is_local(path: epath.PathLike) -> bool:
    """Whether the path is in this machine's file system (it can be mapped, locked and renamed) and not a gs:// one."""
    return "://" not in os.fspath(path)


def make_header(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None) -> bytes:
    """The header of a file that holds `tensors` (dtype, shape) in this order; padded with spaces to 8 bytes."""
    entries: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, shape) in tensors.items():
        stop = position + math.prod(shape) * np.dtype(dtype).itemsize
        entries[name] = {"dtype": DTYPE_NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return raw + b" " * (-len(raw) % 8)


def write_safetensors(path: epath.PathLike, header: bytes, data: Iterable[np.ndarray]) -> None:
    """Writes a file from its header and the tensors' data, in order, in pieces of any size.

    The file appears under its name when it is whole and on disk. ValueError where the data does not fit the header.
    """
    path = epath.Path(path)
    expected = parse_header(header, os.fspath(path)).data_size
    partial = path.parent / f".{path.name}.partial" if is_local(path) else path
    written = 0
    with partial.open("wb") as f:
        f.write(len(header).to_bytes(8, "little"))
        f.write(header)
        for piece in data:
            flat = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
            f.write(memoryview(flat))
            written += flat.size
        f.flush()
        if is_local(path):
            os.fsync(f.fileno())
    if written != expected:
        raise ValueError(f"{path}: wrote {written} bytes of data where the header has {expected}")
    if partial != path:
        os.rename(partial, path)
