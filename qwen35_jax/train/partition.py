"""Parameters by path and by role: which are trained, which stay frozen, and which axes make a parameter a matrix.

A path is the keys of the nested dict joined by "/", such as "units/layers/0/mixer/q". Regexes are searched for in paths.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from flax import nnx

from qwen35_jax.errors import UserError
from qwen35_jax.model import Model, VisionModel
from qwen35_jax.sharding import MESH_AXES, Sharding

# In front of a matrix these letters count independent matrices: units, experts, halves of the MTP projection.
BATCH_AXES = frozenset("UEG")


@dataclasses.dataclass(frozen=True)
class MatrixAxes:
    """A parameter as matrices: its first `batch` dimensions count them, the next `inputs` are rows, the others columns."""

    batch: int
    inputs: int


def matrix_axes(axes: str) -> MatrixAxes | None:
    """'U D K H' -> 1 batch axis, 1 input axis (D to K x H); 'N H D': 0 and 2. None for vectors, biases of heads and convolution
    windows.

    One side is D, or the rank R of a LoRA factor, one axis alone; heads and their width are two, a patch's pixels four.
    """
    letters = axes.split()
    batch = next((i for i, letter in enumerate(letters) if letter not in BATCH_AXES), len(letters))
    sides = letters[batch:]
    if len(sides) < 2 or "W" in sides or not {"D", "R"} & set(sides):
        return None
    return MatrixAxes(batch, 1 if sides[0] in ("D", "R") else len(sides) - 1)


def logical_axes(model: Model, tower: VisionModel | None = None) -> dict:
    """The axes of each parameter, such as "V D", in the structure of the stacked parameters; those of units, and of the blocks of
    a vision tower, begin with "U". They say what a parameter is, on any mesh."""
    tree = _axes(model.declarations(), "units")
    if tower is None:
        return tree
    # A tower's own letters are those of its layout: of the mesh where nothing is cut, they name every side.
    single = Sharding(jax.sharding.AbstractMesh((1, 1, 1), MESH_AXES))
    return tree | {"vision": _axes(VisionModel(tower.config, single).declarations(), "blocks")}


def _axes(declarations: dict, stacked: str) -> dict:
    tree = jax.tree.map(lambda p: p.axes, declarations, is_leaf=lambda x: isinstance(x, nnx.Param))
    return tree | {stacked: jax.tree.map(lambda axes: f"U {axes}", tree[stacked])}


def flatten(tree: dict) -> dict[str, Any]:
    """Leaves by path. Everything that is not a dict is a leaf: arrays, strings, shardings, FP8 weights."""
    flat = {}
    for key, value in tree.items():
        inner = {f"{key}/{path}": leaf for path, leaf in flatten(value).items()} if isinstance(value, dict) else {key: value}
        flat.update(inner)
    return flat


def unflatten(flat: dict[str, Any]) -> dict:
    """The nested dict of leaves by path."""
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = leaf
    return tree


def paths(tree: dict) -> dict:
    """Each leaf's path, in the structure of the tree."""
    return unflatten({path: path for path in flatten(tree)})


def select(names: Iterable[str], regexes: Sequence[str], field: str) -> set[str]:
    """The paths in which at least one regex is found. UserError, naming `field`, for a regex that is none or finds nothing."""
    names, selected = list(names), set()
    for regex in regexes:
        if not isinstance(regex, str):
            raise UserError(f"{field}: {regex!r} is not a regular expression; write it in quotes")
        try:
            found = [name for name in names if re.search(regex, name)]
        except re.error as error:
            raise UserError(f"{field}: {regex!r} is not a regular expression: {error}") from None
        if not found:
            examples = ", ".join(names[:: len(names) // 4 + 1])
            raise UserError(f"{field}: {regex!r} matches no parameter; parameters are {examples}, …")
        selected.update(found)
    return selected


def split(params: dict, frozen_regexes: Sequence[str]) -> tuple[dict, dict]:
    """(trained, frozen): nested dicts that lack each other's leaves; `frozen` has the paths that a regex of `freeze` matches.

    UserError where a regex matches nothing or nothing is left to train.
    """
    flat = flatten(params)
    frozen = select(flat, frozen_regexes, "config.freeze")
    if len(frozen) == len(flat):
        raise UserError(f"config.freeze: {', '.join(map(repr, frozen_regexes))} match every parameter: leave something to train")
    trained = unflatten({path: leaf for path, leaf in flat.items() if path not in frozen})
    return trained, unflatten({path: leaf for path, leaf in flat.items() if path in frozen})


def join(trained: dict, frozen: dict) -> dict:
    """The inverse of `split`: one tree with the leaves of both."""
    return unflatten(flatten(trained) | flatten(frozen))
