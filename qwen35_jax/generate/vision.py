"""Images and videos through the vision tower: frames packed into rows of few lengths, one compiled program for each length."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from qwen35_jax.model import VisionModel
from qwen35_jax.program import Program, abstract_array, make_program, placing
from qwen35_jax.sharding import to_host
from qwen35_jax.vision_io import Visual, patch_places

SMALLEST_ROW = 256
# Frames that are smaller share a row of up to so many patches.
SHARED_ROW = 16384


def row_bucket(patches: int) -> int:
    """Length of a row for `patches`: four sizes an octave, so at most a quarter is spare; a multiple of 64."""
    step = SMALLEST_ROW // 4
    while step * 8 < patches:
        step *= 2
    return max(SMALLEST_ROW, -(-patches // step) * step)


@dataclasses.dataclass(frozen=True)
class Frame:
    """One temporal patch of a visual: rows `start` to `stop` of its patches."""

    visual: int
    start: int
    stop: int


def row_length(largest: int, patches: int, shards: int) -> int:
    """That of rows for frames of so many `patches` in all, and of at most `largest`: `shards` rows run at once."""
    return row_bucket(max(largest, min(-(-patches // shards), SHARED_ROW)))


def pack_frames(visuals: Sequence[Visual], shards: int) -> tuple[int, list[list[Frame]]]:
    """(length, rows): every frame of the visuals, in order, in rows of at most `length` patches; `shards` rows run at once."""
    frames = []
    for i, visual in enumerate(visuals):
        size = visual.grid[1] * visual.grid[2]
        frames += [Frame(i, t * size, (t + 1) * size) for t in range(visual.grid[0])]
    sizes = [f.stop - f.start for f in frames]
    length = row_length(max(sizes), sum(sizes), shards)
    rows: list[list[Frame]] = []
    room = 0
    for frame, size in zip(frames, sizes, strict=True):
        if size > room:
            rows.append([])
            room = length
        rows[-1].append(frame)
        room -= size
    return length, rows


def make_vision(model: VisionModel, rows: int, length: int) -> Program:
    """(params, patches, places, segment_ids; see `VisionModel`) -> [rows, length / merge^2, width of the text model]."""
    v, layout = model.config.vision, model.layout
    width = v.in_channels * v.temporal_patch_size * v.patch_size**2

    def array(shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
        axes = layout.axes(" ".join(["I", "T", "X"][: len(shape)]))
        return abstract_array(model.sharding, axes, shape, dtype)

    inputs = (array((rows, length, width), "uint8"), array((rows, length, 4), "int32"), array((rows, length), "int32"))
    result = array((rows, length // v.spatial_merge_size**2, v.out_hidden_size), model.config.dtype)
    return make_program(model, (model.abstract_params(), *inputs), result, None)


class VisionEncoder:
    """The vision tower with its parameters, which are loaded when the first picture comes.

    `seconds` are those of the last call of `encode`, without loading and compilation.
    """

    def __init__(self, model: VisionModel, load: Callable[[], dict]):
        self.model, self._load = model, load
        self.params: dict | None = None
        self.load_seconds = self.compile_seconds = self.seconds = 0.0
        self._compiled: dict[int, Callable] = {}

    def encode(self, visuals: Sequence[Visual]) -> list[np.ndarray]:
        """Each visual's rows [tokens, width of the text model], on every host. UserError where the tower cannot be loaded."""
        self.seconds = 0.0
        if not visuals:
            return []
        if self.params is None:
            begin = time.perf_counter()
            self.params = self._load()
            self.load_seconds = time.perf_counter() - begin
        begin, compiled = time.perf_counter(), self.compile_seconds
        shards = self.model.sharding.size(self.model.layout.rows)
        length, rows = pack_frames(visuals, shards)
        parts: list[list[np.ndarray]] = [[] for _ in visuals]
        merged = self.model.config.vision.spatial_merge_size**2
        for first in range(0, len(rows), shards):
            batch = rows[first : first + shards]
            out = to_host(self._program(shards, length)(self.params, *_arrays(visuals, batch, shards, length)))
            for row, frames in zip(out, batch, strict=False):
                place = 0
                for frame in frames:
                    count = (frame.stop - frame.start) // merged
                    parts[frame.visual].append(row[place : place + count])
                    place += count
        self.seconds = time.perf_counter() - begin - (self.compile_seconds - compiled)
        return [np.concatenate(p) for p in parts]

    def _program(self, rows: int, length: int) -> Callable:
        if length not in self._compiled:
            begin = time.perf_counter()
            program = make_vision(self.model, rows, length)
            self._compiled[length] = placing(program.compile(), program.arguments)
            self.compile_seconds += time.perf_counter() - begin
        return self._compiled[length]


def _arrays(visuals: Sequence[Visual], batch: list[list[Frame]], rows: int, length: int) -> tuple[np.ndarray, ...]:
    """Patches, places and segment ids of one call; rows beyond the batch are padding."""
    patches = np.zeros((rows, length, visuals[0].patches.shape[1]), np.uint8)
    places = np.ones((rows, length, 4), np.int32)
    segments = np.zeros((rows, length), np.int32)
    for r, frames in enumerate(batch):
        place = 0
        for number, frame in enumerate(frames, 1):
            visual = visuals[frame.visual]
            here = slice(place, place + frame.stop - frame.start)
            patches[r, here] = visual.patches[frame.start : frame.stop]
            places[r, here] = patch_places(*visual.grid[1:], visual.merge)
            segments[r, here] = number
            place = here.stop
    return patches, places, segments
