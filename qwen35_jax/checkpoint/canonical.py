"""One naming for all layouts that checkpoints come in: prefixes normalised, per-expert tensors presented as fused."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

import numpy as np

from qwen35_jax.checkpoint.names import MTP, TEXT, VISION
from qwen35_jax.checkpoint.safetensors_file import Index
from qwen35_jax.checkpoint.source import TensorSource
from qwen35_jax.config import ModelConfig

# (prefix in a file, canonical prefix), the first that fits. `model.` alone is that of text-only exports.
PREFIXES = (
    ("model.language_model.", TEXT),
    ("language_model.model.", TEXT),
    ("language_model.lm_head.", "lm_head."),
    ("model.visual.", VISION),
    ("visual.", VISION),
    ("model.embed_tokens.", TEXT + "embed_tokens."),
    ("model.layers.", TEXT + "layers."),
    ("model.norm.", TEXT + "norm."),
)
EXPERT = re.compile(r"(.+\.mlp\.experts)\.(0|[1-9]\d*)\.(gate|up|down)_proj\.weight(_scale_inv)?", re.ASCII)


def canonical_name(name: str) -> str:
    """`language_model.model.norm.weight` -> `model.language_model.norm.weight`; canonical and unknown names stay."""
    for prefix, canonical in PREFIXES:
        if name.startswith(prefix):
            return canonical + name[len(prefix) :]
    return name


@dataclasses.dataclass(frozen=True)
class Entry:
    """A canonical tensor. `names`: the source's tensors in it, a row for each expert (gate and up, or down), or one."""

    dtype: np.dtype
    shape: tuple[int, ...]
    names: tuple[tuple[str, ...], ...]
    fused: bool


class CanonicalSource:
    """A source seen through canonical names; itself a source, so that the rest of the code knows one layout only.

    `missing` and `problems` hold what a per-expert layout lacks, and what cannot be fused; `check` reports them.
    """

    def __init__(self, source: TensorSource, config: ModelConfig):
        self.source = source
        self.directory, self.config, self.files = source.directory, source.config, source.files
        self.missing: list[str] = []
        self.problems: list[str] = []
        self.tensors: dict[str, Entry] = {}
        experts: dict[str, dict[tuple[int, str], str]] = {}
        for name, spec in source.tensors.items():
            canonical = canonical_name(name)
            match = EXPERT.fullmatch(canonical)
            if match and int(match[2]) < config.num_experts:
                fused = f"{match[1]}.{'down_proj' if match[3] == 'down' else 'gate_up_proj'}{match[4] or ''}"
                self._claim(experts.setdefault(fused, {}), (int(match[2]), match[3]), name)
            else:
                self._claim(self.tensors, canonical, Entry(spec.dtype, spec.shape, ((name,),), fused=False))
        for fused, parts in experts.items():
            self._fuse(fused, parts, config.num_experts)

    def _claim(self, table: dict, key, value) -> None:
        if key in table:
            text = value.names[0][0] if isinstance(value, Entry) else value
            self.problems.append(f"{text} is there twice, under different prefixes")
        table[key] = value

    def _fuse(self, fused: str, parts: dict[tuple[int, str], str], count: int) -> None:
        kinds = ("down",) if ".down_proj" in fused else ("gate", "up")
        suffix = "_scale_inv" if fused.endswith("_scale_inv") else ""
        base = fused.split(".experts.")[0]
        wanted = [[(e, kind) for kind in kinds] for e in range(count)]
        absent = [f"{base}.experts.{e}.{kind}_proj.weight{suffix}" for row in wanted for e, kind in row if (e, kind) not in parts]
        names = tuple(tuple(parts.get(key, "") for key in row) for row in wanted)
        specs = [self.source.tensors[name] for name in parts.values()]
        first = specs[0]
        odd = [n for n, s in zip(parts.values(), specs, strict=True) if (s.dtype, s.shape) != (first.dtype, first.shape)]
        if odd or len(first.shape) != 2:
            self.problems.append(f"{odd[0] if odd else names[0][0]} differs from the other experts in shape or dtype")
        elif fused in self.tensors:
            self.problems.append(f"{fused} is there both fused and per expert")
        else:
            self.missing += absent
            shape = (count, len(kinds) * first.shape[0], first.shape[1])
            self.tensors[fused] = Entry(first.dtype, shape, names, fused=True)

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        entry = self.tensors[name]
        if not entry.fused:
            return self.source.read(entry.names[0][0], index)
        experts, rows, columns = (range(n)[i] for n, i in zip(entry.shape, _complete(index, 3), strict=True))
        out = np.empty((len(experts), len(rows), len(columns)), entry.dtype)
        height = entry.shape[1] // len(entry.names[0])
        for e, target in zip(experts, out, strict=True):
            filled = 0
            for part, source_name in enumerate(entry.names[e]):
                start, stop = (min(max(r - part * height, 0), height) for r in (rows.start, rows.stop))
                if start < stop:
                    block = self.source.read(source_name, (slice(start, stop), slice(columns.start, columns.stop)))
                    target[filled : filled + stop - start] = block
                    filled += stop - start
                    self.source.release(source_name)
        return out

    def release(self, name: str) -> None:
        entry = self.tensors[name]
        if not entry.fused:
            self.source.release(entry.names[0][0])

    def chunk_rows(self, name: str) -> int:
        entry = self.tensors[name]
        return 1 if entry.fused else self.source.chunk_rows(entry.names[0][0])


def _complete(index: Index, rank: int) -> Iterable[slice]:
    return (*index, *(slice(None),) * (rank - len(index)))


def source_has_mtp(source: TensorSource) -> bool:
    """Whether the source holds weights of the multi-token-prediction layer."""
    return any(name.startswith(MTP) for name in source.tensors)


def source_has_vision(source: CanonicalSource) -> bool:
    """Whether the source holds weights of the vision tower."""
    return any(name.startswith(VISION) for name in source.tensors)
