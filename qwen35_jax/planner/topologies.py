"""Devices that are not there: descriptions from which the real TPU and GPU compilers work on a machine with neither.

A TPU is described by the name of its topology, which libtpu knows. A GPU is described by XLA's GpuTargetConfigProto in
text form, written here from the data sheets of the H100 SXM and the H200 and from the CUDA limits of compute capability
9.0. The process must run with the settings of `prepare_process`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental import topologies

from qwen35_jax.errors import UserError

GIB = 2**30
# libtpu asks a metadata server where it is, and locks the machine's TPU: here there is neither.
SETTINGS = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
# What else it would complain about, in many lines: which kind of TPU this machine is part of, and with which others.
QUIET = {"TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_STDERR_LOG_LEVEL": "3"}
QUIET |= {"TPU_MIN_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3"}
# How much scratch CUB's sort needs, the compiler asks the GPU, for some sizes; its own sort it can plan alone.
GPU_SETTINGS = {"XLA_FLAGS": "--xla_gpu_enable_cub_radix_sort=false"}
COMPILERS = {"tpu": "libtpu", "cuda": "jax_cuda13_plugin"}
CUDA = Path("/usr/local/cuda/bin/ptxas")
MAX_DEVICES = 16384


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one JAX device has, by its maker's data sheet: bytes, bytes per second, floating-point operations per second.

    A chip of tpu7x is two devices, and the figures here are half of its own. `link` is what one device sends over one
    link to a neighbour of the torus, `links` their number; of a GPU, over NVLink to all others of its node together.
    `network` is what a device sends to other nodes. The chips stand in a grid of `dimensions`; `name` is JAX's device_kind;
    `largest` is the number of chips of the largest slice, 0 where there is none such.
    """

    platform: str
    hbm: int
    hbm_bandwidth: float
    bf16: float
    fp8: float
    link: float
    links: int
    network: float
    dimensions: int
    name: str
    devices: int = 1
    largest: int = 0


