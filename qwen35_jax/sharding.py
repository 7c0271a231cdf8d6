"""From `--mesh 8x1` to devices, and from logical axis letters to mesh axes. The only place that knows both.

A mesh always has three axes: `replica` (outer data), `data` (tokens) and `model` (heads, features, vocabulary). Modules name
logical axes only; `AXIS_RULES` maps them, with `CONTEXT_RULES` over it where sequences are cut. A logical shape is a string of
letters such as "B T D", one letter a dimension.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen35_jax.config import ModelConfig
from qwen35_jax.errors import OtherHostError, UserError

MESH_AXES = ("replica", "data", "model")
MAX_VIRTUAL_DEVICES = 1024  # beyond them a mistyped mesh would keep the machine busy for minutes

# Letters that are not named here (D, H, U, ...) are never sharded.
AXIS_RULES: dict[str, tuple[str, ...]] = {
    "B": ("replica", "data"),
    "S": ("replica", "data"),
    "J": ("replica", "data"),  # what each shard of the tokens says for itself, a row a shard
    "T": (),
    "P": (),  # places of a cache of keys and values
    "N": ("model",),
    "K": ("model",),
    "F": ("model",),
    "V": ("model",),
    "E": ("data", "model"),
    "I": ("replica", "data", "model"),  # rows of patches, where `model` does not divide the vision tower
}
# What context parallelism changes: sequences lie across `data`, and a row is on all data shards of its replica.
CONTEXT_RULES: dict[str, tuple[str, ...]] = {"B": ("replica",), "S": ("replica",), "T": ("data",), "P": ("data",)}
# And in steps of one token, which there is nothing to cut of: every data shard has it.
ONE_TOKEN_RULES: dict[str, tuple[str, ...]] = CONTEXT_RULES | {"T": (), "J": ("replica",)}


def parse_mesh(text: str) -> tuple[int, int, int]:
    """'8x1' -> (1, 8, 1); '2x8x4' -> (2, 8, 4). UserError for anything else."""
    match = re.fullmatch(r"(?:(\d{1,9})x)?(\d{1,9})x(\d{1,9})", str(text).strip())
    shape = tuple(int(n or 1) for n in match.groups()) if match else (0,)
    if 0 in shape:
        raise UserError(f"mesh {text!r} is not a mesh; write DATAxMODEL such as 8x1, or REPLICAxDATAxMODEL such as 2x8x4")
    return shape


def make_mesh(text: str, devices: list | None = None) -> Mesh:
    """The mesh over the first devices of this machine (or of `devices`).

    Without accelerators the devices are virtual CPU devices; call this before JAX is first used, since their number is
    fixed then. UserError says how many devices there are when they are too few.
    """
    shape = parse_mesh(text)
    count = shape[0] * shape[1] * shape[2]
    if devices is None:
        try:
            if jax.config.jax_num_cpu_devices < count <= MAX_VIRTUAL_DEVICES and not jax.distributed.is_initialized():
                jax.config.update("jax_num_cpu_devices", count)
        except RuntimeError:
            pass  # JAX is running already: what it has is counted below
        devices = all_devices()
        if jax.process_count() > 1 and len(devices) > count:
            hosts = f"{jax.process_count()} hosts have {len(devices)}"
            raise UserError(f"mesh {text} has {count} devices, but {hosts}: a mesh of several hosts must have all of them")
    if len(devices) < count:
        kind = devices[0].device_kind
        if devices[0].platform != "cpu":
            hint = f"use at most {len(devices)} devices"
        elif count > MAX_VIRTUAL_DEVICES:
            hint = f"at most {MAX_VIRTUAL_DEVICES} virtual CPU devices are made"
        elif jax.process_count() > 1:
            hint = "hosts with CPUs alone make more when they are told --hosts and --host"
        else:
            hint = "start a new Python process"
        raise UserError(f"mesh {text} needs {count} devices, but there are {len(devices)} ({kind}): {hint}")
    try:
        return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:count])
    except (AssertionError, NotImplementedError) as error:  # TPU chips stand in a grid, which not every mesh fits
        kind, there = devices[0].device_kind, len(devices)
        hint = f"use all {there}" if count < there else "use another shape"
        raise UserError(f"mesh {text}: {count} of these {there} devices ({kind}) form no such mesh; {hint}") from error


def to_host(x: jax.Array) -> np.ndarray:
    """The whole array, also where other hosts hold parts of it; then all must call this."""
    return np.asarray(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What is inside succeeds on every host or ends every host: a UserError of one is one on the others too."""
    try:
        yield
    except UserError:
        _all_say(False)
        raise
    if not _all_say(True):
        raise OtherHostError("another host cannot go on; it says why")


