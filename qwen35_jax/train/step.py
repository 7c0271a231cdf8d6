"""The compiled steps of training: one optimizer step, and the loss of a batch for evaluation. Each is a `Program`.

The train state, a pytree that the step takes and (donated) returns:
    params           what is trained, float32, as `weights.kept_params` lays it out
    frozen           the other parameters, in the model's dtype ({} where all are trained)
    opt              the optimizer's state
    step             [] int32 batches seen
    skipped          [] int32 steps without a finite loss and gradient, of which nothing was kept
    skipped_in_a_row [] int32 those since the last good step
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qwen35_jax.model import Model, VisionModel, VisionRows
from qwen35_jax.ops.gated_delta import KEPT
from qwen35_jax.ops.moe import balance_loss
from qwen35_jax.ops.segments import segment_positions
from qwen35_jax.program import Program, abstract_array, make_program
from qwen35_jax.train.loss import cross_entropy, next_tokens, target_weights
from qwen35_jax.train.weights import Weights

REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "gated_delta": jax.checkpoint_policies.save_only_these_names(*KEPT),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class Loss:
    """What is minimised. `mtp`, `z` and `balance` weigh the losses beside that of the next token; `remat` is a name."""

    weights: Weights
    remat: str = "full"
    mtp: float = 0.0
    z: float = 0.0
    balance: float = 0.0
    stacked: bool = True  # False: units one after the other without a scan, whose slices XLA:CPU copies

    @property
    def model(self) -> Model:
        return self.weights.model

    @property
    def tower(self) -> VisionModel | None:
        return self.weights.tower

    @property
    def has_mtp(self) -> bool:
        return self.mtp > 0 and self.model.config.mtp_num_hidden_layers > 0

    def sums(self, trained: dict, frozen: dict, batch: dict) -> dict[str, jax.Array]:
        """Sums over the tokens of a batch, before anything is divided: `nll` and `weight` of the next token, `square` of
        the z-loss, `mtp_nll`, `mtp_square` and `mtp_weight` of the next but one; and the experts' `balance` losses.

        trained, frozen: as the train state has them. batch: tokens, segment_ids [B, T] int32 and loss_weights [B, T] float32;
        with a vision tower the rest of `abstract_batch`.
        """
        model, segments = self.model, batch["segment_ids"]
        positions = jnp.moveaxis(batch["positions"], 1, 0) if self.tower else segment_positions(segments)
        inputs = model.inputs(positions, segments)
        params = self.weights.top(self.weights.combine(trained, frozen))
        params = params | {"units": self._stack(params["units"], model.config.num_units)}
        shown = self._shown(params, batch) if self.tower else None
        hidden, load = model.trained_hidden(params, batch["tokens"], inputs, self._wrap, shown)
        loads = [] if load is None else [load]
        result = self._named("", params, hidden, batch, 1)
        if self.has_mtp:
            following, known = next_tokens(batch)
            # The last token of a document has no next one: it is padding here, seen by nobody and routed nowhere.
            inputs = dataclasses.replace(inputs, segment_ids=jnp.where(known, segments, 0))
            drafted, load = self._drafted(params, hidden, following, inputs, shown and _next_rows(shown, known))
            loads += [] if load is None else [load]
            result |= self._named("mtp_", params, drafted, batch, 2)
        if loads:
            result["balance"] = sum(balance_loss(load, model.config.num_experts_per_tok) for load in loads)
            assigned = loads[0].assigned
            result["busiest_expert"] = jnp.max(assigned) * assigned.size / jnp.maximum(jnp.sum(assigned), 1.0)  # 0 for padding
        return result

    def total(self, sums: dict, totals: dict, parts: int = 1) -> jax.Array:
        """The loss of one of `parts` equal parts of a batch, whose sums of weights are `totals`."""
        loss = (sums["nll"] + self.z * sums["square"]) / totals["weight"]
        if self.has_mtp:
            loss += self.mtp * (sums["mtp_nll"] + self.z * sums["mtp_square"]) / totals["mtp_weight"]
        if "balance" in sums:
            loss += self.balance * sums["balance"] / parts
        return loss

    def totals(self, batch: dict) -> dict[str, jax.Array]:
        """Sums of the weights of a batch's targets, at least 1 so that nothing is divided by zero."""
        ahead = {"weight": 1, "mtp_weight": 2} if self.has_mtp else {"weight": 1}
        return {name: jnp.maximum(jnp.sum(target_weights(batch, n)[1]), 1.0) for name, n in ahead.items()}

    def _named(self, prefix: str, params: dict, hidden: jax.Array, batch: dict, ahead: int) -> dict:
        targets, weights = target_weights(batch, ahead)
        nll, square = cross_entropy(hidden, self.model.head(params), targets, weights, self.model.sharding)
        return {f"{prefix}nll": nll, f"{prefix}square": square, f"{prefix}weight": jnp.sum(weights)}

    def _shown(self, params: dict, batch: dict) -> VisionRows:
        """The rows of the batch's pictures, at the places of their tokens."""
        tower = self.weights.vision(params["vision"])
        tower = tower | {"blocks": self._stack(tower["blocks"], self.tower.config.vision.depth)}
        patches = (batch[name] for name in ("patches", "places", "frames"))
        rows = self.tower(tower, *patches, lambda block: self._remat(lambda params, x: block(self.weights.block(params), x)))
        return self.tower.laid(rows, batch["vision_rows"], self.model.sharding)

    def _stack(self, trees: Any, count: int) -> Any:
        """Stacked trees as `apply_units` takes them here."""
        if self.stacked:
            return trees
        return tuple(jax.tree.map(lambda x, u=u: x[u], trees) for u in range(count))

    def _wrap(self, unit: Callable) -> Callable:
        return self._remat(lambda params, x: unit(self.weights.unit(params), x))

    def _remat(self, function: Callable) -> Callable:
        if self.remat == "none":
            return function
        # Inside a scan nothing can be merged with the forward pass anyway.
        return jax.checkpoint(function, policy=REMAT[self.remat], prevent_cse=not self.stacked)

    def _drafted(self, params, hidden, following, inputs, shown):
        def layer(params, hidden, following, inputs, shown):
            drafted, _, load = self.model.mtp_hidden(params, hidden, following, inputs, vision=shown)
            return drafted, load

        needed = {name: params[name] for name in ("embed", "mtp")}
        return self._remat(layer)(needed, hidden, following, inputs, shown)


