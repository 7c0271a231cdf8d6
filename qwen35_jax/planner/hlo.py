"""What a compiled program says to its neighbours: the collectives, read from the text of optimised HLO."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re

import numpy as np

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
# Collectives wrapped in an async-start or fused by the TPU compiler stand in a computation of their own.
_INSTRUCTION = re.compile(rf"^\s*(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,<=]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
# Spellings of who talks to whom: [groups,size]<=[2,4]T(1,0), {{0,1},{2,3}}, mesh['data'=2,'model'=4] {'data'}; of permutes
# {{0,1},{1,2}}.
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_NAMED = re.compile(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}")
_AXIS = re.compile(r"'(\w+)'=(\d+)")
_JOINED = re.compile(r"(?:all-reduce|reduce-scatter)(?:-start)?\(%?[\w.\-]*concatenate[\w.\-]*\)")
_FUSED = re.compile("fused|fusion")
_CHANNEL = re.compile(r"channel_id=(\d+)")
# Who runs a computation: the attributes by which an instruction names others, one or several of them.
_CALLED = re.compile(
    r"\b(body|condition|calls|to_apply|branch_computations|true_computation|false_computation)=(\{[^}]*\}|[^,\s]+)"
)
_NAME = re.compile(r"%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# The condition of a loop that counts from 0, where the compiler does not write down how often: `i < constant`.
_CONSTANT = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)")
_COMPARE = re.compile(r"^\s*ROOT %?[\w.\-]+ = pred\[\]\S* compare\(%?[\w.\-]+, %?([\w.\-]+)\), direction=LT")
# The loop over the passes of ops.moe.all_to_all: the rows from a device to a device if routing is even, and those of a pass at
# most. It ends when all rows are sent, so the compiler knows no number of trips.
_PASSES = re.compile(r'op_name="[^"]*\brows_(\d+)_by_(\d+)/while"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction. `bytes` is the size per device of the whole array: what an all-gather gives, what a
    reduce-scatter takes; of several arrays in one instruction the largest, an element of which has `bits`. `group` is the
    number of devices that talk to each other, 0 of permutes and where HLO does not say; `pairs` of those devices, by their place
    in the flat mesh: the first of one group with each other one, of permutes all; `computation` the function in which it
    stands; `joined` whether the compiler made it of several, whose arrays it lays end to end."""

    kind: str
    bytes: int
    bits: int
    group: int
    pairs: tuple[tuple[int, int], ...]
    computation: str
    joined: bool
    line: str


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    match = re.search(r"\d+", dtype)
    return int(match.group()) if match else 0  # token, opaque