def _all_say(yes: bool) -> bool:
    if not jax.distributed.is_initialized():
        return yes
    return bool(np.all(multihost_utils.process_allgather(np.array(yes))))


def all_devices() -> list[jax.Device]:
    """The devices of all hosts. UserError where JAX finds none."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # the second, with no text, where a platform that was asked for is absent
        asked = jax.config.jax_platforms
        where = f"of the platforms {asked} (JAX_PLATFORMS or jax_platforms); leave that unset" if asked else "here"
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"JAX finds no device {where}" + (f": {reason}" if reason else "")) from error


@dataclasses.dataclass(frozen=True)
class Sharding:
    """The mesh together with the axis rules: everything that a module needs to know about devices.

    context_parallel: T is cut over `data`, and rows over `replica` alone. one_token: the same devices and caches, for steps of a
    single token.
    """

    mesh: Mesh
    context_parallel: bool = False
    one_token: bool = False

    @functools.cached_property
    def rules(self) -> dict[str, tuple[str, ...]]:
        """The mesh axes of each letter."""
        if not self.context_parallel:
            return AXIS_RULES
        return AXIS_RULES | (ONE_TOKEN_RULES if self.one_token else CONTEXT_RULES)

    @property
    def context_axis(self) -> str | None:
        """The mesh axis over which T is cut, None where it is whole."""
        return self.rules["T"][0] if self.rules["T"] else None

    def for_one_token(self) -> Sharding:
        """For the steps that decode after prefills on this one."""
        return dataclasses.replace(self, one_token=True) if self.context_parallel else self

    @property
    def model(self) -> int:
        return self.mesh.shape["model"]

    @property
    def batch(self) -> int:
        """How many ways B and S are cut: batches are padded to a multiple of it."""
        return self.size("B")

    def size(self, letter: str) -> int:
        """Number of shards of a logical axis."""
        return _product(self.mesh.shape[a] for a in self.rules.get(letter, ()))

    def spec(self, axes: str, **replaced: tuple[str, ...]) -> P:
        """PartitionSpec of a logical shape. `replaced` overrides the rule of a letter. A mesh axis used twice is an error."""
        rules = {**self.rules, **replaced}
        entries = [rules.get(letter, ()) for letter in axes.split()]
        used = [a for entry in entries for a in entry]
        if len(used) != len(set(used)):
            raise ValueError(f"logical axes {axes!r} put two dimensions on one mesh axis: {used}")
        return P(*(entry or None for entry in entries))

    def constrain(self, x: jax.Array, axes: str) -> jax.Array:
        """Fixes how an activation is laid out. Used at block boundaries; the compiler propagates between them."""
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.spec(axes)))

    def shard_map(self, f: Callable, in_axes: Any, out_axes: Any) -> Callable:
        """`jax.shard_map` with logical shapes (strings, in trees that are prefixes of the arguments) for specs."""
        specs = functools.partial(jax.tree.map, self.spec)
        return jax.shard_map(f, mesh=self.mesh, in_specs=specs(in_axes), out_specs=specs(out_axes), check_vma=False)

    def heads(self, n: int) -> int:
        """How many heads are computed: n, or one repeat a shard when the mesh has more shards than there are heads."""
        return max(n, self.model)

    def repeat_heads(self, weight: Any, axes: str, letter: str, *, once: bool = False) -> Any:
        """Repeats each head of a parameter (array or Fp8Weight) so that every `model` shard holds one; gradients sum.

        `once` zeroes all repeats but the first: for output projections, where the repeats are added up.
        """
        axis = axes.split().index(letter)
        repeats = max(1, self.model // jax.tree.leaves(weight)[0].shape[axis])
        if repeats == 1:
            return weight

        def repeat(x):
            y = jnp.repeat(x, repeats, axis=axis)
            if once:
                first = jnp.arange(y.shape[axis]) % repeats == 0
                y = jnp.where(first.reshape([-1 if i == axis else 1 for i in range(y.ndim)]), y, jnp.zeros((), y.dtype))
            return self.constrain(y, axes)

        return jax.tree.map(repeat, weight)

    def parameter_spec(self, axes: str, *shapes: tuple[int, ...]) -> P:
        """Spec of one parameter, its shape and (for FP8) the shape of its scales.

        Heads that the mesh does not divide stay whole; a weight whose 128-blocks it does not divide stays whole over
        `model`; experts go over `data` and `model`, or over `data` with F over `model` where E does not divide both.
        """
        letters = axes.split()
        replaced = {}
        if "E" in letters:
            expert_axes, f_axes = self.expert_axes(*(dict(zip(letters, s, strict=True)) for s in shapes))
            replaced = {"E": expert_axes, "F": f_axes}
        for letter in ("N", "K", "F", "V"):
            if letter in letters and letter not in replaced:
                sizes = [s[letters.index(letter)] for s in shapes]
                replaced[letter] = ("model",) if all(n % self.model == 0 for n in sizes) else ()
        return self.spec(axes, **replaced)

    def fully_sharded(self, spec: P, shape: tuple[int, ...], whole: int = 0, axes: tuple[str, ...] = ("replica", "data")) -> P:
        """`spec` with those of `axes` that it leaves unused put on the longest dimension they divide (ZeRO-3, FSDP).

        The first `whole` dimensions (stacked units) stay as they are: a scan takes slices along them. What no dimension
        can be divided by stays replicated.
        """
        given = [*spec, *[None] * (len(shape) - len(spec))]
        entries = [(e,) if isinstance(e, str) else tuple(e or ()) for e in given]
        used = {axis for entry in entries for axis in entry}
        for candidates in (axes, *((axis,) for axis in reversed(axes))):
            free = tuple(a for a in candidates if a not in used and self.mesh.shape[a] > 1)
            ways = _product(self.mesh.shape[a] for a in free)
            fits = [i for i in range(whole, len(shape)) if not entries[i] and shape[i] % ways == 0]
            if free and fits:
                entries[max(fits, key=lambda i: shape[i])] = free
                break
        return P(*(entry or None for entry in entries))

    def expert_axes(self, *sizes: dict[str, int]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Mesh axes of (E, F) for expert weights whose dimensions (and block counts) are `sizes`."""
        if sizes[0]["E"] % (self.mesh.shape["data"] * self.model) == 0:
            return ("data", "model"), ()
        divides = all(s.get("F", self.model) % self.model == 0 for s in sizes)
        return ("data",), ("model",) if divides else ()


