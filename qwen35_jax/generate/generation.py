"""A batch of prompts through the compiled steps: prefill in buckets, decode on the device, tokens handed over as they come."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from qwen35_jax.errors import UserError
from qwen35_jax.generate import steps
from qwen35_jax.generate.multimodal import Placed, step_arrays
from qwen35_jax.generate.sampling import SamplingParams, control_arrays
from qwen35_jax.model import Model
from qwen35_jax.program import placing
from qwen35_jax.sharding import Sharding, to_host

SMALLEST_BUCKET = 64
# A shard's convolution takes its window, three tokens, from the shard before it alone.
MIN_SHARD_TOKENS = 3
# A streaming caller gets tokens at least this often (seconds), as soon as the speed is known.
STREAM_INTERVAL = 0.1


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt, already token ids, and what to do with it. placed: its pictures, if it has any."""

    tokens: list[int]
    max_new_tokens: int
    sampling: SamplingParams
    end_tokens: tuple[int, ...] = ()
    placed: Placed | None = None


@dataclasses.dataclass
class Timing:
    """Seconds and tokens of one batch. Compilation is not in them."""

    vision_seconds: float = 0.0
    prefill_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_seconds: float = 0.0
    decode_tokens: int = 0


def prompt_buckets(length: int, chunk: int) -> list[int]:
    """Lengths of the prefill calls that cover `length` tokens: whole chunks, then the smallest power of two that holds the rest.

    Few distinct lengths mean few compilations: powers of two from 64, and `chunk`.
    """
    full, rest = divmod(length, chunk)
    if not rest:
        return [chunk] * full
    bucket = SMALLEST_BUCKET
    while bucket < rest:
        bucket *= 2
    return [chunk] * full + [min(bucket, chunk)]


