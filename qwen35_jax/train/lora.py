"""LoRA by merged weights: W' = W + (alpha / rank) * A B for every matrix whose path matches, expert tensors included.

A is [batch.., inputs.., R] and B is [batch.., R, outputs..], where batch axes (units, experts), inputs and outputs follow
from the parameter's logical axes. The model sees ordinary parameters, so training and export need to know nothing of it.
"""

from __future__ import annotations

import math
import zlib

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from qwen35_jax.errors import UserError
from qwen35_jax.train.partition import flatten, matrix_axes, select, unflatten


def lora_axes(axes: dict, config: ConfigDict) -> dict:
    """Logical axes of the factors, R being the rank: a tree with {"a", "b"} in the place of each matched matrix.

    UserError for a rank or alpha that is not positive, and for a regex that matches no matrix.
    """
    if not (config.rank > 0 and 0 < config.alpha < math.inf):
        raise UserError(f"config.lora: rank ({config.rank}) and alpha ({config.alpha}) must both be above 0")
    if not config.match:
        raise UserError("config.lora.match is empty: give regexes of the matrices to adapt")
    matrices = {path: a for path, a in flatten(axes).items() if matrix_axes(a)}
    factors = {}
    for path in sorted(select(matrices, config.match, "config.lora.match")):
        a, b = _sides(matrices[path].split(), matrices[path], "R")
        factors[path] = {"a": " ".join(a), "b": " ".join(b)}
    return unflatten(factors)


def abstract_lora(abstract_params: dict, axes: dict, config: ConfigDict) -> dict:
    """ShapeDtypeStructs (float32) of the factors; each side lies as it does in its parameter, the rank is never cut."""
    flat_axes, params, factors = flatten(axes), flatten(abstract_params), {}
    for path in _matched(lora_axes(axes, config)):
        param = params[path]
        spec = (*param.sharding.spec, *[None] * (len(param.shape) - len(param.sharding.spec)))
        shapes = _sides(param.shape, flat_axes[path], config.rank)
        specs = _sides(spec, flat_axes[path], None)
        factors[path] = {
            name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(param.sharding.mesh, PartitionSpec(*place)))
            for name, shape, place in zip("ab", shapes, specs, strict=True)
        }
    return unflatten(factors)


def init_lora(seed: int, abstract_params: dict, axes: dict, config: ConfigDict) -> dict:
    """The factors, float32, on the devices that hold them: A normal with variance 1 / inputs, B zero.

    A factor's numbers depend on `seed` and its path alone, not on the mesh.
    """
    places, flat_axes = flatten(abstract_lora(abstract_params, axes, config)), flatten(axes)

    def draw(key: jax.Array) -> dict:
        factors = {}
        for path, place in places.items():
            parameter, _, name = path.rpartition("/")
            if name == "b":
                factors[path] = jnp.zeros(place.shape, place.dtype)
                continue
            inputs = math.prod(place.shape[matrix_axes(flat_axes[parameter]).batch : -1])
            own = jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)
            factors[path] = jax.random.normal(own, place.shape, place.dtype) / math.sqrt(inputs)
        return factors

    shardings = {path: place.sharding for path, place in places.items()}
    return unflatten(jax.jit(draw, out_shardings=shardings)(jax.random.key(seed)))


def merge_lora(params: dict, lora: dict, config: ConfigDict, axes: dict, dtype: DTypeLike | None = None) -> dict:
    """The parameters with each adapted matrix replaced by W + (alpha / rank) A B, computed in float32 and cast once.

    The cast is to `dtype`, or to the matrix's own where None; parameters without factors are returned as they are.
    """
    merged, factors, flat_axes = flatten(params), flatten(lora), flatten(axes)
    for path in _matched(lora):
        weight, a, b = merged[path], factors[f"{path}/a"], factors[f"{path}/b"]
        batch = tuple(range(matrix_axes(flat_axes[path]).batch))
        # Batch, inputs, outputs: the order in which the parameter has them. Full precision also where float32 is not the default.
        product = jax.lax.dot_general(
            a, b, (((a.ndim - 1,), (len(batch),)), (batch, batch)),
            precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
        )  # fmt: skip
        merged[path] = (weight.astype(jnp.float32) + config.alpha / config.rank * product).astype(dtype or weight.dtype)
    return unflatten(merged)


def _matched(lora: dict) -> list[str]:
    """Paths of the parameters that have factors."""
    return [path.removesuffix("/a") for path in flatten(lora) if path.endswith("/a")]


def _sides(dimensions, axes: str, rank) -> tuple[tuple, tuple]:
    """What holds for each dimension of a parameter -> the same for A and for B, with `rank` for their own dimension."""
    matrix, dimensions = matrix_axes(axes), tuple(dimensions)
    inputs_end = matrix.batch + matrix.inputs
    return (*dimensions[:inputs_end], rank), (*dimensions[: matrix.batch], rank, *dimensions[inputs_end:])
