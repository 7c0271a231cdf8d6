"""M-RoPE positions of prompts with images and videos in them: where each token stands in time, height and width."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from qwen35_jax.config import ModelConfig
from qwen35_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Span:
    """Tokens `start` to `start + count` are rows `row` to `row + count` of visual number `visual`."""

    start: int
    count: int
    visual: int
    row: int


@dataclasses.dataclass(frozen=True)
class _Frame:
    """One temporal patch that waits for its placeholders: height and width in merged patches."""

    visual: int
    row: int
    height: int
    width: int


class FrameQueue:
    """The frames of all visuals, in order, images and videos apart: each placeholder takes the next row of its kind.

    Args:
        kinds: image | video, of each visual.
        grids: temporal patches, patches of a frame's height and of its width, of each visual.
        merge: patches on a side of the square that becomes one token.
    """

    def __init__(self, kinds: Sequence[str], grids: Sequence[tuple[int, int, int]], merge: int):
        self._waiting = {"image": collections.deque(), "video": collections.deque()}
        for visual, (kind, (time, height, width)) in enumerate(zip(kinds, grids, strict=True)):
            height, width = height // merge, width // merge
            self._waiting[kind].extend(_Frame(visual, t * height * width, height, width) for t in range(time))
        self._counts = {kind: list(kinds).count(kind) for kind in self._waiting}

    def take(self, kind: str, room: int) -> _Frame:
        """The next frame, which must fit the `room` placeholders that stand in a row. UserError where there is none."""
        if not self._waiting[kind]:
            given = self._counts[kind]
            raise UserError(f"there are more {kind} placeholders in the tokens than the {given} {kind}s given need")
        frame = self._waiting[kind].popleft()
        need = frame.height * frame.width
        if need > room:
            raise UserError(f"{kind} frames need {need} placeholders in a row ({frame.height} x {frame.width}); there are {room}")
        return frame

    def finish(self) -> None:
        """UserError where a visual has found no placeholders."""
        for kind, waiting in self._waiting.items():
            if waiting:
                raise UserError(f"the tokens have too few {kind} placeholders: {len(waiting)} frames of the {kind}s found none")


def vision_positions(tokens: np.ndarray, queue: FrameQueue, config: ModelConfig) -> tuple[np.ndarray, int, list[Span]]:
    """Positions of one sequence, after the rules of `get_rope_index` in transformers.

    A run of text counts on along all three axes. The tokens of a frame share their time; height and width count from the
    same number over the merged patches, and the text behind goes on from the largest.

    Args:
        tokens: int [T], placeholders expanded.
        queue: the visuals; the frames that this sequence shows are taken from it.
        config: of the model, for the placeholders' ids.

    Returns (positions int32 [3, T]: time, height, width; the number that added to a later token's index is its position; where
    the rows of visuals go). UserError where placeholders and visuals do not fit together.
    """
    kinds = np.select([tokens == config.image_token_id, tokens == config.video_token_id], [1, 2], 0)
    positions = np.zeros((3, len(tokens)), np.int32)
    spans: list[Span] = []
    start = now = 0
    for kind, group in itertools.groupby(kinds.tolist()):
        stop = start + len(list(group))
        if not kind:
            positions[:, start:stop] = np.arange(now, now + stop - start)
            now, start = now + stop - start, stop
        while start < stop:
            frame = queue.take(("image", "video")[kind - 1], stop - start)
            count = frame.height * frame.width
            rows, columns = np.divmod(np.arange(count), frame.width)
            positions[:, start : start + count] = now + np.stack([np.zeros_like(rows), rows, columns])
            spans.append(Span(start, count, frame.visual, frame.row))
            now, start = now + max(frame.height, frame.width), start + count
    return positions, now - len(tokens), spans
