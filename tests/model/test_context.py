"""What context parallelism makes devices exchange: maps of the recurrence, windows, keys or queries, and experts' tokens."""

from __future__ import annotations

import collections

import pytest

from qwen35_jax.generate import steps
from qwen35_jax.model import Model
from qwen35_jax.planner.hlo import collectives
from qwen35_jax.sharding import Sharding, make_mesh
from tests.model.test_programs import DENSE, SMALL

SHARDS, TOKENS = 8, 32
STEPS = {
    "prefill": lambda model: steps.make_prefill(model, 1, 1, TOKENS, 2 * TOKENS),
    "logits": lambda model: steps.make_logits(model, 1, TOKENS),
    "decode": lambda model: steps.make_decode(model, 1, 2 * TOKENS, model.config.vocab_size, chunk=TOKENS),
}


def found(config, step: str) -> dict[tuple[str, int], int]:
    """{(kind, bytes): how many} of arrays with more than one number a token (decode: a head)."""
    model = Model(config, Sharding(make_mesh(f"{SHARDS}x1"), context_parallel=True))
    text = STEPS[step](model).compile().as_text()
    few = 4 * (config.num_attention_heads if step == "decode" else TOKENS)
    return dict(collections.Counter((c.kind, c.bytes) for c in collectives(text) if c.group != 1 and c.bytes > few))


def expected(config, step: str) -> dict[tuple[str, int], int]:
    """Of one unit of three Gated DeltaNet layers and attention, float32, and of what follows once."""
    n, k, h, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size
    values, dk, dv = config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim
    windows = 3 * config.linear_num_key_heads * dk, 3 * config.linear_num_key_heads * dk, 3 * values * dv  # of q, k and v
    maps = {"A": values * dk * dk, "B": values * dk * dv}
    want: collections.Counter = collections.Counter()
    if step == "decode":
        want["all-reduce", n * h] += 1  # outputs of one token, over the parts of the cache
    else:
        want["collective-permute", maps["A"]] += 3 * 2  # the first two of three steps, in each layer
        want["collective-permute", maps["B"]] += 3 * 4  # three steps, and the state that enters the next shard
        for window in windows:
            want["collective-permute", window] += 3
    if step == "logits":
        want["collective-permute", TOKENS // SHARDS * k * h] += 2  # keys and values, in the loop over the ring
    if step == "prefill":
        want["all-gather", TOKENS * n * h] += 1  # queries go to the cache, outputs come back with their sums
        want["reduce-scatter", TOKENS * n * h] += 1
        want["reduce-scatter", TOKENS * n] += 1
        want["all-reduce", TOKENS * n] += 1
        want["all-reduce", maps["B"]] += 3  # the state after the last shard to all, with the window behind it
        want["all-reduce", config.vocab_size // 4] += 1  # which tokens the prompt has, a byte each
        want["all-reduce", d] += 1  # the last token's hidden state
    if config.num_experts and step == "decode":
        want["all-reduce", d] += 4
    elif config.num_experts:
        want["all-gather", TOKENS * d] += 4
        want["reduce-scatter", TOKENS * d] += 4
        want["all-gather", TOKENS * config.num_experts_per_tok] += 2 * 4  # the routing
    return {(kind, 4 * size): count for (kind, size), count in want.items()}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("config", [pytest.param(DENSE, marks=pytest.mark.slow, id="dense"), pytest.param(SMALL, id="experts")])
def test_collectives(config, step):
    """Nothing but what is listed, to the byte: no activation of the whole sequence but the experts' and the queries."""
    assert found(config, step) == expected(config, step)
