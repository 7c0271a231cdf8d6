"""What a compiled program says to its neighbours: the collectives, read from the text of optimised HLO."""

from __future__ import annotations

import collections
import dataclasses
import math
import re

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# `%name = SHAPE kind(` with a plain or a tuple shape. `-start` is the asynchronous form; its `-done` is not counted.
# Collectives wrapped in an async-start or fused by the TPU compiler stand in a computation of their own, counted once.
_INSTRUCTION = re.compile(rf"^\s*(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ({'|'.join(KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,<=]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]<=|\{\{([\d,]*)\})")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction. `bytes` is the size, on one device, of the largest array it takes or gives (its own signature
    holds only the result, so for an all-gather that is what was gathered); `group` the number of devices that talk to
    each other, 0 where HLO does not say (permutes); `computation` the function of the program that it stands in."""

    kind: str
    bytes: int
    group: int
    computation: str
    line: str


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    match = re.search(r"\d+", dtype)
    return int(match.group()) if match else 0  # token, opaque


def _array_bytes(shape: str) -> int:
    sizes = [_bits(dtype) * math.prod(int(d.lstrip("<=")) for d in dims.split(",") if d) for dtype, dims in _ARRAY.findall(shape)]
    return max(sizes, default=0) // 8


def _group(line: str) -> int:
    match = _GROUPS.search(line)
    if not match:
        return 0
    return int(match.group(1)) if match.group(1) else len(match.group(2).split(","))


def collectives(hlo: str) -> list[Collective]:
    """The collectives of `compiled.as_text()`, in the order of the text. One inside a loop is listed once."""
    found, computation = [], ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header.group(1)
        elif match := _INSTRUCTION.match(line):
            shape, kind = match.groups()
            found.append(Collective(kind, _array_bytes(shape), _group(line), computation, line.strip()))
    return found


def counts(hlo: str, min_bytes: int = 0) -> dict[str, int]:
    """{kind: number of instructions} of those that move an array of at least `min_bytes` per device."""
    return dict(collections.Counter(c.kind for c in collectives(hlo) if c.bytes >= min_bytes))
