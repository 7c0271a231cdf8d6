"""Expert parallelism by sending tokens: each row goes to the device that holds its expert, and its output comes back.

The devices of one `data` group exchange rows; each shard of `model` sends what its own column of experts is asked for, since
all of them have the tokens. Nothing is dropped and all shapes are static: rows go in passes, each of at most `capacity` rows
from a device to a device, and there are as many passes as the fullest pair of devices needs. So time follows the routing, and
memory does not: even if all tokens of the group choose one expert, a pass is no larger, there are only more of them.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from qwen35_jax.ops.fp8 import Fp8Weight, share_activation
from qwen35_jax.ops.moe import products
from qwen35_jax.ops.moe.exchange import exchange, exchange_activation
from qwen35_jax.ops.moe.routing import Routing

# A pass holds this many times the rows that a pair of devices has if routing is even, and at least SMALLEST.
HEADROOM = 2
SMALLEST = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Plan:
    """Assignments (a token with one of its experts) sorted by the device of the expert, then by expert.

    order [t k]: the assignments' numbers; starts, sent [P]: where those for each peer begin, and how many they are; received
    [P, E']: how many each peer has for each of this device's experts; passes []: the same number on all devices.
    """

    order: jax.Array
    starts: jax.Array
    sent: jax.Array
    received: jax.Array
    passes: jax.Array


@dataclasses.dataclass(frozen=True)
class _Pass:
    """What is static about a pass: rows from one device to another, at most, and if routing is even in all passes together; and
    how experts multiply."""

    capacity: int
    even: int
    implementation: str | None
    fp8_activations: bool

    @property
    def scope(self) -> str:
        """Name of the loop over the passes, from which the planner reads how many there are if routing is even."""
        return f"rows_{self.even}_by_{self.capacity}"

    def window(self, i: jax.Array, plan: _Plan) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
        """Pass i: the assignments of its rows [P, C], which of these are there, the numbers of rows sent and received [P], and
        the expert of each received row [P, C], counted on this device; the number of experts where there is no row."""
        rank = i * self.capacity + jnp.arange(self.capacity)
        there = rank < plan.sent[:, None]
        assignment = plan.order[jnp.where(there, plan.starts[:, None] + rank, 0)]
        sent, received = (jnp.clip(n - i * self.capacity, 0, self.capacity) for n in (plan.sent, plan.received.sum(1)))
        ends = jnp.cumsum(plan.received, axis=1)
        expert = jnp.sum(rank[:, None] >= ends[:, None], axis=2)
        return assignment, there, sent, received, expert

    def outputs(self, sent, received, expert, rows, weights, experts) -> jax.Array:
        """rows [P, C, D] of a pass and their weights [P, C] -> what their experts make of them, weighted, float32."""
        asked = (exchange_activation if self.fp8_activations else exchange)(rows, sent, received, "data")
        expert = expert.reshape(-1)
        order, groups = jnp.argsort(expert, stable=True), products.local_count(experts)
        sizes = jnp.zeros(groups + 1, jnp.int32).at[expert].add(1)[:groups]
        asked = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1])[order], asked)
        shared = asked if self.fp8_activations else share_activation(asked, experts["gate"], experts["up"])
        options = {"implementation": self.implementation, "fp8_activations": self.fp8_activations}
        done = products.expert_rows(shared, sizes, experts, **options)
        done = jnp.zeros_like(done).at[order].set(done, unique_indices=True).reshape(rows.shape)
        return exchange(done, received, sent, "data").astype(jnp.float32) * weights[..., None]


def all_to_all_experts(
    x, routing: Routing, experts: dict, *, expert_axes, partial_axes, implementation: str | None, fp8_activations: bool = False
):
    """One device's part of the mixture of experts; arguments and result as in `gather_experts`."""
    b, t, d = x.shape
    tokens, ids, weights = (a.reshape(b * t, -1) for a in (x, routing.experts, routing.weights))
    peers, local = jax.lax.axis_size("data"), products.local_count(experts)
    columns = jax.lax.axis_size("model") if "model" in expert_axes else 1
    even = -(-ids.size // (peers * columns))
    capacity = _capacity(tokens, ids.shape[1], experts, peers, even)
    column = jax.lax.axis_index("model") if columns > 1 else 0
    plan = _make_plan(ids, local, peers, columns, column, capacity)
    out = _in_passes(_Pass(capacity, even, implementation, fp8_activations), plan, tokens, weights, experts)
    out = out.astype(x.dtype)
    if partial_axes:
        out = jax.lax.psum(out, partial_axes)
    return out.reshape(b, t, d)


def _capacity(tokens: jax.Array, k: int, experts: dict, peers: int, even: int) -> int:
    """Rows of one pass from a device to a device, of `even` in all passes if routing is even. A pass has `peers` times as many,
    whose buffers stay below BUFFER_BYTES: those of the products, and four more of the exchange (rows on their way there and back,
    at both ends)."""
    count, d = tokens.shape
    size = tokens.dtype.itemsize
    most = products.BUFFER_BYTES // ((products.row_bytes(experts, d, size) + 4 * d * size) * peers)
    return max(1, min(most, max(SMALLEST, HEADROOM * even), count * min(k, products.local_count(experts))))


def _make_plan(ids, local: int, peers: int, columns: int, column, capacity: int) -> _Plan:
    """ids [t, k] of experts, numbered over `data` and then, where they are cut over it, `model`."""
    shard = ids // local
    # Other columns' experts, and those of dead tokens, which do not exist: not sent from here.
    mine = (shard % columns == column) & (shard < peers * columns)
    key = jnp.where(mine, shard // columns * local + ids % local, peers * local).reshape(-1)
    counts = jnp.zeros(peers * local + 1, jnp.int32).at[key].add(1)[:-1].reshape(peers, local)
    sent = counts.sum(1)
    # Over all axes: a loop with collectives in it must run equally often wherever the compiler may have joined them.
    passes = jax.lax.pmax(-(-jnp.max(sent) // capacity), ("replica", "data", "model"))
    received = jax.lax.all_to_all(counts, "data", 0, 0, tiled=True)
    return _Plan(jnp.argsort(key, stable=True), jnp.cumsum(sent) - sent, sent, received, passes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_passes(step: _Pass, plan: _Plan, tokens: jax.Array, weights: jax.Array, experts: dict) -> jax.Array:
    """tokens [t, D], weights [t, k] -> the sums of the experts' outputs [t, D] float32."""
    k = weights.shape[1]

    def body(i, out):
        assignment, there, *sizes = step.window(i, plan)
        rows, weight = _taken(tokens, weights, assignment, there)
        return out.at[assignment // k].add(step.outputs(*sizes, rows, weight, experts))

    with jax.named_scope(step.scope):
        return jax.lax.fori_loop(0, plan.passes, body, jnp.zeros(tokens.shape, jnp.float32))


def _taken(tokens, weights, assignment, there):
    rows = jnp.where(there[..., None], tokens[assignment // weights.shape[1]], jnp.zeros((), tokens.dtype))
    return rows, jnp.where(there, weights.reshape(-1)[assignment], 0)


def _forward(step, plan, tokens, weights, experts):
    return _in_passes(step, plan, tokens, weights, experts), (plan, tokens, weights, experts)


def _backward(step, residuals, gradient):
    """The passes again, each with its gradients, which are added up in float32. Weights kept in FP8 have none."""
    plan, tokens, weights, experts = residuals
    trained = {name: w for name, w in experts.items() if not isinstance(w, Fp8Weight)}
    k = weights.shape[1]

    def body(i, totals):
        assignment, there, *sizes = step.window(i, plan)

        def outputs(rows, weight, trained):
            return step.outputs(*sizes, rows, weight, experts | trained)

        _, back = jax.vjp(outputs, *_taken(tokens, weights, assignment, there), trained)
        rows, weight, more = back(gradient[assignment // k])
        to_tokens, to_weights, to_experts = totals
        to_tokens = to_tokens.at[assignment // k].add(rows.astype(jnp.float32))
        to_weights = to_weights.at[assignment].add(jnp.where(there, weight, 0))
        return to_tokens, to_weights, jax.tree.map(lambda a, b: a + b.astype(jnp.float32), to_experts, more)

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), (tokens, weights.reshape(-1), trained))
    with jax.named_scope(step.scope):
        to_tokens, to_weights, to_experts = jax.lax.fori_loop(0, plan.passes, body, zeros)
    to_experts = jax.tree.map(lambda total, w: total.astype(w.dtype), to_experts, trained)
    to_experts = {name: to_experts.get(name) for name in experts}
    return None, to_tokens.astype(tokens.dtype), to_weights.reshape(weights.shape).astype(weights.dtype), to_experts


_in_passes.defvjp(_forward, _backward)
