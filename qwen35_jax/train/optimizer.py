"""From the run configuration's `optimizer` to an Optax optimizer: schedule, clipping, AdamW or Muon, weight decay.

What a parameter gets follows from its logical axes:
- Muon: the matrices inside units and the MTP layer, each unit's, expert's and half's apart. Adam: everything else, namely
  embedding and head (a row is a token, not a direction), the router (few columns, and its scale matters), norms,
  convolutions, A_log, dt_bias and the shared expert's gate.
- Weight decay: all matrices, with embedding, head and router; no vectors and no convolutions.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from qwen35_jax.errors import UserError
from qwen35_jax.sharding import AXIS_RULES
from qwen35_jax.train.partition import matrix_axes

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "wsd", "constant")
# Root mean square of Muon's updates: that of Adam's, so that one learning rate serves both (https://arxiv.org/abs/2502.16982).
MUON_RMS = 0.2


def learning_rate(config: ConfigDict, total_steps: int) -> optax.Schedule:
    """Step -> learning rate: linear from 0 over `warmup_steps`, then by `schedule`, of `total_steps` steps in all.

    cosine: down to `final_fraction` of the peak; wsd: constant, and linear to that over the last `decay_fraction` of all
    steps; constant. UserError for unknown names and numbers that make no sense.
    """
    _check(config, total_steps)
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "cosine":
        body = optax.cosine_decay_schedule(peak, max(1, total_steps - warmup), config.final_fraction)
    elif config.schedule == "wsd":
        decay = _decay_steps(config, total_steps)
        body = optax.linear_schedule(peak, peak * config.final_fraction, decay, total_steps - decay - warmup)
    else:
        body = optax.constant_schedule(peak)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), body], [warmup]) if warmup else body


def make_optimizer(config: ConfigDict, total_steps: int, axes: dict, abstract_params: dict) -> optax.GradientTransformation:
    """Gradients -> updates for the parameters that are trained: their logical axes, and their shapes and shardings.

    Clips the global norm to `clip_norm` (0: never). Decay is learning_rate * weight_decay for every matrix, whatever
    muon_learning_rate is. The state is a tree of arrays; its moments have the parameters' shapes. UserError as `learning_rate`.
    """
    schedule = learning_rate(config, total_steps)
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        _muon_or_adam(config, axes, abstract_params, adam) if config.name == "muon" else adam,
        optax.add_decayed_weights(config.weight_decay, decay_mask(axes)),
        optax.scale_by_learning_rate(schedule),
    )


def decay_mask(axes: dict) -> dict:
    """Which parameters weight decay shrinks: the matrices."""
    return jax.tree.map(lambda a: matrix_axes(a) is not None, axes)


def groups(axes: dict) -> dict:
    """Who updates each parameter when Muon is asked for: "muon" or "adam"."""

    def group(a: str) -> str:
        return "adam" if matrix_axes(a) is None or {"V", "X"} & set(a.split()) else "muon"

    return jax.tree.map(group, axes)


def state_shardings(optimizer: optax.GradientTransformation, abstract_params: dict) -> Any:
    """Shardings in the structure of the optimizer's state: moments lie as their parameter, all else is replicated."""
    replicated = NamedSharding(jax.tree.leaves(abstract_params)[0].sharding.mesh, PartitionSpec())
    return optax.tree_map_params(
        optimizer,
        lambda moment, param: moment if _masked(moment) else param.sharding,
        jax.eval_shape(optimizer.init, abstract_params),
        abstract_params,
        transform_non_params=lambda _: replicated,
        is_leaf=_masked,
    )


