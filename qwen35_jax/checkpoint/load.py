"""Loading: every parameter of an abstract tree, built where it will live from the slices that its devices need."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
from collections.abc import Callable, Iterator

import jax
import numpy as np
import tqdm

from qwen35_jax.checkpoint.accounting import FP8, check
from qwen35_jax.checkpoint.assemble import aligned_empty, blocks_of, fill
from qwen35_jax.checkpoint.canonical import CanonicalSource, source_has_vision
from qwen35_jax.checkpoint.names import Path, Ranges, View, parameter_views, vision_views
from qwen35_jax.checkpoint.safetensors_file import DTYPE_NAMES
from qwen35_jax.checkpoint.source import TensorSource
from qwen35_jax.config import ModelConfig
from qwen35_jax.errors import UserError
from qwen35_jax.ops.fp8 import Fp8Weight

BATCH_BYTES = 256 << 20  # leaves are built together up to this size
THREADS = 2


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array to build: from one view, or stacked from one view a unit. `dequantise`: FP8 becomes plain numbers."""

    abstract: jax.ShapeDtypeStruct
    views: tuple[View, ...]
    stacked: bool
    dequantise: bool

    @property
    def nbytes(self) -> int:
        return math.prod(self.abstract.shape) * self.abstract.dtype.itemsize


def load_params(source: TensorSource, config: ModelConfig, abstract: dict, *, progress: bool = False) -> dict:
    """The parameters as jax.Arrays, in the structure, dtypes and shardings of `abstract`.

    Args:
        source: a checkpoint of any layout. All its tensors are accounted for; those that `abstract` asks for are read.
        config: of the model.
        abstract: nested dict of ShapeDtypeStructs with shardings, or Fp8Weights of them; "units" is one dict whose
            leaves have a leading unit axis, or a tuple of dicts. Plain leaves are cast (FP8 is dequantised); Fp8Weights
            are kept as stored.
        progress: show a bar if it takes more than a second and stderr is a terminal.

    Each device's shard is read on its own; on CPU the memory read into is the array. Raises UserError listing all
    tensors that are missing, unexpected or of the wrong shape or dtype, before anything is read.
    """
    source = source if isinstance(source, CanonicalSource) else CanonicalSource(source, config)
    check(source, config, mtp="mtp" in abstract)
    views = parameter_views(config, mtp="mtp" in abstract)
    return _load(source, abstract, list(_plans(source, views, abstract, "units", config.num_units)), progress)


def load_vision_params(source: TensorSource, config: ModelConfig, abstract: dict, *, progress: bool = False) -> dict:
    """The vision tower's parameters, as `load_params` has it; "blocks" is one dict whose leaves have a leading axis of depth."""
    source = source if isinstance(source, CanonicalSource) else CanonicalSource(source, config)
    check(source, config)
    if not source_has_vision(source):
        raise UserError(f"{source.directory} holds no vision tower (its config.json has one): it cannot read images")
    plans = list(_plans(source, vision_views(config), abstract, "blocks", config.vision.depth))
    return _load(source, abstract, plans, progress)


def _load(source: CanonicalSource, abstract: dict, plans: list[Leaf], progress: bool) -> dict:
    leaves, structure = jax.tree.flatten(abstract)
    assert len(plans) == len(leaves)
    arrays: list[jax.Array] = []
    with (
        concurrent.futures.ThreadPoolExecutor(THREADS) as pool,
        tqdm.tqdm(
            total=sum(p.nbytes for p in plans),
            unit="B",
            unit_scale=True,
            desc="load",
            delay=1,
            disable=None if progress else True,  # None: where stderr is no terminal
        ) as bar,
    ):
        for batch in _batches(plans):
            built = _build(batch, source, pool)
            jax.block_until_ready(built)  # the host's copies of at most one batch wait for their transfer
            arrays += built
            bar.update(sum(leaf.nbytes for leaf in batch))
    return jax.tree.unflatten(structure, arrays)