def _next_rows(shown: VisionRows, known: jax.Array) -> VisionRows:
    """Rows and mask of the next token, where it is of the same document."""
    rows, mask = (jnp.roll(x, -1, axis=1) for x in (shown.rows, shown.mask))
    return VisionRows(rows, mask & known)


def abstract_batch(
    model: Model, rows: int, length: int, parts: int = 1, *, tower: VisionModel | None = None, patches: tuple[int, int] = (0, 0)
) -> dict:
    """The arrays of one batch, [rows, length], or [parts, rows / parts, length] where it is run in parts.

    tokens, segment_ids int32 and loss_weights float32. With a vision tower also the batch's `patches`, (rows of patches, their
    length), which lie on the mesh as the tower has it, whatever rows of text they belong to; vision_rows int32 [rows, length] and
    positions int32 [rows, 3, length]; see `Rows.batch`.
    """
    shapes = {
        "tokens": ("B T", (rows, length), jnp.int32),
        "segment_ids": ("B T", (rows, length), jnp.int32),
        "loss_weights": ("B T", (rows, length), jnp.float32),
    }
    if tower is not None:
        v, lie = tower.config.vision, tower.layout.axes
        shapes |= {
            "vision_rows": ("B T", (rows, length), jnp.int32),
            "positions": ("B X T", (rows, 3, length), jnp.int32),
            "patches": (lie("I T X"), (*patches, v.in_channels * v.temporal_patch_size * v.patch_size**2), jnp.uint8),
            "places": (lie("I T X"), (*patches, 4), jnp.int32),
            "frames": (lie("I T"), patches, jnp.int32),
        }

    def array(name: str, axes: str, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
        axes, shape = (axes, shape) if parts == 1 else (f"X {axes}", (parts, shape[0] // parts, *shape[1:]))
        owner = tower if name in ("patches", "places", "frames") else model
        return abstract_array(owner.sharding, axes, shape, dtype)

    return {name: array(name, *of) for name, of in shapes.items()}


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    state: dict,
    batch: dict,
    parts: int = 1,
) -> Program:
    """(state, batch) -> (state, metrics): one step of the optimizer over `parts` accumulated parts of a batch.

    `state` and `batch` (see `abstract_batch`) are abstract. Metrics are float32 scalars, see `_metrics`. A step whose loss or
    gradient is not finite changes nothing but the counters.
    """

    def train_step(state, batch):
        totals = _totals(loss, batch, parts)
        gradient = jax.value_and_grad(functools.partial(_part_loss, loss, totals, parts), has_aux=True)
        gradient = functools.partial(gradient, state["params"], state["frozen"])
        (value, sums), gradients = _summed(gradient, batch, parts)
        norm = optax.tree.norm(gradients)
        good = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, opt = optimizer.update(gradients, state["opt"], state["params"])
        new = {"params": optax.apply_updates(state["params"], updates), "opt": opt}
        kept = {name: state[name] for name in new}
        new = jax.tree.map(lambda new, old: jnp.where(good, new, old), new, kept)
        counters = {
            "step": state["step"] + 1,
            "skipped": state["skipped"] + ~good,
            "skipped_in_a_row": jnp.where(good, 0, state["skipped_in_a_row"] + 1),
        }
        metrics = _metrics(sums, totals, parts) | {
            "gradient_norm": norm,
            "learning_rate": jnp.float32(schedule(state["step"] - state["skipped"])),
            "skipped": counters["skipped"].astype(jnp.float32),
            "skipped_in_a_row": counters["skipped_in_a_row"].astype(jnp.float32),
        }
        return state | new | counters, metrics

    metrics = jax.eval_shape(train_step, state, batch)[1]
    scalar = abstract_array(loss.model.sharding, "", (), jnp.float32)
    return make_program(train_step, (state, batch), (state, jax.tree.map(lambda _: scalar, metrics)), 0)


def make_eval_step(loss: Loss, params: dict, frozen: dict, batch: dict, parts: int = 1) -> Program:
    """(params, frozen, batch) -> the sums of `Loss.sums`: their quotients over many batches are the evaluation's losses."""

    def eval_step(params, frozen, batch):
        return _summed(functools.partial(loss.sums, params, frozen), batch, parts)

    scalar = abstract_array(loss.model.sharding, "", (), jnp.float32)
    results = jax.tree.map(lambda _: scalar, jax.eval_shape(eval_step, params, frozen, batch))
    return make_program(eval_step, (params, frozen, batch), results, None)


def make_monitor_step(loss: Loss, params: dict, frozen: dict, batch: dict, parts: int = 1) -> Program:
    """(params, frozen, batch) -> {path: {name: [units] or []}}: each FP8 layer's errors, of the first part of the batch."""
    weights = dataclasses.replace(loss.weights, statistics=True)
    loss = dataclasses.replace(loss, weights=weights)

    def monitor_step(params, frozen, batch):
        batch = batch if parts == 1 else jax.tree.map(lambda x: x[0], batch)
        gradient = jax.grad(functools.partial(_part_loss, loss, loss.totals(batch), 1), has_aux=True)
        return weights.fp8.report(gradient(params, frozen, batch)[0])

    scalar = abstract_array(loss.model.sharding, "", (), jnp.float32)
    results = jax.tree.map(lambda _: scalar, jax.eval_shape(monitor_step, params, frozen, batch))
    return make_program(monitor_step, (params, frozen, batch), results, None)


def _part_loss(loss: Loss, totals: dict, parts: int, params: dict, frozen: dict, batch: dict):
    sums = loss.sums(params, frozen, batch)
    return loss.total(sums, totals, parts), sums


def _totals(loss: Loss, batch: dict, parts: int) -> dict:
    texts = {name: batch[name] for name in ("tokens", "segment_ids", "loss_weights")}
    return loss.totals(texts if parts == 1 else jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), texts))


def _summed(function: Callable, batch: dict, parts: int) -> Any:
    """What `function` gives for each part of the batch, one after the other, added up in float32."""
    if parts == 1:
        return function(batch)

    def add(carry, part):
        return jax.tree.map(jnp.add, carry, function(part)), None

    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], batch))
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, start, batch)[0]


def _metrics(sums: dict, totals: dict, parts: int) -> dict:
    """loss: of the next token, per unit of weight; mtp_loss; balance; busiest_expert: its load over the mean one; tokens:
    the sum of weights."""
    metrics = {"loss": sums["nll"] / totals["weight"], "tokens": sums["weight"]}
    if "mtp_weight" in totals:
        metrics["mtp_loss"] = sums["mtp_nll"] / totals["mtp_weight"]
    if "balance" in sums:
        metrics |= {name: sums[name] / parts for name in ("balance", "busiest_expert")}
    return metrics
