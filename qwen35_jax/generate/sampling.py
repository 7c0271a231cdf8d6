"""From logits to the next token, with the vocabulary cut over `model`.

The order is that of transformers: penalties, temperature, top-k, top-p, min-p. What a row draws depends on its seed and its own
step, never on its neighbours or the mesh.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qwen35_jax.errors import UserError
from qwen35_jax.sharding import Sharding
from qwen35_jax.text.generation_config import LARGEST_FACTOR, LARGEST_ID

# Greedy rows and those with 0 < top_k <= CANDIDATES choose among this many best tokens; others look at the whole vocabulary.
CANDIDATES = 64
IN_PROMPT, GENERATED = 1, 2
LARGEST_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and penalties 0 and 1 do nothing."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, whole = getattr(self, field.name), isinstance(field.default, int)
            if not isinstance(value, int | np.integer if whole else int | float | np.number):
                raise UserError(f"{field.name} is {value!r:.60}; it must be a {'whole ' if whole else ''}number")
        checks = (
            ("temperature", 0 <= self.temperature <= LARGEST_FACTOR, f"0 to {LARGEST_FACTOR}"),
            ("top_k", 0 <= self.top_k <= LARGEST_ID, f"0 (off) to {LARGEST_ID}"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("presence_penalty", abs(self.presence_penalty) <= LARGEST_FACTOR, f"-{LARGEST_FACTOR} to {LARGEST_FACTOR}"),
            ("repetition_penalty", 0 < self.repetition_penalty <= LARGEST_FACTOR, f"above 0 and at most {LARGEST_FACTOR}"),
            ("seed", 0 <= self.seed <= LARGEST_SEED, f"0 to {LARGEST_SEED}"),
        )
        for name, good, accepted in checks:
            if not good:
                raise UserError(f"{name} is {getattr(self, name)!r:.60}; it must be {accepted}")


CONTROL_DTYPES = {
    "temperature": np.float32, "top_k": np.int32, "top_p": np.float32, "min_p": np.float32,
    "presence_penalty": np.float32, "repetition_penalty": np.float32, "seed": np.uint32,
}  # fmt: skip


def control_arrays(rows: list[SamplingParams]) -> dict[str, np.ndarray]:
    """The parameters of each slot as arrays [S]."""
    return {name: np.array([getattr(r, name) for r in rows], dtype) for name, dtype in CONTROL_DTYPES.items()}


@jax.named_scope("sample")
def sample(logits: jax.Array, seen: jax.Array, step: jax.Array, controls: dict, vocabulary: int, sharding: Sharding) -> jax.Array:
    """The next token of each slot.

    logits [S, V] float32; seen [S, V] uint8, bits IN_PROMPT and GENERATED; step [S] int32 tokens generated so far; controls as of
    `control_arrays`; ids from `vocabulary` on are never chosen. Returns [S] int32.
    """
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    logits = jnp.where(ids < vocabulary, _penalise(logits, seen, controls), -jnp.inf)
    keys = jax.vmap(lambda seed, n: jax.random.fold_in(jax.random.key(seed), n))(controls["seed"], step)
    values, candidates = top_candidates(logits, min(CANDIDATES, logits.shape[1]), sharding)
    greedy = controls["temperature"] == 0
    temperature = jnp.where(greedy, 1.0, controls["temperature"])[:, None]
    rank = _choose_candidate(values / temperature, controls, keys)
    token = jnp.take_along_axis(candidates, jnp.where(greedy, 0, rank)[:, None], axis=1)[:, 0]
    whole = ~greedy & ((controls["top_k"] == 0) | (controls["top_k"] > values.shape[1]))

    def look_at_all():
        return jnp.where(whole, _choose_from_all(logits / temperature, controls, keys), token)

    return jax.lax.cond(jnp.any(whole), look_at_all, lambda: token)


def mark_seen(seen: jax.Array, tokens: jax.Array, bit: int) -> jax.Array:
    """seen [S, V] uint8 with `bit` set for tokens [S] int32; negative ids mark nothing."""
    ids = jax.lax.broadcasted_iota(jnp.int32, seen.shape, 1)
    return seen | jnp.where(ids == tokens[:, None], bit, 0).astype(seen.dtype)


def mark_prompt(seen: jax.Array, tokens: jax.Array, real: jax.Array, slots: jax.Array, sharding: Sharding) -> jax.Array:
    """seen [S, V] uint8 with IN_PROMPT set for tokens [B, T] where real [B, T] bool; slots [B] are the rows' own."""

    def local(seen, tokens, real, slots):
        index = tokens - jax.lax.axis_index("model") * seen.shape[1]
        index = jnp.where(real & (index >= 0), index, seen.shape[1])
        hits = jnp.zeros(seen.shape, seen.dtype).at[slots[:, None], index].set(IN_PROMPT, mode="drop")
        if sharding.context_axis is not None:
            hits = jax.lax.pmax(hits, sharding.context_axis)
        return seen | hits

    return sharding.shard_map(local, ("S V", "B T", "B T", "B"), "S V")(seen, tokens, real, slots)