def context_buckets(length: int, chunk: int, shards: int) -> list[int]:
    """Lengths of the prefill calls that cover `length` tokens with context parallelism: all alike, cut over so many shards."""
    size = cut_length(prompt_buckets(length, chunk)[0], shards)
    return [size] * -(-length // size)


def cut_length(length: int, shards: int) -> int:
    """The next length that can be cut over so many shards: equally many tokens each, and no fewer than a convolution needs."""
    return max(-(-length // shards), MIN_SHARD_TOKENS) * shards if shards > 1 else length


def capacity_bucket(tokens: int) -> int:
    """Cache length for `tokens`: four sizes an octave, so at most a quarter is spare."""
    step = SMALLEST_BUCKET
    while step * 8 < tokens:
        step *= 2
    return -(-tokens // step) * step


def prompt_layout(sharding: Sharding, prompt: int, longest: int, chunk: int) -> tuple[list[int], int]:
    """(lengths of the prefill calls, length of the cache) for prompts of up to `prompt` tokens, `longest` with what is written,
    read `chunk` at once. With context parallelism the cache is a multiple of a call: each shard keeps its part of every one."""
    if not sharding.context_parallel:
        chunks = prompt_buckets(prompt, chunk)
        return chunks, capacity_bucket(max(longest, sum(chunks)))
    chunks = context_buckets(prompt, chunk, sharding.size("T"))
    capacity = capacity_bucket(max(longest, sum(chunks)))
    return chunks, -(-capacity // chunks[0]) * chunks[0]


def slot_bucket(rows: int, shards: int) -> int:
    """Slots for `rows` prompts: the same power of two on each data shard; what is left over are dead rows."""
    each = 1
    while each * shards < rows:
        each *= 2
    return each * shards


class Programs:
    """Compiled steps by shape. Each is compiled once; two compile at a time."""

    def __init__(self, model: Model, params: dict, vocabulary: int):
        self.model, self.params, self.vocabulary = model, params, vocabulary
        self.stacked = not isinstance(params["units"], tuple)
        self.seconds = 0.0  # waited for compilation
        self._futures: dict[tuple, concurrent.futures.Future] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(max_workers=2)

    @property
    def count(self) -> int:
        """How many programs have been compiled."""
        return len(self._futures)

    def start(self, make: Callable[..., steps.Program], *shape, **options) -> concurrent.futures.Future:
        """Begins to compile `make(model, *shape, **options)`, unless that has been done."""
        key = (make, shape, tuple(options.items()))
        if key not in self._futures:
            self._futures[key] = self._pool.submit(self._compile, make, shape, options)
        return self._futures[key]

    def get(self, make: Callable[..., steps.Program], *shape, **options) -> Callable:
        """The compiled program; host arrays passed to it are placed as it expects them."""
        future = self.start(make, *shape, **options)
        begin = time.perf_counter()
        compiled = future.result()
        self.seconds += time.perf_counter() - begin
        return compiled

    def _compile(self, make: Callable[..., steps.Program], shape: tuple, options: dict) -> Callable:
        program = make(self.model, *shape, stacked=self.stacked, **options)
        return placing(program.compile(), program.arguments)


class Generation:
    """One batch on its way: `prefill()`, then `decode()` until `finished`. Tokens come as [row, tokens] pairs."""

    def __init__(self, programs: Programs, requests: list[Request], prefill_chunk: int):
        if not requests:
            raise UserError("no prompt: give at least one")
        self.programs, self.requests, self.timing = programs, requests, Timing()
        sharding = programs.model.sharding
        lengths = [len(r.tokens) for r in requests]
        self.slots = slot_bucket(len(requests), sharding.batch)
        longest = max(len(r.tokens) + r.max_new_tokens for r in requests)
        self.chunks, self.capacity = prompt_layout(sharding, max(lengths), longest, prefill_chunk)
        self.decode_options = {"chunk": self.chunks[0]} if sharding.context_parallel else {}
        self.controls = self._controls()
        # Batches of text alone need not carry rows of the vision tower along.
        self.vision = any(r.placed for r in requests)
        self.alive = np.arange(self.slots) < len(requests)
        self.seconds_per_token: float | None = None
        self.session: dict | None = None

    def _controls(self) -> dict[str, np.ndarray]:
        dead = Request([], 0, SamplingParams(temperature=0.0))
        rows = self.requests + [dead] * (self.slots - len(self.requests))
        ends = np.full((self.slots, steps.MAX_END_TOKENS), -1, np.int32)
        for i, row in enumerate(rows):
            if len(row.end_tokens) > steps.MAX_END_TOKENS:
                raise UserError(f"{len(row.end_tokens)} end tokens; at most {steps.MAX_END_TOKENS} are possible")
            ends[i, : len(row.end_tokens)] = row.end_tokens
        return control_arrays([r.sampling for r in rows]) | {
            "max_new_tokens": np.array([r.max_new_tokens for r in rows], np.int32),
            "end_tokens": ends,
            "stop": np.zeros(self.slots, bool),
        }

    def session_shapes(self) -> dict:
        """The session as ShapeDtypeStructs."""
        return steps.abstract_session(self.programs.model, self.slots, self.capacity, stacked=self.programs.stacked)

    def _start(self) -> None:
        """Begins to compile all that this batch needs, in the order of need."""
        for length in sorted(set(self.chunks)):
            self.programs.start(steps.make_prefill, *self._shape(steps.make_prefill, self.slots, length), **self._options)
        for make in (steps.make_empty, steps.make_first):
            self.programs.start(make, *self._shape(make))
        if (os.cpu_count() or 1) > 2:  # on two cores it would take time from the first token's programs
            self._start_decode()

    def _start_decode(self) -> None:
        if all(r.max_new_tokens == 1 for r in self.requests):  # which prefill gives
            return
        self.programs.start(steps.make_decode, *self._shape(steps.make_decode), **self.decode_options)

    def _shape(self, make: Callable, *extra: int) -> tuple:
        vocabulary = () if make in (steps.make_empty, steps.make_prefill) else (self.programs.vocabulary,)
        return (self.slots, *extra, self.capacity, *vocabulary)

    def _program(self, make: Callable, **options) -> Callable:
        return self.programs.get(make, *self._shape(make), **options)

    @property
    def _options(self) -> dict[str, bool]:
        """Of the prefill program."""
        return {"vision": True} if self.vision else {}

    def _prefill_program(self, length: int) -> Callable:
        return self.programs.get(steps.make_prefill, *self._shape(steps.make_prefill, self.slots, length), **self._options)

    def prefill(self) -> Iterator[tuple[int, list[int]]]:
        """Reads the prompts and yields the first token of each row."""
        self._start()
        for length in sorted(set(self.chunks)):
            self._prefill_program(length)
        empty, first = self._program(steps.make_empty), self._program(steps.make_first)
        self._start_decode()
        begin = time.perf_counter()
        self.session = empty()
        shard_slots = self.slots // self.programs.model.sharding.batch
        slot_ids = np.arange(self.slots, dtype=np.int32) % shard_slots
        params, offset = self.programs.params, 0
        for length in self.chunks:
            tokens, count = np.zeros((self.slots, length), np.int32), np.zeros(self.slots, np.int32)
            for i, request in enumerate(self.requests):
                piece = request.tokens[offset : offset + length]
                tokens[i, : len(piece)], count[i] = piece, len(piece)
            more = self._visual(offset, length)
            self.session = self._prefill_program(length)(params, self.session, tokens, count, slot_ids, *more)
            offset += length
        self.session, chosen = first(params, self.session, self.controls, self.alive)
        chosen = to_host(chosen)
        self.timing.prefill_seconds += time.perf_counter() - begin
        self.timing.prefill_tokens += sum(len(r.tokens) for r in self.requests)
        self._note_done()
        yield from ((i, [int(chosen[i])]) for i in range(len(self.requests)))

    def _visual(self, start: int, length: int) -> tuple[dict, ...]:
        """The last argument of a prefill with vision."""
        placed = [r.placed for r in self.requests]
        return (step_arrays(placed, self.slots, start, length, self.programs.model.config),) if self.vision else ()

    def decode(self, streaming: bool) -> Iterator[tuple[int, list[int]]]:
        """Runs the loop on the device once and yields what each live row said."""
        count = self._steps() if streaming else steps.MAX_STEPS
        decode = self._program(steps.make_decode, **self.decode_options)
        begin = time.perf_counter()
        self.session, tokens = decode(self.programs.params, self.session, self.controls, np.int32(count))
        tokens = to_host(tokens)
        elapsed = time.perf_counter() - begin
        done = int(np.max(np.sum(tokens >= 0, axis=1)))
        self.seconds_per_token = elapsed / max(done, 1)
        self.timing.decode_seconds += elapsed
        self.timing.decode_tokens += int(np.sum(tokens >= 0))
        self._note_done()
        for i in range(len(self.requests)):
            row = [int(t) for t in tokens[i] if t >= 0]
            if row:
                yield i, row

    def _steps(self) -> int:
        if self.seconds_per_token is None:
            return 1
        count = np.int32(np.clip(STREAM_INTERVAL / self.seconds_per_token, 1, steps.MAX_STEPS))
        # Every host must ask for the same number, and their clocks differ.
        return int(count if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(count))

    def _note_done(self) -> None:
        self.alive = ~to_host(self.session["done"])

    def stop(self, row: int) -> None:
        """Ends a row from outside (a stop string was found); its next tokens are not computed."""
        self.controls["stop"][row] = True
        self.alive[row] = False

    @property
    def finished(self) -> bool:
        return not self.alive.any()