def _largest_array(shape: str) -> tuple[int, int]:
    """(bytes, bits of an element)."""
    arrays = [(_bits(dtype), dims.split(",")) for dtype, dims in _ARRAY.findall(shape)]
    return max(((bits * math.prod(int(d.lstrip("<=")) for d in dims if d) // 8, bits) for bits, dims in arrays), default=(0, 0))


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _members(line: str) -> list[int]:
    """One of the groups of devices; empty where HLO names none."""
    if match := _IOTA.search(line):
        groups, size, dims, order = match.groups()
        devices = np.arange(int(groups) * int(size)).reshape(_numbers(dims))
        return devices.transpose(_numbers(order) if order else None).reshape(-1)[: int(size)].tolist()
    if match := _NAMED.search(line):
        axes = _AXIS.findall(match[1])
        devices = np.arange(math.prod(int(n) for _, n in axes)).reshape([int(n) for _, n in axes])
        return devices[tuple(slice(None) if f"'{axis}'" in match[2] else 0 for axis, _ in axes)].ravel().tolist()
    match = _LISTED.search(line)
    return _numbers(match[1]) if match else []


def _talk(line: str) -> tuple[int, tuple[tuple[int, int], ...]]:
    """(devices of a group, pairs of them), as in `Collective`."""
    if match := _PAIRS.search(line):
        numbers = _numbers(match[1])
        return 0, tuple(zip(numbers[::2], numbers[1::2], strict=True))
    members = _members(line)
    return len(members), tuple((members[0], other) for other in members[1:])


def collectives(hlo: str) -> list[Collective]:
    """The collectives of `compiled.as_text()`, in the order of the text. One inside a loop is listed once.

    The TPU compiler hides a collective behind several fusions by putting a copy of it into each: what has the same kind,
    size and channel in another computation is such a copy and is left out. Outside of fusions it is another one, since all
    collectives of `shard_map` may have one channel, as all ragged ones have."""
    found, computation, first_seen = [], "", {}
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header.group(1)
        elif match := _INSTRUCTION.match(line):
            shape, kind, start = match.groups()
            (size, bits), (group, pairs) = _largest_array(shape), _talk(line)
            if kind == "reduce-scatter" and not start:  # its signature shows the result; the asynchronous form both
                size *= group
            channel = _CHANNEL.search(line)
            key = (kind, size, channel.group(1)) if channel else (len(found),)
            first = first_seen.setdefault(key, computation)
            if first == computation or not _FUSED.search(computation):
                joined = bool(_JOINED.search(line))
                found.append(Collective(kind, size, bits, group, pairs, computation, joined, line.strip()))
    return found


def counts(hlo: str, min_bytes: int = 0) -> dict[str, int]:
    """{kind: number of instructions} of those that move an array of at least `min_bytes` per device."""
    return dict(collections.Counter(c.kind for c in collectives(hlo) if c.bytes >= min_bytes))


@dataclasses.dataclass(frozen=True)
class Runs:
    """Of a computation: how often it runs in one call of the program, and the part of the rows of its ragged exchanges that is
    there if routing is even."""

    count: int
    filled: float


@dataclasses.dataclass(frozen=True)
class _Call:
    """trips: a number, or the name of the condition that may say it. filled: as of `Runs`, of the passes that are called here."""

    caller: str
    trips: int | str = 1
    filled: float | None = None


def _body(line: str, caller: str) -> _Call:
    """The call of a loop's body."""
    if known := _TRIPS.search(line):
        return _Call(caller, int(known.group(1)))
    if match := _PASSES.search(line):
        rows, capacity = (int(n) for n in match.groups())
        passes = max(1, -(-rows // capacity))
        return _Call(caller, passes, rows / (passes * capacity))
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    return _Call(caller, condition.group(1) if condition else 1)


def runs(hlo: str) -> dict[str, Runs]:
    """How often each computation of `compiled.as_text()` runs in one call of the program: 1, times the trips of the loops
    around it. The passes of experts by all-to-all are as many as even routing takes; another loop whose trips are not known, as
    one that ends when a condition comes true, counts as one trip."""
    callers, limits, computation = collections.defaultdict(list), {}, ""
    constants: dict[str, int] = {}
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            computation, constants = header.group(1), {}
            callers[computation] += []
        elif match := _CONSTANT.match(line):
            constants[match.group(1)] = int(match.group(2))
        elif (match := _COMPARE.match(line)) and match.group(1) in constants:
            limits[computation] = constants[match.group(1)]
        for attribute, names in _CALLED.findall(line):
            call = _body(line, computation) if attribute == "body" else _Call(computation)
            for name in _NAME.findall(names):
                callers[name].append(call)

    @functools.cache
    def count(name: str) -> int:
        calls = ((c.caller, limits.get(c.trips, 1) if isinstance(c.trips, str) else c.trips) for c in callers[name])
        return sum(count(caller) * trips for caller, trips in calls) or 1

    @functools.cache
    def filled(name: str) -> float:
        parts = (filled(c.caller) if c.filled is None else c.filled for c in callers[name])
        return max(parts, default=1.0)

    return {name: Runs(count(name), filled(name)) for name in list(callers)}
