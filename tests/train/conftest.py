"""One small run for all tests of training: one unit of a Gated DeltaNet and an attention layer, experts, MTP."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qwen35_jax.train.config import default_config
from qwen35_jax.train.run import Run, find_origin, make_run

SMALL = {
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "initializer_range": 0.1,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
}
ROWS, LENGTH = 8, 48


def small_config(**changes):
    """The configuration of the small run; `changes` are fields such as `mesh` or, with two underscores, `optimizer__name`."""
    c = default_config()
    c.model.random_weights, c.dtype, c.remat, c.loss.balance = True, "float32", "none", 0.01
    c.model.changes.update(SMALL)
    c.data.train, c.data.sequence_length, c.data.batch_size = ("unused.jsonl",), LENGTH, ROWS
    c.steps, c.optimizer.warmup_steps, c.optimizer.learning_rate = 20, 2, 4e-3
    for field, value in changes.items():
        *path, name = field.split("__")
        node = c
        for key in path:
            node = node[key]
        node[name] = value
    return c


def small_run(**changes) -> Run:
    config = small_config(**changes)
    return make_run(config, find_origin(config))


def random_batch(seed: int = 0, rows: int = ROWS, vocabulary: int = 4000) -> dict[str, np.ndarray]:
    """Packed documents of several lengths, some padding, some tokens that are not trained on."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((rows, LENGTH), np.int32)
    for row in segments:
        cuts = np.sort(rng.choice(np.arange(1, LENGTH), 3, replace=False))
        row[: cuts[0]], row[cuts[0] : cuts[1]], row[cuts[1] : cuts[2]] = 1, 2, 3
    first = np.diff(segments, axis=1, prepend=0) != 0
    weights = ((segments > 0) & ~first & (rng.random((rows, LENGTH)) < 0.8)).astype(np.float32)
    tokens = np.where(segments > 0, rng.integers(0, vocabulary, (rows, LENGTH)), 0)
    return {"tokens": tokens.astype(np.int32), "segment_ids": segments, "loss_weights": weights}


@pytest.fixture
def chats(tmp_path):
    """A file of 64 short chats."""
    path = tmp_path / "chats.jsonl"
    lines = (
        {"messages": [{"role": "user", "content": f"What is {i} + 1?"}, {"role": "assistant", "content": f"{i + 1}"}]}
        for i in range(64)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
