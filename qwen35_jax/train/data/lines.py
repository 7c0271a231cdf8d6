"""Lines of JSONL files by number: an index of where they begin, so that any of them can be read without the others."""

from __future__ import annotations

import dataclasses
import glob
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from etils import epath

from qwen35_jax.checkpoint.safetensors_file import is_local
from qwen35_jax.checkpoint.source import reachable
from qwen35_jax.errors import UserError
from qwen35_jax.text.files import one_line

MAX_LINE_BYTES = 64 << 20  # a line beyond this is no document but a file of another kind
SCAN_BYTES = 64 << 20
NEWLINE = ord("\n")
BLANKS = np.frombuffer(b" \t\r\n\v\f", np.uint8)


@dataclasses.dataclass(frozen=True)
class Line:
    """One line: where it stands ("train.jsonl:17", counted from 1), its bytes, cut off behind MAX_LINE_BYTES, and the folder of
    its file."""

    where: str
    text: bytes
    folder: str = ""


class JsonLines:
    """The lines of files that are not blank, in order, by random access. Safe to read from several threads.

    A local file is indexed once and its lines are read when they are asked for; a remote one (gs://) is kept in memory.
    """

    def __init__(self, patterns: Iterable[str]):
        """Index the files that `patterns` (paths or globs) name, in their order, matches of a glob in sorted order.

        Raises UserError for a pattern without a file, for a file that cannot be read, and if there is no line at all.
        """
        patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        self._files = [_index(path) for pattern in patterns for path in _matches(pattern)]
        self._ends = np.cumsum([len(file.starts) for file in self._files], dtype=np.int64)
        self.size = sum(file.size for file in self._files)
        if not len(self):
            raise UserError(f"there is no line in {', '.join(patterns) or 'the data: no files are named'}")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Line:
        """Raises UserError if the file cannot be read any more."""
        which = int(np.searchsorted(self._ends, index, side="right"))
        file = self._files[which]
        return file.line(int(index) - int(self._ends[which]) + len(file.starts))


def parse_line(line: Line) -> dict[str, Any]:
    """The JSON object on a line. Raises UserError that says why it is none, without the place."""
    if len(line.text) > MAX_LINE_BYTES:
        raise UserError(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        record = json.loads(line.text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"the line is not UTF-8 text (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"the line is not valid JSON: {one_line(error)}") from error
    if not isinstance(record, dict):
        raise UserError(f"the line holds a JSON {type(record).__name__}, but an object is expected")
    return record


@dataclasses.dataclass(frozen=True)
class _File:
    """Where the lines that are not blank begin, their numbers from 1, the bytes of the file, and these if it is remote."""

    path: str
    starts: np.ndarray
    numbers: np.ndarray
    size: int
    content: bytes | None

    def line(self, index: int) -> Line:
        start = int(self.starts[index])
        end = int(self.starts[index + 1]) if index + 1 < len(self.starts) else self.size
        text = self._read(start, min(end - start, MAX_LINE_BYTES + 1))
        text = text.partition(b"\n")[0]  # blank lines before the next one came along
        return Line(f"{self.path}:{self.numbers[index]}", text, os.path.dirname(self.path))

    def _read(self, start: int, count: int) -> bytes:
        if self.content is not None:
            return self.content[start : start + count]
        try:
            with open(self.path, "rb") as file:
                file.seek(start)
                return file.read(count)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror or error}") from error


def _matches(pattern: str) -> list[str]:
    """The files that a path or glob names, sorted."""
    if not pattern or not isinstance(pattern, str):
        raise UserError(f"config.data names {pattern!r}, which is no file's name; write ('a.jsonl', 'b.jsonl')")
    pattern = os.path.expanduser(pattern)
    with reachable(pattern):
        path = epath.Path(pattern)
        if path.exists():
            if path.is_dir():
                raise UserError(f"{pattern} is a directory; name its files, such as {pattern.rstrip('/')}/*.jsonl")
            return [pattern]
        if is_local(pattern):
            found = [name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]
        else:
            found = _remote_matches(pattern)
    if not found:
        raise UserError(f"config.data: no file matches {pattern!r}; several are written ('a.jsonl', 'b.jsonl')")
    return sorted(found)


def _remote_matches(pattern: str) -> list[str]:
    """epath searches below a directory only: the part of the pattern in front of the first wildcard."""
    if not glob.has_magic(pattern):
        return []
    parts = pattern.split("/")
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return [os.fspath(path) for path in epath.Path("/".join(parts[:fixed])).glob("/".join(parts[fixed:]))]


def _index(path: str) -> _File:
    try:
        content = None if is_local(path) else epath.Path(path).read_bytes()
        data = np.frombuffer(content, np.uint8) if content is not None else _mapped(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    newlines = np.concatenate([np.zeros(0, np.int64), *_newlines(data)])
    starts = np.concatenate([np.zeros(1, np.int64), newlines + 1])
    starts = starts[: len(starts) - (starts[-1] == len(data))]
    ends = np.append(newlines, len(data))[: len(starts)]
    kept = np.ones(len(starts), bool)
    for i in np.flatnonzero(np.isin(data[starts], BLANKS)):  # few: only these can be blank
        kept[i] = bool(data[starts[i] : ends[i]].tobytes().strip())
    return _File(path, starts[kept], np.flatnonzero(kept) + 1, len(data), content)


def _mapped(path: str) -> np.ndarray:
    if os.path.getsize(path) == 0:  # cannot be mapped
        return np.zeros(0, np.uint8)
    return np.memmap(path, np.uint8, mode="r")


def _newlines(data: np.ndarray) -> Iterator[np.ndarray]:
    for offset in range(0, len(data), SCAN_BYTES):
        yield np.flatnonzero(data[offset : offset + SCAN_BYTES] == NEWLINE) + offset
