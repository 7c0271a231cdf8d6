"""Writing tensors as an Orbax checkpoint, a few at a time, with Orbax's partial saving.

Plain Zarr arrays without OCDBT and without compression: OCDBT keeps whole arrays in memory until they are written,
Zarr chunks go out one by one, so that memory is bounded whatever the size of an array (measured), and a slice is read
from the files of its chunks alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from qwen35_jax.checkpoint.canonical import CanonicalSource, Entry

CHUNK_BYTES = 16 << 20
# A save costs tens of milliseconds, and merging many at the end more: small tensors go together. What is mapped costs
# no memory; experts stored one by one are first joined there, so fewer of them go together.
GROUP_BYTES = 1 << 30
JOINED_BYTES = 256 << 20


def write_orbax(directory: epath.Path, source: CanonicalSource, advance: Callable[[int], None]) -> None:
    """Saves every tensor of the source under its canonical name, and finalises: then `directory` appears.

    `advance` is called with the bytes that were written. Tensors that are not mapped (joined experts) are in memory one
    at a time, unless they are small.
    """
    with _context():
        for group in _groups(source.tensors.items()):
            state = {name: source.read(name) for name in group}
            ocp.partial.save(directory, state)
            for name in group:
                source.release(name)
            advance(sum(array.nbytes for array in state.values()))
            del state
        ocp.partial.finalize(directory)


def _context() -> ocp.Context:
    context = ocp.Context()
    context.memory.deepcopy_host_arrays = False  # nothing changes the arrays while they are written
    context.array.saving.use_ocdbt = False
    context.array.saving.use_zarr3 = False
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    context.array.saving.scoped_storage_options_creator = _storage_options
    return context


def _storage_options(path: tuple, value: np.ndarray) -> ocp.options.ArrayOptions.Saving.StorageOptions | None:
    """Experts are cut by expert, since that is how they are read; other tensors as Orbax likes."""
    if value.ndim == 3 and ".experts." in path[-1].key and value.nbytes > CHUNK_BYTES:
        return ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,))
    return None


def _groups(tensors: Iterable[tuple[str, Entry]]) -> Iterable[list[str]]:
    group: list[str] = []
    size = 0.0
    for name, entry in tensors:
        share = math.prod(entry.shape) * entry.dtype.itemsize / (JOINED_BYTES if entry.fused else GROUP_BYTES)
        if group and size + share > 1:
            yield group
            group, size = [], 0.0
        group.append(name)
        size += share
    if group:
        yield group