def _plans(source: CanonicalSource, views: dict[Path, View], abstract: dict, repeated: str, count: int) -> Iterator[Leaf]:
    """What each leaf of `abstract` is built from; under `repeated`, one dict is stacked from `count` views a leaf."""
    stacked = isinstance(abstract[repeated], dict)
    flat, _ = jax.tree_util.tree_flatten_with_path(abstract, is_leaf=lambda x: isinstance(x, Fp8Weight))
    for keys, leaf in flat:
        path: Path = tuple(k.idx if isinstance(k, jax.tree_util.SequenceKey) else k.key for k in keys)
        per_unit = stacked and path[0] == repeated
        paths = [(repeated, u, *path[1:]) for u in range(count)] if per_unit else [path]
        found = tuple(views[p] for p in paths)
        if isinstance(leaf, Fp8Weight):
            _check_kept(source, found, leaf)
            yield Leaf(leaf.values, found, per_unit, dequantise=False)
            yield Leaf(leaf.scales, tuple(v.scales() for v in found), per_unit, dequantise=False)
        else:
            yield Leaf(leaf, found, per_unit, dequantise=True)


def _check_kept(source: CanonicalSource, views: tuple[View, ...], leaf: Fp8Weight) -> None:
    for view in views:
        values = source.tensors[view.name].dtype
        if values != FP8:
            raise UserError(f"{source.directory}: {view.name} is {DTYPE_NAMES[values]}, so it cannot be kept in FP8")
        scales = source.tensors[view.scales().name].dtype
        if not np.can_cast(scales, leaf.scales.dtype):
            name = DTYPE_NAMES[scales]
            raise UserError(f"{source.directory}: the scales of {view.name} are {name}; only BF16 ones can be kept")


def _batches(leaves: list[Leaf]) -> Iterator[list[Leaf]]:
    batch: list[Leaf] = []
    for leaf in leaves:
        if batch and sum(b.nbytes for b in batch) + leaf.nbytes > BATCH_BYTES:
            yield batch
            batch = []
        batch.append(leaf)
    if batch:
        yield batch


def _build(batch: list[Leaf], source: CanonicalSource, pool: concurrent.futures.Executor) -> list[jax.Array]:
    jobs: list[Callable[[], None]] = []
    shards = []
    for leaf in batch:
        buffers, more = _shards(leaf, source)
        shards.append(buffers)
        jobs += more
    list(pool.map(lambda job: job(), jobs))
    for view in {view for leaf in batch for view in leaf.views}:
        source.release(view.name)
    return [
        jax.make_array_from_callback(
            leaf.abstract.shape, leaf.abstract.sharding, lambda i, b=buffers, s=leaf.abstract.shape: b[_ranges(i, s)]
        )
        for leaf, buffers in zip(batch, shards, strict=True)
    ]


def _shards(leaf: Leaf, source: CanonicalSource) -> tuple[dict[Ranges, np.ndarray], list[Callable[[], None]]]:
    """A buffer for each different shard on this host (equal shards share one), and the jobs that fill them."""
    shape = leaf.abstract.shape
    expected = (len(leaf.views), *leaf.views[0].shape) if leaf.stacked else leaf.views[0].shape
    if shape != expected:
        raise ValueError(f"the model declares {shape} for {leaf.views[0].name}, the name map makes {expected}")
    buffers: dict[Ranges, np.ndarray] = {}
    jobs: list[Callable[[], None]] = []
    for index in leaf.abstract.sharding.addressable_devices_indices_map(shape).values():
        ranges = _ranges(index, shape)
        if ranges in buffers:
            continue
        buffers[ranges] = buffer = aligned_empty(tuple(b - a for a, b in ranges), leaf.abstract.dtype)
        units = range(*ranges[0]) if leaf.stacked else (0,)
        for place, unit in enumerate(units):
            target, inner = (buffer[place], ranges[1:]) if leaf.stacked else (buffer, ranges)
            jobs += _fill_jobs(target, source, leaf.views[unit], inner, leaf.dequantise)
    return buffers, jobs


def _fill_jobs(
    target: np.ndarray, source: CanonicalSource, view: View, ranges: Ranges, dequantise: bool
) -> Iterator[Callable[[], None]]:
    for block in blocks_of(source, view, ranges):
        place = tuple(slice(b[0] - r[0], b[1] - r[0]) for b, r in zip(block, ranges, strict=True))
        part = target[place]
        yield lambda part=part, block=block: fill(part, source, view, block, dequantise=dequantise)


def _ranges(index: tuple[slice, ...], shape: tuple[int, ...]) -> Ranges:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