# https://docs.cloud.google.com/tpu/docs/v5e, v5p, v6e and tpu7x; NVIDIA's data sheets of H100 SXM and H200 (dense rates),
# NVLink 4 of 900 GB/s both ways, a network card of 400 Gb/s beside each GPU.
CHIPS = {
    "v5e": Chip("tpu", 16 * GIB, 819e9, 197e12, 197e12, 50e9, 4, 3.1e9, 2, "TPU v5 lite", largest=256),
    "v5p": Chip("tpu", 95 * GIB, 2765e9, 459e12, 459e12, 100e9, 6, 6.25e9, 3, "TPU v5", largest=6144),
    "v6e": Chip("tpu", 32 * GIB, 1638e9, 918e12, 918e12, 100e9, 4, 12.5e9, 2, "TPU v6 lite", largest=256),
    "tpu7x": Chip("tpu", 96 * GIB, 3690e9, 1153.5e12, 2307e12, 50e9, 6, 6.25e9, 3, "TPU7x", devices=2, largest=9216),
    "h100": Chip("cuda", 80 * 10**9, 3352.32e9, 989.4e12, 1978.9e12, 450e9, 1, 50e9, 1, "NVIDIA H100 80GB HBM3"),
    "h200": Chip("cuda", 141 * 10**9, 4800e9, 989.4e12, 1978.9e12, 450e9, 1, 50e9, 1, "NVIDIA H200 141GB HBM3e"),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of TPU chips, `shape` in each direction of the torus, or `shape` = (nodes, GPUs of each)."""

    kind: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def platform(self) -> str:
        return self.chip.platform

    @property
    def hbm(self) -> int:
        """Bytes of memory of a device."""
        return self.chip.hbm

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """JAX devices: what a mesh multiplies to."""
        return self.chips * self.chip.devices

    def __str__(self) -> str:
        shape = self.shape[1:] if self.platform == "cuda" and self.shape[0] == 1 else self.shape
        return f"{self.kind}:{'x'.join(str(n) for n in shape)}"


def parse_topology(text: str) -> Topology:
    """'v5p:4x4x4', 'v6e:8x8', 'h100:8' (one node), 'h100:2x8' (two). UserError for what there is not."""
    kind, _, sizes = str(text).partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4}){0,2}", sizes):
        raise UserError(
            f"topology {text!r} is none: write a kind ({', '.join(CHIPS)}), a colon and its shape, as v5p:4x4x4, v6e:8x8, "
            "tpu7x:2x2x4, h100:8, or h100:2x8 for two nodes"
        )
    chip, shape = CHIPS[kind], tuple(int(n) for n in sizes.split("x"))
    if chip.platform == "cuda":
        shape = (1, *shape) if len(shape) == 1 else shape
        if len(shape) != 2 or shape[1] > 8:
            raise UserError(f"topology {text!r}: write {kind}:8 or {kind}:NODESx8, with 1 to 8 GPUs of a node")
    elif len(shape) != chip.dimensions:
        example = "x".join(["4"] * chip.dimensions)
        raise UserError(f"topology {text!r}: chips of {kind} stand in {chip.dimensions} directions; write {kind}:{example}")
    topology = Topology(kind, shape)
    if topology.size > MAX_DEVICES:
        raise UserError(f"topology {text!r} has {topology.size} devices; at most {MAX_DEVICES} are planned for")
    if chip.largest and not _can_be_had(topology):
        following = next(larger(topology, 1), None)
        near = f"the next that there is, is {following}" if following else f"the largest have {chip.largest} chips"
        raise UserError(f"topology {text!r}: there is no such slice of {kind}; {near}")
    return topology


def _can_be_had(topology: Topology) -> bool:
    """Whether it is a slice of `_next_slice`, in whatever order of its sides, or one of whole cubes of 4x4x4 chips."""
    shape = tuple(sorted(topology.shape))
    cubes = len(shape) == 3 and not any(n % 4 for n in shape)
    found = _next_slice((0,) * len(shape))
    while math.prod(found) < topology.chips:
        found = _next_slice(found)
    return topology.chips <= topology.chip.largest and (cubes or tuple(sorted(found)) == shape)


def larger(topology: Topology, doublings: int) -> Iterator[Topology]:
    """Slices that can be had with more chips, by about twice as many each, at most so often doubled. GPUs: of a node first."""
    shape = topology.shape
    for _ in range(doublings):
        shape = _next_gpus(shape) if topology.platform == "cuda" else _next_slice(shape)
        bigger = dataclasses.replace(topology, shape=shape)
        if bigger.size > MAX_DEVICES or (topology.chip.largest and bigger.chips > topology.chip.largest):
            return
        yield bigger


def _next_gpus(shape: tuple[int, ...]) -> tuple[int, ...]:
    nodes, gpus = shape
    return (nodes, min(8, 2 * gpus)) if gpus < 8 else (2 * nodes, gpus)


def _next_slice(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The next of 1x1, 2x2, 2x4, 4x4, 4x8, …, or of 2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8, …: twice as many chips, where
    `shape` is one of them."""
    found = (1, 1) if len(shape) == 2 else (2, 2, 1)
    while math.prod(found) <= math.prod(shape):
        side = max(i for i, n in enumerate(found) if n == min(found))
        doubled = [2 * n if i == side else n for i, n in enumerate(found)]
        found = (2, 2) if doubled == [1, 2] else tuple(sorted(doubled))
    return found


def prepare_process(platform: str) -> None:
    """Environment and configuration of a process that compiles for devices of a platform; before JAX is first used."""
    os.environ.update(SETTINGS)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", SETTINGS["JAX_PLATFORMS"])
    # Where compiled programs are cached, one that differs in names alone is another: planner.hlo reads the names of loops.
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    if platform == "cuda":
        given = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{given} {GPU_SETTINGS['XLA_FLAGS']}"


def missing_compiler(platform: str) -> str | None:
    """The package that is missing where one is, of those that compile for a platform."""
    if importlib.util.find_spec(COMPILERS[platform]) is None:
        return COMPILERS[platform]
    return "nvidia-cuda-nvcc" if platform == "cuda" and not _has_assembler() else None


def _has_assembler() -> bool:
    """Whether XLA can find ptxas: that of the wheel, or of CUDA where it is on PATH, at its usual place or named in a flag."""
    named = "xla_gpu_cuda_data_dir" in os.environ.get("XLA_FLAGS", "")
    return bool(wheel_tool("ptxas") or shutil.which("ptxas")) or CUDA.exists() or named


def wheel_tool(name: str) -> Path | None:
    """A program of the wheels nvidia-cuda-*, which are no modules: they lie in a namespace of NVIDIA's."""
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec else ()
    return max((path for root in roots for path in Path(root).glob(f"cu*/bin/{name}")), default=None)


def topology_devices(topology: Topology) -> list[jax.Device]:
    """The devices of a topology, good for a Mesh and for lowering and compiling, not for running. UserError where the
    compiler is not installed or does not know the topology."""
    if missing := missing_compiler(topology.platform):
        raise UserError(f"compiling for {topology} needs {missing}: pip install -e '.[aot]'")
    try:
        if topology.platform == "tpu":
            return list(topologies.get_topology_desc(platform="tpu", topology_name=str(topology)).devices)
        grid = f"{topology.shape[0]}x1x{topology.shape[1]}"
        description = topologies.get_topology_desc(
            platform="cuda", topology_name=grid, topology=grid, target_config=gpu_description(topology.kind)
        )
        return list(description.devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        compiler = COMPILERS[topology.platform]
        raise UserError(f"topology {topology} is refused by {compiler}: {' '.join(str(error).split())[:200]}") from error


@dataclasses.dataclass(frozen=True)
class StandIn:
    """A device without a compiler: as much of a jax.Device as a Mesh, its layout over the chips and `resolve_forms` ask for."""

    id: int
    platform: str
    device_kind: str
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    process_index: int = 0
    slice_index: int = 0
    compute_capability: str = "9.0"
    client: None = None


def stand_ins(topology: Topology) -> list[StandIn]:
    """As many as the topology has devices, at the same places: for arithmetic on meshes where no compiler is installed."""
    if topology.platform == "cuda":
        return [StandIn(i, "gpu", topology.chip.name, (*divmod(i, topology.shape[1]), 0)) for i in range(topology.size)]
    grid = (range(n) for n in reversed((*topology.shape, 1)[:3]))
    places = itertools.product(*grid, range(topology.chip.devices))
    return [StandIn(i, "tpu", topology.chip.name, (x, y, z), core) for i, (z, y, x, core) in enumerate(places)]


# memory bytes per second, bytes, memory clock in kHz
GPUS = {
    "h100": (3_352_320_000_000, 84_942_979_072, 2_619_000),
    "h200": (4_800_000_000_000, 151_397_597_184, 3_750_000),
}
HOPPER = """
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 9.0a"
  device_address_bits: 64 pcie_bandwidth: 34359738368 ecc_enabled: true
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0" cub_version: "3.1.2" device_interconnect_info { active_links: 18 }
"""


def gpu_description(gpu: str) -> str:
    """XLA's GpuTargetConfigProto of one GPU, in text form. The matrix units' rates, which only XLA's own cost model of
    GPU matrix products would read, are left out."""
    name, (bandwidth, memory, memory_clock) = CHIPS[gpu].name, GPUS[gpu]
    model = f"sm_9.0a with {memory}B RAM, 132 cores, 1980000KHz clock, {memory_clock}KHz mem clock, 52428800B L2$"
    return (
        f"gpu_device_info {{ {HOPPER}"
        f'  name: "{name}" model_str: "{model}" memory_bandwidth: {bandwidth} device_memory_size: {memory}\n}}\n'
        f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{name}"\n'
    )