def check_mesh(config: ModelConfig, sharding: Sharding) -> None:
    """UserError, naming meshes that work, where the model cannot be cut as the mesh asks."""
    if sharding.context_parallel and sharding.mesh.shape["data"] == 1:
        shape = "x".join(str(n) for n in sharding.mesh.axis_sizes)
        raise UserError(f"context parallelism cuts sequences over `data`, which is 1 in mesh {shape}: use one such as 8x1")
    problem = _mesh_problem(config, sharding.mesh.shape["data"], sharding.model)
    if problem:
        count = sharding.mesh.size
        while not (good := _meshes(config, count)):  # 1x1 fits every model
            count -= 1
        text = "x".join(str(n) for n in sharding.mesh.axis_sizes[0 if sharding.mesh.shape["replica"] > 1 else 1 :])
        advice = f"meshes of {count} devices that work: {', '.join(good)}"
        raise UserError(f"mesh {text} does not fit this model: {problem}; {advice}")


def _meshes(config: ModelConfig, count: int) -> list[str]:
    """DATAxMODEL of every mesh of `count` devices that fits the model."""
    sizes = [(d, count // d) for d in range(count, 0, -1) if count % d == 0]
    return [f"{d}x{m}" for d, m in sizes if not _mesh_problem(config, d, m)]


def _mesh_problem(config: ModelConfig, data: int, model: int) -> str | None:
    for field in ("num_attention_heads", "num_key_value_heads", "linear_num_key_heads", "linear_num_value_heads"):
        n = getattr(config, field)
        if n % model and model % n:
            return f"{model} model shards neither divide nor repeat {field} ({n})"
    widths = {"vocab_size": config.vocab_size, "intermediate_size": config.intermediate_size}
    widths["shared_expert_intermediate_size"] = config.shared_expert_intermediate_size
    for field, n in widths.items():
        if n % model:
            return f"{model} model shards do not divide {field} ({n})"
    if config.num_experts and config.num_experts % (data * model):
        if config.num_experts % data:
            return f"{data} data shards do not divide num_experts ({config.num_experts})"
        if config.moe_intermediate_size % model:
            return f"{model} model shards do not divide moe_intermediate_size ({config.moe_intermediate_size})"
    return None


def _product(numbers) -> int:
    return functools.reduce(lambda a, b: a * b, numbers, 1)