def _masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _muon_or_adam(
    config: ConfigDict, axes: dict, abstract_params: dict, adam: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Muon as first published: Nesterov momentum, then the nearest orthogonal matrix. The scale has the learning rates' ratio."""
    scale = MUON_RMS * (config.muon_learning_rate or config.learning_rate) / config.learning_rate
    labels = groups(axes)

    def matrix_update(label: str, a: str, param: Any):
        return functools.partial(_muon_update, a, param.sharding, scale) if label == "muon" else optax.MaskedNode()

    functions = jax.tree.map(matrix_update, labels, axes, abstract_params)
    orthogonalize = optax.stateless(lambda updates, params: jax.tree.map(lambda x, f: f(x), updates, functions))
    muon = optax.chain(optax.trace(config.muon_b1, nesterov=True), orthogonalize)
    return optax.partition({"muon": muon, "adam": adam}, labels)


def _muon_update(axes: str, sharding: NamedSharding, scale: float, momentum: jax.Array) -> jax.Array:
    """The orthogonal matrix nearest to each matrix of the momentum, with root mean square `scale`; laid out as `sharding`.

    Optax merges all batch axes into one. Experts are cut over devices and units are not: merging the two would gather the
    experts of all devices, so units are mapped over instead.
    """
    matrix, stacked = matrix_axes(axes), axes.startswith("U")
    outputs = matrix.batch + matrix.inputs
    sides = [tuple(i - stacked for i in r) for r in (range(matrix.batch, outputs), range(outputs, momentum.ndim))]
    # Without momentum of its own, Optax's transformation is the plain function of a matrix.
    muon = scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=MuonDimensionNumbers(*sides))

    def orthogonal(x):
        return muon.update(x, muon.init(x))[0]

    whole = functools.partial(jax.lax.with_sharding_constraint, shardings=_whole_matrices(axes, sharding, momentum.shape))
    # Said of the result too: else the partitioner cuts the iterations as the parameter is cut.
    x = whole((jax.vmap(orthogonal) if stacked else orthogonal)(whole(momentum)))
    widest = max(math.prod(momentum.shape[matrix.batch : outputs]), math.prod(momentum.shape[outputs:]))
    return jax.lax.with_sharding_constraint(x, sharding) * (scale * math.sqrt(widest))


def _whole_matrices(axes: str, sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """Where matrices are orthogonalised: not cut over the data axes, which get different units instead where they divide them.

    Every one of the five iterations would gather matrices that are cut both ways.
    """
    entries = [
        (e,) if isinstance(e, str) else tuple(e or ()) for e in (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))
    ]
    batch = matrix_axes(axes).batch
    freed = tuple(axis for entry in entries[batch:] for axis in entry if axis in AXIS_RULES["B"])
    entries[batch:] = [tuple(axis for axis in entry if axis not in freed) for entry in entries[batch:]]
    ways = math.prod(sharding.mesh.shape[axis] for axis in freed)
    if axes.startswith("U") and not entries[0] and shape[0] % ways == 0:
        entries[0] = freed
    return NamedSharding(sharding.mesh, PartitionSpec(*(entry or None for entry in entries)))


def _decay_steps(config: ConfigDict, total_steps: int) -> int:
    return round(config.decay_fraction * total_steps)


def _check(config: ConfigDict, total_steps: int) -> None:
    """UserError, naming the field, for what no optimizer can be made of."""
    for field, known in (("name", OPTIMIZERS), ("schedule", SCHEDULES)):
        if config[field] not in known:
            raise UserError(f"config.optimizer.{field} is {config[field]!r}; accepted are {', '.join(known)}")
    if not 0 < config.learning_rate < math.inf:
        raise UserError(f"config.optimizer.learning_rate is {config.learning_rate}; it must be above 0")
    for field in ("warmup_steps", "eps", "weight_decay", "clip_norm", "muon_learning_rate"):
        if not 0 <= config[field] < math.inf:
            raise UserError(f"config.optimizer.{field} is {config[field]}; it must not be negative")
    for field in ("b1", "b2", "muon_b1"):
        if not 0 <= config[field] < 1:
            raise UserError(f"config.optimizer.{field} is {config[field]}; it must be at least 0 and below 1")
    for field in ("decay_fraction", "final_fraction"):
        if not 0 <= config[field] <= 1:
            raise UserError(f"config.optimizer.{field} is {config[field]}; it must be between 0 and 1")
    _check_steps(config, total_steps)


def _check_steps(config: ConfigDict, total_steps: int) -> None:
    if config.schedule != "wsd":
        if config.warmup_steps > total_steps:
            raise UserError(
                f"config.optimizer.warmup_steps ({config.warmup_steps}) is more than all {total_steps} steps; "
                "lower it, as with --config.optimizer.warmup_steps=0"
            )
        return
    decay, field = _decay_steps(config, total_steps), f"config.optimizer.decay_fraction ({config.decay_fraction})"
    if not decay:
        raise UserError(f"{field} of {total_steps} steps is no step; raise it, or choose the schedule constant")
    if config.warmup_steps + decay > total_steps:
        raise UserError(
            f"{field} leaves {total_steps - decay} of {total_steps} steps, fewer than warmup_steps ({config.warmup_steps})"
        )
