"""Documents into rows of a fixed length: first fit, and what does not fit waits for the next batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from qwen35_jax.train.data.examples import Example
from qwen35_jax.train.data.pictures import PatchRows, Pictures


@dataclasses.dataclass
class Document:
    """An example on its way into rows; `index` is its number in the stream, `offset` how many of its tokens are placed."""

    index: int
    example: Example
    offset: int = 0

    def place(self, rows: Rows) -> bool:
        """Put as much as fits into the rows; True if all of it is placed.

        A document longer than a row goes in pieces of a row's length, in order, each a segment of its own.
        """
        tokens, weights, pictures = self.example.tokens, self.example.loss_weights, self.example.pictures
        while self.offset < len(tokens):
            piece = slice(self.offset, self.offset + rows.length)
            if not rows.add(tokens[piece], weights[piece], pictures):
                return False
            self.offset += len(tokens[piece])
        return True


class Rows:
    """A batch being filled: B rows of `length` tokens, each a sequence of segments with padding behind.

    `patches`: rows of patches for the pictures in it, apart for each equal part of the batch; none: a batch of text.
    """

    def __init__(self, count: int, length: int, patches: Sequence[PatchRows] = ()):
        self.length = length
        self._patches = patches
        self._tokens = np.zeros((count, length), np.int32)
        self._segment_ids = np.zeros((count, length), np.int32)
        self._loss_weights = np.zeros((count, length), np.float32)
        self._used = np.zeros(count, np.int64)
        self._segments = np.zeros(count, np.int32)
        if patches:
            self._vision_rows = np.full((count, length), -1, np.int32)
            self._positions = np.zeros((count, 3, length), np.int32)

    @property
    def used(self) -> int:
        """Tokens placed."""
        return int(self._used.sum())

    @property
    def full(self) -> bool:
        return self.used == self._tokens.size

    def add(self, tokens: np.ndarray, loss_weights: np.ndarray, pictures: Pictures | None = None) -> bool:
        """Add a segment to the first row with room for it and, in the row's part, for its pictures; False if there is none.

        The first token of a segment has no predecessor, so its weight becomes 0.
        """
        fits = self._used + len(tokens) <= self.length
        if pictures:
            fits &= np.repeat([part.fits(pictures) for part in self._patches], len(fits) // len(self._patches))
        row = int(np.argmax(fits))
        if not fits[row]:
            return False
        start = int(self._used[row])
        end = start + len(tokens)
        self._segments[row] += 1
        self._used[row] = end
        self._tokens[row, start:end] = tokens
        self._segment_ids[row, start:end] = self._segments[row]
        self._loss_weights[row, start + 1 : end] = loss_weights[1:]
        if self._patches:
            self._show(row, slice(start, end), pictures)
        return True

    def _show(self, row: int, here: slice, pictures: Pictures | None) -> None:
        """Positions of a segment, and its pictures' rows."""
        if pictures is None:
            self._positions[row, :, here] = np.arange(here.stop - here.start)
            return
        found = self._patches[row * len(self._patches) // len(self._tokens)].add(pictures)
        self._positions[row, :, here] = pictures.positions
        self._vision_rows[row, here] = np.where(pictures.rows < 0, -1, found[pictures.rows])

    def batch(self) -> dict[str, np.ndarray]:
        """`tokens` int32, `segment_ids` int32 and `loss_weights` float32, each [B, length].

        With rows of patches also theirs (see `PatchRows.arrays`), all parts' behind each other; `vision_rows` int32 [B, length],
        which row of the tower, counted over the part's, takes the place of a token, or -1; `positions` int32 [B, 3, length].
        """
        batch = {"tokens": self._tokens, "segment_ids": self._segment_ids, "loss_weights": self._loss_weights}
        if self._patches:
            parts = [part.arrays() for part in self._patches]
            batch |= {"vision_rows": self._vision_rows, "positions": self._positions}
            batch |= {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return batch
