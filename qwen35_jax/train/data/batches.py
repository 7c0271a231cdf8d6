"""The stream of batches: shuffled lines, encoded ahead by threads, packed, at a position that can be saved and restored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import logging

from qwen35_jax.errors import UserError
from qwen35_jax.text import ChatTemplate, Tokenizer
from qwen35_jax.train.config import MAX_SEED
from qwen35_jax.train.data.bad_lines import FILE, BadLines
from qwen35_jax.train.data.examples import EncodeOptions, Example, ExampleEncoder
from qwen35_jax.train.data.lines import JsonLines, Line, parse_line
from qwen35_jax.train.data.packing import Document, Rows
from qwen35_jax.train.data.pictures import PictureReader

WAITING = 16  # documents without room that wait while shorter ones behind them fill a batch
REPORTED = 5  # bad lines that are named in the log
THREADS = 2  # that encode ahead


class TrainData(Iterator[dict[str, np.ndarray]]):
    """Batches: `tokens` int32, `segment_ids` int32, `loss_weights` float32, each [B, T]; with pictures more, see `Rows.batch`.

    All processes pack the same batches, and the mesh says which rows go to the devices of each: they end at the same step,
    whatever axes of the mesh lie between them, and a run can be resumed with another number of processes. Where the data
    ends the last batch is padded with rows of segment 0.

    Attributes:
        documents: lines drawn so far, bad ones included.
        bad_lines: lines skipped so far (counted again in every epoch).
        truncated: chats that were cut off at the length of a row so far.
    """

    def __init__(
        self,
        lines: JsonLines,
        stream: grain.MapDataset,
        shape: tuple[int, int],
        *,
        skip: bool,
        seed: int | None,
        quiet: bool = False,
        named: BadLines | None = None,
        reader: PictureReader | None = None,
    ):
        """Use `make_data`.

        Args:
            lines: the lines behind the stream.
            stream: draw number -> Example, or UserError for a bad line.
            shape: (rows of a batch, their length).
            skip: whether bad lines are skipped; else the first one is raised.
            seed: of the stream's shuffling, None without.
            quiet: whether nothing is said in the log.
            named: takes every line that is skipped; else the log has the first ones.
            reader: of the pictures, where there may be some.
        """
        self._lines = lines
        self._stream = stream
        self._shape = shape
        self._skip, self._quiet, self._named = skip, quiet, named
        self._reader = reader
        self._identity = {"lines": len(lines), "bytes": lines.size, "shuffle_seed": seed}
        self.documents = self.bad_lines = self.truncated = 0
        self._unusable = 0  # lines in a row
        self._waiting: list[Document] = []
        self._examples = self._read_from(0)

    def __next__(self) -> dict[str, np.ndarray]:
        """Raises StopIteration behind the last epoch, UserError for a bad line (or if all are bad, where they are skipped)."""
        rows = Rows(*self._shape, self._reader.shape.empty() if self._reader else ())
        self._waiting = [document for document in self._waiting if not document.place(rows)]
        while len(self._waiting) < WAITING and not rows.full:
            try:
                document = self._draw()
            except StopIteration:
                self._check_usable(len(self._lines))
                break
            if document is not None and not document.place(rows):
                self._waiting.append(document)
        if not rows.used:
            raise StopIteration
        return rows.batch()

    def get_state(self) -> dict[str, Any]:
        """The position behind the last batch, of JSON values; the same in all processes."""
        waiting = [[document.index, document.offset] for document in self._waiting]
        counts = {"documents": self.documents, "bad_lines": self.bad_lines, "truncated": self.truncated}
        return {**self._identity, **counts, "waiting": waiting}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on exactly where `get_state` was called. Raises UserError if the number of lines or the shuffling is not the same.

        Lines may have been corrected since then, as a bad one has to be; that they were is said.
        """
        for name, value in self._identity.items():
            if state[name] != value and name == "bytes":
                if not self._quiet:
                    logging.warning("the data has been changed since the checkpoint: %d bytes, then %d", value, state[name])
            elif state[name] != value:
                raise UserError(
                    f"the data is not that of the checkpoint: {name} was {state[name]} and is {value}; "
                    "restore data and data.shuffle_seed, or start another run"
                )
        self.documents, self.bad_lines, self.truncated = (state[n] for n in ("documents", "bad_lines", "truncated"))
        self._unusable = 0
        self._waiting = []
        for index, offset in state["waiting"]:
            example = self._stream[index]
            if isinstance(example, UserError):  # a picture that is no longer there
                self._skip_line(example)
            else:
                self._waiting.append(self._document(index, example, offset))
        self._examples.close()
        self._examples = self._read_from(self.documents)

    def close(self) -> None:
        """End the threads that read ahead."""
        self._examples.close()

    def _read_from(self, start: int) -> grain.DatasetIterator:
        rows, length = self._shape
        # About the documents of one batch, so that it is ready when the step before it ends; the bound is for books.
        ahead = min(max(rows * length // 256, 16), 1024)
        if self._reader:
            ahead = min(ahead, self._reader.read_ahead)
        return iter(self._stream[start:].to_iter_dataset(grain.ReadOptions(THREADS, ahead)))

    def _draw(self) -> Document | None:
        """The next document; None if the line is unusable. StopIteration at the end."""
        example = next(self._examples)
        index = self.documents
        self.documents += 1
        if isinstance(example, UserError):
            self._skip_line(example)
            return self._unusable_line()
        document = self._document(index, example)
        if len(document.example.tokens) < len(example.tokens):
            self._count_truncated(len(example.tokens))
        if not document.example.loss_weights.any():
            return self._unusable_line()
        self._unusable = 0
        return document

    def _document(self, index: int, example: Example, offset: int = 0) -> Document:
        """The document of an example, cut off at the length of a row where it cannot be split."""
        if not example.splittable:
            example = example.cut(self._shape[1])
        return Document(index, example, offset)

    def _skip_line(self, error: UserError) -> None:
        if not self._skip:
            raise UserError(f"{error}; correct the line, or set data.bad_lines to 'skip'") from error
        self.bad_lines += 1
        if self._named:
            self._named.add(str(error))
        if self.bad_lines <= REPORTED and not self._quiet:
            where = f"in {FILE}" if self._named else "only counted"
            more = "" if self.bad_lines < REPORTED else f" (further ones are {where})"
            logging.warning("bad line skipped: %s%s", error, more)

    def _count_truncated(self, tokens: int) -> None:
        self.truncated += 1
        if self.truncated == 1 and not self._quiet:
            text = "a chat of %d tokens is cut off at data.sequence_length (%d); further ones are only counted, as data/truncated"
            logging.warning(text, tokens, self._shape[1])

    def _unusable_line(self) -> None:
        # Data that has no other lines would be read for ever. A single good one can lie at the two ends of two epochs.
        self._unusable += 1
        self._check_usable(2 * len(self._lines) - 1)

    def _check_usable(self, limit: int) -> None:
        if self._unusable >= limit:
            raise UserError(
                f"none of the {len(self._lines)} lines of the data can be used: each is bad, or is a chat whose first "
                f"data.sequence_length ({self._shape[1]}) tokens hold nothing to train on"
            )


def make_data(
    config: Any,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    train: bool = True,
    quiet: bool = False,
    named: BadLines | None = None,
    reader: PictureReader | None = None,
) -> TrainData:
    """The batches of `config` (the `data` part of a run's configuration).

    Training data is shuffled anew in each of `config.epochs` epochs (0: without end); evaluation data passes once, in order.
    `quiet`: nothing is said in the log, for all processes but one. `named`: takes the names of all bad lines that are skipped.
    `reader`: for data with pictures in it.
    Raises UserError for files that are not there or empty, for settings that do not go together, and for a chat template
    whose assistant turns cannot be found.
    """
    if not 0 <= config.shuffle_seed <= MAX_SEED:
        raise UserError(f"data.shuffle_seed is {config.shuffle_seed}; it must be from 0 to {MAX_SEED}")
    encoder = ExampleEncoder(tokenizer, template, EncodeOptions(config.loss_on, config.enable_thinking), reader)
    lines = JsonLines(config.train if train else config.eval)
    stream = grain.MapDataset.source(lines)
    if train:
        stream = stream.shuffle(seed=config.shuffle_seed).repeat(config.epochs or None)
    return TrainData(
        lines,
        stream.map(lambda line: _example(line, encoder)),
        (config.batch_size, config.sequence_length),
        skip=config.bad_lines == "skip",
        seed=config.shuffle_seed if train else None,
        quiet=quiet,
        named=named,
        reader=reader,
    )


def _example(line: Line, encoder: ExampleEncoder) -> Example | UserError:
    """The example of a line; for a bad one the error is returned, so that it is counted when its turn comes."""
    try:
        return encoder(parse_line(line), line.folder)
    except UserError as error:
        return UserError(f"{line.where}: {error}")
