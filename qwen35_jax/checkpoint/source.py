"""Where tensors come from: one interface over Hugging Face directories, hub ids and converted (Orbax) directories."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any, Protocol

import huggingface_hub
import numpy as np
from etils import epath
from huggingface_hub import errors as hub

from qwen35_jax.checkpoint.safetensors_file import Index, SafetensorsFile, TensorInfo, is_local
from qwen35_jax.errors import UserError, reachable

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
RECORD = "source.json"
PARTIAL = ".partial"  # DST + this is where a conversion works; while it exists beside a remote DST, DST is not complete
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# What is copied beside the weights: config, tokenizer, chat template, preprocessors, vocabulary, licence.
TEXT_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".md")
TEXT_NAMES = ("LICENSE", "NOTICE")
# What the hub's errors mean, in a line; the first that fits.
HUB_REASONS = (
    (hub.GatedRepoError, "access is granted on its page, and then needs `hf auth login`"),
    (hub.RepositoryNotFoundError, "there is none, or it is private and needs `hf auth login`"),
    (hub.RevisionNotFoundError, "it has no such revision"),
    (hub.LocalEntryNotFoundError, "it cannot be reached from here, and there is no copy in its cache"),
)


class Spec(Protocol):
    """What is known about a tensor before it is read."""

    dtype: np.dtype
    shape: tuple[int, ...]


class TensorSource(Protocol):
    """Tensors by name, read lazily and in slices, with the configuration and the files that belong to them."""

    directory: epath.Path
    config: dict[str, Any]
    files: list[epath.Path]
    tensors: Mapping[str, Spec]

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """`tensor[index]`, for slices of step 1; possibly a read-only view of a mapped file."""

    def release(self, name: str) -> None:
        """Frees what reading this tensor left in memory."""

    def chunk_rows(self, name: str) -> int:
        """Reads whose leading slice starts at multiples of this read nothing twice."""


class HuggingFaceSource:
    """A directory of safetensors as published: one file, or shards with `model.safetensors.index.json`.

    `shards` maps file names to SafetensorsFile; `index` is the text of the index, None where there is a single file.
    """

    def __init__(self, path: epath.PathLike):
        self.directory = epath.Path(path)
        self.config = read_json(self.directory / "config.json")
        self.files = text_files(self.directory)
        self.index, names = self._weights()
        self.shards = {name: SafetensorsFile(self.directory / name) for name in names}
        self._shard_of = self._locate(names)
        self.tensors: dict[str, TensorInfo] = {n: self.shards[s].tensors[n] for n, s in self._shard_of.items()}

    def _weights(self) -> tuple[str | None, dict[str, list[str]]]:
        """The index's text and, for each shard, the tensors that the index puts there (all that it has: empty list)."""
        if (self.directory / INDEX).exists():
            text = read_text(self.directory / INDEX)
            return text, _shards_of_index(parse_json(text, self.directory / INDEX), self.directory)
        if (self.directory / SINGLE).exists():
            return None, {SINGLE: []}
        names = [p.name for p in self.directory.iterdir()]
        if any(n.endswith(".safetensors") for n in names):
            raise UserError(f"{self.directory} holds shards but no {INDEX}; download the index too")
        if any(n.endswith(PICKLES) for n in names):
            reason = "which is never read because it can run code; use safetensors"
            raise UserError(f"{self.directory} holds weights only as pickle (.bin, .pt), {reason}")
        raise UserError(f"{self.directory} holds no weights: expected {SINGLE} or {INDEX}")

    def _locate(self, names: dict[str, list[str]]) -> dict[str, str]:
        located: dict[str, str] = {}
        for shard, indexed in names.items():
            have, listed = self.shards[shard].tensors, set(indexed)
            lost = [n for n in indexed if n not in have]
            extra = [n for n in have if n not in listed] if indexed else []
            if lost or extra:
                text = (
                    f"lacks {some(lost)} that {INDEX} puts there"
                    if lost
                    else f"holds {some(extra)} that {INDEX} does not list there"
                )
                raise UserError(f"{self.directory / shard} {text}; the files are of different versions: download them again")
            located |= dict.fromkeys(have, shard)
        return located

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        return self.shards[self._shard_of[name]].read(name, index)

    def release(self, name: str) -> None:
        self.shards[self._shard_of[name]].release(name)

    def chunk_rows(self, name: str) -> int:
        return 1


def _shards_of_index(index: Any, path: epath.Path) -> dict[str, list[str]]:
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path / INDEX} has no weight_map; download it again")
    shards: dict[str, list[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", shard, re.ASCII):
            what = f"only plain names of .safetensors files in {path} are read"
            raise UserError(f"{path / INDEX} names the shard {shard!r:.200}; {what}")
        shards.setdefault(shard, []).append(tensor)
    missing = [name for name in shards if not (path / name).exists()]
    if missing:
        raise UserError(f"{path} lacks the {'shard' if len(missing) == 1 else 'shards'} {some(missing)}; download it again")
    return shards


def text_files(path: epath.Path) -> list[epath.Path]:
    """The files to copy along: everything that is text and no weights, no index of them and no record of ours."""
    skipped = (INDEX, RECORD, "commit_success.txt")  # the last is Orbax's
    with reachable(path):
        kept = [p for p in path.iterdir() if p.name.endswith(TEXT_SUFFIXES) or p.name in TEXT_NAMES]
        return sorted((p for p in kept if p.name not in skipped and not p.name.startswith(".") and p.is_file()), key=os.fspath)


def copy_into(directory: epath.Path, file: epath.Path) -> None:
    with reachable(file):
        content = file.read_bytes()
    (directory / file.name).write_bytes(content)


def read_text(path: epath.Path, remedy: str = "download it again") -> str:
    """The text of a file. UserError where there is none, and with the remedy where it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UserError(
            f"no {path.name} in {path.parent}: is this a model directory? (A training run's is what --export_hf wrote.)"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; {remedy}") from None


def parse_json(text: str, path: epath.PathLike, remedy: str = "download it again") -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not valid JSON ({e}); {remedy}") from None


def read_json(path: epath.Path, remedy: str = "download it again") -> dict[str, Any]:
    """A JSON object from a file. UserError where there is no file, no JSON or no object."""
    value = parse_json(read_text(path, remedy), path, remedy)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not a JSON object; {remedy}")
    return value


def some(names: list[str], limit: int = 5) -> str:
    """'a, b, c and 12 more'."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def download(repo: str, revision: str | None = None) -> epath.Path:
    """The local copy of a hub repository's safetensors and text files, through huggingface_hub and its cache."""
    patterns = ["*.safetensors", *(f"*{s}" for s in TEXT_SUFFIXES), *TEXT_NAMES]
    try:
        return epath.Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except Exception as e:  # a broken connection is what the client's HTTP package or hf_xet make of it
        reason = next((text for kind, text in HUB_REASONS if isinstance(e, kind)), None) or _hub_reason(e)
        at = f" at revision {revision}" if revision else ""
        raise UserError(f"no directory {repo}, and the Hugging Face hub gave no {repo}{at}: {reason}") from None


def _hub_reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    again = "" if isinstance(error, ValueError) else "; the same command resumes what was begun"  # ValueError: no valid id
    return (" ".join(lines[:2])[:300] or type(error).__name__) + again


def check_directory(path: epath.Path, advice: str = "give the directory that holds config.json and the weights") -> bool:
    """Whether the directory exists. UserError where it is a file (with the advice) or its file system cannot be reached."""
    with reachable(path):
        if path.is_dir():
            return True
        if is_local(path) and path.exists():
            raise UserError(f"{path} is a file; {advice}")
        return False
