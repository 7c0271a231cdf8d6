"""From slices of Hugging Face tensors to slices of parameters, in blocks: dequantise, cast, split, transpose."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from qwen35_jax.checkpoint.names import BLOCK, Ranges, View, block_rows, halves, scale_name
from qwen35_jax.checkpoint.source import TensorSource

BLOCK_BYTES = 32 << 20  # how much of a tensor is worked on at once
TILE = 16  # columns of the destination that a transposing copy fills at once: one cache line of bf16 is 32
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
# float32 value of each of the 256 float8_e4m3fn numbers; many times faster than a cast
_FP8_VALUES = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array on a 64-byte boundary: JAX's CPU devices use such memory in place, without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def blocks_of(source: TensorSource, view: View, ranges: Ranges) -> Iterator[Ranges]:
    """Cuts a slice of a parameter (start, stop per axis) along the tensor's first axis, into pieces of BLOCK_BYTES."""
    if not view.groups[0]:
        yield ranges
        return
    axis = view.order.index(0)
    start, stop = ranges[axis]
    inner = math.prod(view.groups[0][1:])
    spec = source.tensors[view.name]
    row_bytes = spec.dtype.itemsize * inner * math.prod(view.tensor_shape[1:])
    chunk = source.chunk_rows(view.name)
    unit = chunk // math.gcd(chunk, inner)  # of Orbax chunks, so that each is read once
    step = max(1, BLOCK_BYTES // max(row_bytes, 1) // unit) * unit
    for first in range(start, stop, step):
        yield (*ranges[:axis], (first, min(first + step, stop)), *ranges[axis + 1 :])


def fill(target: np.ndarray, source: TensorSource, view: View, ranges: Ranges, *, dequantise: bool) -> None:
    """target[...] = parameter[ranges], read from the source and cast to the target's dtype."""
    tensor_ranges, inner = _tensor_ranges(view, ranges)
    index = tuple(slice(*r) for r in view.stored(tensor_ranges))
    values = view.repeated(source.read(view.name, index), tensor_ranges)
    if dequantise and values.dtype == FP8:
        values = _dequantised(values, source, view, tensor_ranges, target.dtype)
    elif values.dtype != target.dtype:
        values = values.astype(target.dtype)
    split = [
        n for group, (start, stop) in zip(view.groups, tensor_ranges, strict=True) for n in _split_range(group, stop - start)
    ]
    copy_transposed(target, values.reshape(split)[inner].transpose(view.order))


def _split_range(group: tuple[int, ...], size: int) -> tuple[int, ...]:
    return (size // math.prod(group[1:]), *group[1:]) if group else ()


def _tensor_ranges(view: View, ranges: Ranges) -> tuple[Ranges, tuple[slice, ...]]:
    """The box of the tensor that holds a slice of the parameter, and the slices to take of the box once it is split."""
    of_split = dict(zip(view.order, ranges, strict=True))
    axes = itertools.count()
    boxes: list[tuple[int, int]] = []
    inner: list[slice] = []
    for group in view.groups:
        if not group:
            boxes.append((0, 1))
            continue
        outer, *rest = (of_split[next(axes)] for _ in group)
        size = math.prod(group[1:])
        boxes.append((outer[0] * size, outer[1] * size))
        inner += [slice(None), *(slice(*r) for r in rest)]
    offset, axis = view.rows[0], view.rows_axis
    boxes[axis] = (boxes[axis][0] + offset, boxes[axis][1] + offset)
    return tuple(boxes), tuple(inner)


def _dequantised(values: np.ndarray, source: TensorSource, view: View, box: Ranges, dtype: np.dtype) -> np.ndarray:
    """values x scale of their 128 x 128 block: multiplied in float32 (exactly, for bf16 scales) and cast once."""
    rows = block_rows(view.tensor_shape[-2], halves(view.name))[slice(*box[-2])]
    columns = np.arange(*box[-1]) // BLOCK
    scales = source.read(scale_name(view.name), tuple(slice(*r) for r in box[:-2])).astype(np.float32)
    out = np.empty(values.shape, dtype)
    starts = [0, *(np.flatnonzero(np.diff(rows)) + 1), len(rows)]
    for lead in np.ndindex(*values.shape[:-2]):
        for first, last in itertools.pairwise(starts):
            block = (*lead, slice(first, last))
            out[block] = _FP8_VALUES[values[block].view(np.uint8)] * scales[lead][rows[first], columns]
    return out


def copy_transposed(target: np.ndarray, values: np.ndarray) -> None:
    """target[...] = values, of one shape and dtype; several times faster than NumPy where `values` is transposed."""
    bits = np.dtype(f"u{target.dtype.itemsize}")  # ml_dtypes' own copies are slow
    target, values = _coalesced(target.view(bits), values.view(bits))
    fastest = min(range(values.ndim), key=lambda a: (values.shape[a] == 1, values.strides[a]), default=0)
    last = target.ndim - 1
    if target.ndim < 2 or fastest == last:
        np.copyto(target, values)
        return
    others = [range(n) if a not in (fastest, last) else (slice(None),) for a, n in enumerate(target.shape[:-1])]
    for place in itertools.product(*others):
        for start in range(0, target.shape[last], TILE):
            tile = (*place, slice(start, start + TILE))
            target[tile] = values[tile]


def _coalesced(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Views of both arrays in which axes that lie one behind the other in both are one."""
    shape: list[int] = []
    for axis, size in enumerate(a.shape):
        if shape and all(x.strides[axis - 1] == x.strides[axis] * size for x in (a, b)):
            shape[-1] *= size
        else:
            shape.append(size)
    return a.reshape(shape), b.reshape(shape)
