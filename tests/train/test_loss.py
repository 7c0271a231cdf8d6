"""Cross entropy in chunks against the obvious form, its shifts, and the whole loss on packed documents."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen35_jax.sharding import Sharding, make_mesh
from qwen35_jax.train import loss as losses
from qwen35_jax.train.loss import cross_entropy, target_weights
from qwen35_jax.train.run import initial_state
from tests.train.conftest import random_batch, small_run


def plain(hidden, head, targets, weights):
    logits = jnp.einsum("BTD,VD->BTV", hidden, head, precision="highest")
    log_sum = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (log_sum - picked)), jnp.sum(weights * log_sum**2)


@pytest.mark.parametrize(("mesh", "chunk_bytes"), [("1x1", 2**30), ("1x1", 4 * 2 * 64 * 5), ("2x4", 4 * 1 * 16 * 3)])
@pytest.mark.parametrize("counted", [(1.0, 1.0), (0.3, 0.0), (0.0, 0.0)])
def test_cross_entropy(mesh, chunk_bytes, counted, monkeypatch):
    """Values and gradients, whole and in chunks that do not divide the length: sums of fp32 in another order.

    `counted`: the share of each row's tokens that have a weight. Chunks of the others are left out.
    """
    monkeypatch.setattr(losses, "CHUNK_BYTES", chunk_bytes)
    rng = np.random.default_rng(1)
    hidden, head = (rng.standard_normal(s).astype(np.float32) for s in ((2, 17, 8), (64, 8)))
    targets, weights = rng.integers(0, 64, (2, 17)), rng.random((2, 17)).astype(np.float32)
    weights *= rng.random((2, 17)) < np.array(counted)[:, None]
    sharding = Sharding(make_mesh(mesh))

    def total(f):
        def run(hidden, head):
            nll, square = f(hidden, head)
            return nll + 0.1 * square

        return jax.jit(jax.value_and_grad(run, argnums=(0, 1)))(hidden, head)

    got = total(lambda h, w: cross_entropy(h, w, targets, weights, sharding))
    want = total(lambda h, w: plain(h, w, targets, weights))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, want)


def test_logits_are_never_whole(monkeypatch):
    """The backward pass holds less than the logits of all tokens."""
    monkeypatch.setattr(losses, "CHUNK_BYTES", 2**20)
    sharding, shapes = Sharding(make_mesh("1x1")), ((1, 2048, 16), (8192, 16))
    hidden, head = (jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
    tokens = jax.ShapeDtypeStruct((1, 2048), jnp.int32)

    def total(hidden, head, tokens):
        return cross_entropy(hidden, head, tokens, jnp.ones(tokens.shape), sharding)[0]

    memory = jax.jit(jax.grad(total, argnums=(0, 1))).lower(hidden, head, tokens).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2048 * 8192 * 4 / 4


def test_targets_stay_in_their_document():
    batch = {
        "tokens": np.array([[5, 6, 7, 8, 9, 0]], np.int32),
        "segment_ids": np.array([[1, 1, 1, 2, 2, 0]], np.int32),
        "loss_weights": np.array([[0, 1, 0.5, 0, 1, 0]], np.float32),
    }
    for ahead, expected_tokens, expected_weights in (
        (1, [6, 7, 8, 9, 0, 0], [1, 0.5, 0, 1, 0, 0]),
        (2, [7, 8, 9, 0, 0, 0], [0.5, 0, 0, 0, 0, 0]),
    ):
        targets, weights = target_weights(batch, ahead)
        assert targets.tolist() == [expected_tokens]
        assert weights.tolist() == [expected_weights]


def test_packed_documents_are_separate_documents():
    """Loss and gradients of packed rows equal those of one document a row (fp32, sums in another order)."""
    run = small_run()
    state = initial_state(run)
    packed = {name: np.pad(x, ((0, 6), (0, 0))) for name, x in random_batch(rows=2).items()}
    rows = [(row, s) for row in range(2) for s in (1, 2, 3)]
    separate = {name: np.zeros_like(x) for name, x in packed.items()}
    for i, (row, segment) in enumerate(rows):
        inside = packed["segment_ids"][row] == segment
        for name, x in packed.items():
            separate[name][i, : inside.sum()] = 1 if name == "segment_ids" else x[row, inside]

    def total(params, batch):
        return run.loss.total(run.loss.sums(params, {}, batch), run.loss.totals(batch))

    step = jax.jit(jax.value_and_grad(total))
    (loss, gradients), (loss_separate, gradients_separate) = (step(state["params"], b) for b in (packed, separate))
    assert float(loss) == pytest.approx(float(loss_separate), rel=1e-5)
    for path, a in jax.tree_util.tree_leaves_with_path(gradients):
        b = gradients_separate
        for key in path:
            b = b[key.key]
        scale = float(jnp.linalg.norm(b)) + 1e-12
        assert float(jnp.linalg.norm(a - b)) / scale < 1e-4, jax.tree_util.keystr(path)