def top_candidates(logits: jax.Array, k: int, sharding: Sharding) -> tuple[jax.Array, jax.Array]:
    """The k largest logits of each row, largest first (ties: smallest id first), with their ids: each vocabulary shard's own
    best k, then the best of those. [S, V] -> ([S, k], [S, k] int32)."""

    def local(logits):
        width = logits.shape[1]
        values, ids = jax.lax.top_k(logits, min(k, width))
        ids = ids + jax.lax.axis_index("model") * width
        # Shards come in the order of their ids and top_k is stable, so ties keep the smallest id.
        values, ids = (jax.lax.all_gather(a, "model", axis=1, tiled=True) for a in (values, ids))
        values, index = jax.lax.top_k(values, k)
        return values, jnp.take_along_axis(ids, index, axis=1)

    return sharding.shard_map(local, ("S V",), ("S C", "S C"))(logits)


def _penalise(logits: jax.Array, seen: jax.Array, controls: dict) -> jax.Array:
    """Repetition penalty on tokens of prompt and answer (multiplicative), presence penalty on tokens of the answer."""
    repetition = controls["repetition_penalty"][:, None]
    scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(seen > 0, scaled, logits)
    return logits - jnp.where(seen & GENERATED > 0, controls["presence_penalty"][:, None], 0.0)


def _choose_candidate(scaled: jax.Array, controls: dict, keys: jax.Array) -> jax.Array:
    """Ranks [S] drawn from sorted candidates [S, C] after top-k, top-p and min-p."""
    rank = jnp.arange(scaled.shape[1])
    kept = jnp.where(rank < controls["top_k"][:, None], scaled, -jnp.inf)
    kept = jnp.where(rank == 0, scaled, kept)
    probabilities = jax.nn.softmax(kept, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    keep = (before < controls["top_p"][:, None]) & (probabilities >= controls["min_p"][:, None] * probabilities[:, :1])
    kept = jnp.where(keep | (rank == 0), kept, -jnp.inf)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, scaled.shape[1:]))(keys)
    return jnp.argmax(kept + noise, axis=-1)


def _choose_from_all(scaled: jax.Array, controls: dict, keys: jax.Array) -> jax.Array:
    """Tokens [S] drawn from the whole vocabulary [S, V], with thresholds found by bisection instead of a sort: counts and sums
    over a sharded vocabulary cost one small reduction each."""
    width = scaled.shape[1]
    top_k = jnp.where(controls["top_k"] == 0, width, jnp.minimum(controls["top_k"], width))
    bits = _ordered_bits(scaled)
    lowest = _largest_threshold(lambda t: jnp.sum(bits >= t[:, None], axis=1) >= top_k, scaled.shape[0])
    kept = jnp.where(bits >= lowest[:, None], scaled, -jnp.inf)
    probabilities = jax.nn.softmax(kept, axis=-1)
    # A hair below top_p: sums of float32 probabilities may end just under 1.
    target = jnp.minimum(controls["top_p"], 1 - 1e-6)

    def enough(t):
        return jnp.sum(jnp.where(bits >= t[:, None], probabilities, 0.0), axis=1) >= target

    nucleus = jnp.where(controls["top_p"] < 1, _largest_threshold(enough, scaled.shape[0]), -(2**31) + 1)
    floor = controls["min_p"][:, None] * jnp.max(probabilities, axis=-1, keepdims=True)
    kept = jnp.where((bits >= nucleus[:, None]) & (probabilities >= floor), kept, -jnp.inf)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (width,)))(keys)
    return jnp.argmax(kept + noise, axis=-1).astype(jnp.int32)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """float32 -> int32 that sorts the same way."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _largest_threshold(holds, rows: int) -> jax.Array:
    """The largest int32 t [rows] for which the (falling) condition holds(t) is true, by bisection."""

    def halve(_, bounds):
        low, high = bounds  # holds(low) is true, holds(high) is not
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        good = holds(middle)
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    low = jnp.full((rows,), -(2**31), jnp.int32)
    high = jnp.full((rows,), 2**31 - 1, jnp.int32)
    return jax.lax.fori_loop(0, 32, halve, (low, high))[0]
