"""Documents into rows of a fixed length: first fit, and what does not fit waits for the next batch."""

from __future__ import annotations

import dataclasses

import numpy as np

from qwen35_jax.train.data.examples import Example


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
        tokens, weights = self.example.tokens, self.example.loss_weights
        while self.offset < len(tokens):
            piece = slice(self.offset, self.offset + rows.length)
            if not rows.add(tokens[piece], weights[piece]):
                return False
            self.offset += len(tokens[piece])
        return True


class Rows:
    """A batch being filled: B rows of `length` tokens, each a sequence of segments with padding behind."""

    def __init__(self, count: int, length: int):
        self.length = length
        self._tokens = np.zeros((count, length), np.int32)
        self._segment_ids = np.zeros((count, length), np.int32)
        self._loss_weights = np.zeros((count, length), np.float32)
        self._used = np.zeros(count, np.int64)
        self._segments = np.zeros(count, np.int32)

    @property
    def used(self) -> int:
        """Tokens placed."""
        return int(self._used.sum())

    @property
    def full(self) -> bool:
        return self.used == self._tokens.size

    def add(self, tokens: np.ndarray, loss_weights: np.ndarray) -> bool:
        """Add a segment to the first row with room for it; False if there is none.

        The first token of a segment has no predecessor, so its weight becomes 0.
        """
        fits = self._used + len(tokens) <= self.length
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
        return True

    def batch(self) -> dict[str, np.ndarray]:
        """`tokens` int32, `segment_ids` int32 and `loss_weights` float32, each [B, length]."""
        return {"tokens": self._tokens, "segment_ids": self._segment_ids, "loss_weights": self._loss_weights}
