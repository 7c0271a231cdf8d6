"""A compiled step before it is compiled: a function with the abstract arguments it is lowered on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from qwen35_jax.sharding import Sharding


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function and the abstract arguments (shapes, dtypes, shardings) it is compiled for."""

    function: Callable
    arguments: tuple[Any, ...]

    def lower(self):
        return self.function.lower(*self.arguments)

    def compile(self):
        return self.lower().compile()


def abstract_array(sharding: Sharding, axes: str, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """The shape, dtype and sharding of an array with these logical axes."""
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=NamedSharding(sharding.mesh, sharding.spec(axes)))


def make_program(function: Callable, arguments: tuple, results: Any, donated: int | None) -> Program:
    """`function` jitted so that it returns arrays laid out like the abstract `results`; argument `donated` is consumed."""
    shardings = jax.tree.map(lambda x: x.sharding, results)
    donate = () if donated is None else (donated,)
    return Program(jax.jit(function, out_shardings=shardings, donate_argnums=donate), arguments)


def placing(compiled: Callable, arguments: tuple) -> Callable:
    """The compiled program; host arrays passed to it are placed as it expects them."""

    def put(x, like):
        if not isinstance(x, jax.Array):
            # From each process the parts that its own devices hold.
            x = np.asarray(x, like.dtype)
            return jax.make_array_from_callback(x.shape, like.sharding, lambda index: x[index])
        return x

    return lambda *args: compiled(*(jax.tree.map(put, a, like) for a, like in zip(args, arguments, strict=True)))
