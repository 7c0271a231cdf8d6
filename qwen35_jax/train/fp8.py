"""FP8 training of the model: which weights are multiplied in FP8, and a monitor of what that costs in precision.

The weights are those that the published FP8 checkpoints quantise, MTP's included, less those that `config.fp8.hold` names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from qwen35_jax.model import Model
from qwen35_jax.ops.fp8 import Fp8Operand
from qwen35_jax.ops.fp8.statistics import COUNT, ratios
from qwen35_jax.train.partition import flatten, select, unflatten


@dataclasses.dataclass(frozen=True)
class Fp8Layers:
    """The weights that are multiplied in FP8: ((path, logical axes without the unit axis), ...), and how the mesh cuts axes."""

    weights: tuple[tuple[str, str], ...]
    cuts: tuple[tuple[str, int], ...]

    def wrap(self, params: dict, prefix: str = "", statistics: bool = False) -> dict:
        """`params` with those weights as `Fp8Operand`s. `prefix` ("units/") stands before the paths of a tree that is a part.

        Applied last, to the parameters as the model's functions take them: stacked or of one unit. With `statistics` the
        gradient of a wrapped weight is not its gradient but what `report` reads.
        """
        axes, flat = dict(self.weights), flatten(params)
        for path, value in flat.items():
            if (name := prefix + path) in axes:
                flat[path] = Fp8Operand(value, self.cuts, _model_axis(axes[name]) if statistics else None)
        return unflatten(flat)

    def report(self, gradients: dict) -> dict[str, dict[str, jax.Array]]:
        """{path: {name: [U] for units, [] elsewhere}} from the gradients of a loss whose parameters were wrapped with
        `statistics`; weights that it does not have (frozen ones) are left out.

        product_error: relative Frobenius distance between the layer's FP8 product and the same product in the dtype of its
        activations. activation, weight, gradient: `_error` is that of the rounding of x, w and the incoming gradient as the
        products multiply them (along the summed axis); `_underflow` the share of their entries that became zero.
        """
        flat, result = flatten(gradients), {}
        for path, axes in self.weights:
            if path in flat:
                gradient, axis = flat[path], _model_axis(axes)
                units = gradient.ndim - len(axes.split())
                others = tuple(i for i in range(units, gradient.ndim) if i != axis % gradient.ndim)
                result[path] = ratios(gradient.sum(others, dtype="float32")[..., :COUNT])
        return result


def scalars(report: dict) -> dict[str, float]:
    """{"fp8/units/3/layers/0/mixer/q/product_error": number, …}, each unit's apart, from what `Fp8Layers.report` gives."""
    result = {}
    for path, row in report.items():
        for name, x in row.items():
            units = {path.replace("units/", f"units/{u}/", 1): value for u, value in enumerate(x)} if x.ndim else {path: x}
            result |= {f"fp8/{place}/{name}": float(value) for place, value in units.items()}
    return result


def _model_axis(axes: str) -> int:
    """The axis of D, counted from the end: each of these weights has one, and no mesh cuts it."""
    letters = axes.split()
    return letters.index("D") - len(letters)


def fp8_layers(model: Model, hold: Sequence[str] = ()) -> Fp8Layers:
    """The FP8 weights of a model. `hold`: regexes of paths ("units/layers/0/mixer/q") that stay in the model's dtype.

    UserError for a regex that matches no FP8 weight.
    """
    declared = flatten(model.declarations())
    weights = {path: p.axes for path, p in declared.items() if p.fp8}
    held = select(weights, hold, "config.fp8.hold")
    cuts = tuple((letter, model.sharding.size(letter)) for letter in "BTNKF")
    return Fp8Layers(tuple((p, axes) for p, axes in weights.items() if p not in held), tuple(c for c in cuts if c[1] > 1))
