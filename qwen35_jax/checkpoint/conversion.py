"""Conversion between Hugging Face safetensors and Orbax directories, both ways, without changing a bit; and to FP8."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import tqdm
from etils import epath

from qwen35_jax.checkpoint.accounting import check
from qwen35_jax.checkpoint.canonical import CanonicalSource
from qwen35_jax.checkpoint.opening import open_source
from qwen35_jax.checkpoint.orbax_source import OrbaxSource, Record, Stored
from qwen35_jax.checkpoint.orbax_writer import write_orbax
from qwen35_jax.checkpoint.quantization import Quantised
from qwen35_jax.checkpoint.safetensors_file import Header, Index, is_local, write_safetensors
from qwen35_jax.checkpoint.source import INDEX, RECORD, HuggingFaceSource, copy_into
from qwen35_jax.checkpoint.staging import check_destination, staging
from qwen35_jax.config import ModelConfig
from qwen35_jax.errors import UserError, writable

FORMS = ("orbax", "hf")
QUANTISATIONS = ("fp8",)
PIECE_BYTES = 64 << 20

Place = tuple[str, Index]  # which slice of which stored tensor


def convert(
    src: str,
    dst: str,
    to: str | None = None,
    *,
    quantize: str | None = None,
    revision: str | None = None,
    progress: bool = True,
) -> None:
    """Converts a checkpoint, keeping every name, dtype and byte; or quantises it.

    Args:
        src: Hugging Face directory or hub id (for `to="orbax"`), or a directory that this function made (`to="hf"`); either
            of them to quantise.
        dst: directory to make; local or gs://. It must not exist, and appears only when it is complete.
        to: "orbax" (the default): one array per tensor, experts joined per layer, beside the configuration and tokenizer
            files and a record of the source. "hf": the files of the original, byte for byte.
        quantize: "fp8": Hugging Face files with the linear layers in FP8, as the published FP8 checkpoints have them.
        revision: of a hub id.
        progress: show a bar, if stderr is a terminal.

    A run that was killed is started afresh by the next one. Raises UserError for whatever is wrong with the input, for
    a disk that fills up, and where `dst` exists.
    """
    if quantize not in (None, *QUANTISATIONS):
        raise UserError(f"cannot quantize to {quantize!r}; choose {', '.join(QUANTISATIONS)}")
    if quantize is not None and to == "orbax":
        raise UserError("quantize writes Hugging Face files: leave `to` out, and convert them to orbax afterwards")
    to = to or "orbax"
    if to not in FORMS:
        raise UserError(f"cannot convert to {to!r}; choose one of {', '.join(FORMS)}")
    check_destination(dst)  # before a hub id is downloaded
    source = open_source(src, revision)
    if quantize is None and isinstance(source, OrbaxSource) == (to == "orbax"):
        have, other = ("a converted checkpoint", "hf") if to == "orbax" else ("a Hugging Face checkpoint", "orbax")
        raise UserError(f"{src} is {have} already; convert it --to {other}")
    canonical = CanonicalSource(source, ModelConfig.from_hf(source.config))
    check(canonical, ModelConfig.from_hf(source.config))
    quantised = Quantised(canonical, ModelConfig.from_hf(source.config)) if quantize else None
    size = quantised.nbytes if quantised else sum(_nbytes(spec) for spec in canonical.tensors.values())
    # TensorStore reports a full disk as a ValueError.
    with writable(dst, ValueError, RuntimeError), staging(dst) as work:
        _check_space(work.parent, size)
        hidden = None if progress else True  # None: where stderr is no terminal
        with tqdm.tqdm(total=size, unit="B", unit_scale=True, disable=hidden, leave=False) as bar:
            if quantised:
                quantised.write(work, bar.update)
            elif isinstance(source, HuggingFaceSource):
                _to_orbax(source, canonical, work, bar.update)
            else:
                _to_hf(source, canonical, work, bar.update)
            for file in source.files:
                if not (quantised and file.name == "config.json"):
                    copy_into(work, file)
            bar.leave = True  # after a failure it goes: an error is one line


def _nbytes(spec) -> int:
    return math.prod(spec.shape) * spec.dtype.itemsize


def _check_space(directory: epath.Path, size: int) -> None:
    if is_local(directory):
        free = shutil.disk_usage(directory).free
        if free < size:
            have, want = (f"{tqdm.tqdm.format_sizeof(n)}B" for n in (free, size))
            raise UserError(f"{directory.parent} has {have} free, but {want} are to be written: make room or write elsewhere")


def _to_orbax(source: HuggingFaceSource, canonical: CanonicalSource, work: epath.Path, advance: Callable[[int], None]) -> None:
    write_orbax(work, canonical, advance)
    tensors = {name: Stored(entry.dtype, entry.shape) for name, entry in canonical.tensors.items()}
    headers = {name: shard.header for name, shard in source.shards.items()}
    fused = {name: entry.fused for name, entry in canonical.tensors.items()}
    (work / RECORD).write_text(Record(tensors, headers, source.index).to_json(fused))


def _to_hf(source: OrbaxSource, canonical: CanonicalSource, work: epath.Path, advance: Callable[[int], None]) -> None:
    record = source.record
    places = _places(record, canonical, source)
    work.mkdir()
    for name, header in record.shards.items():
        write_safetensors(work / name, header.raw, _data(source, header, places, advance))
    if record.index is not None:
        (work / INDEX).write_bytes(record.index.encode())


def _places(record: Record, canonical: CanonicalSource, source: OrbaxSource) -> dict[str, Place]:
    """Where each tensor of the original lies in the converted ones. UserError where the record contradicts itself."""
    original = {name: info for header in record.shards.values() for name, info in header.tensors.items()}
    layout = SimpleNamespace(directory=source.directory, config=source.config, files=[], tensors=original)
    fused = CanonicalSource(layout, ModelConfig.from_hf(source.config))
    stored = {name: Stored(entry.dtype, entry.shape) for name, entry in fused.tensors.items()}
    if stored != record.tensors or fused.missing or fused.problems:
        raise UserError(f"{source.directory / RECORD} contradicts itself: convert the original checkpoint again")
    places: dict[str, Place] = {}
    for name, entry in fused.tensors.items():
        for e, row in enumerate(entry.names):
            height = entry.shape[1] // len(row) if entry.fused else 0
            for part, original_name in enumerate(row):
                index = (slice(e, e + 1), slice(part * height, (part + 1) * height)) if entry.fused else ()
                places[original_name] = (name, index)
    return places


def _data(source: OrbaxSource, header: Header, places: dict[str, Place], advance: Callable[[int], None]) -> Iterator[np.ndarray]:
    """The data of one file, in order, in pieces."""
    for original in header.tensors:
        name, index = places[original]
        for piece in [index] if index else _pieces(source, name):
            array = source.read(name, piece)
            yield array
            advance(array.nbytes)


def _pieces(source: OrbaxSource, name: str) -> Iterator[Index]:
    """Cuts a tensor along its first axis, at multiples of what is stored together."""
    spec = source.tensors[name]
    if not spec.shape or _nbytes(spec) <= PIECE_BYTES:
        yield ()
        return
    chunk = source.chunk_rows(name)
    step = max(1, PIECE_BYTES * spec.shape[0] // _nbytes(spec) // chunk) * chunk
    for start in range(0, spec.shape[0], step):
        yield (slice(start, min(start + step, spec.shape[0])),)
