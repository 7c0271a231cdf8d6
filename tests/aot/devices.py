"""Devices that are not there: descriptions from which the real TPU and GPU compilers work on a machine with neither.

A TPU is described by the name of its topology, which libtpu knows. A GPU is described by XLA's GpuTargetConfigProto in
text form, written here from the data sheets of the H100 SXM and the H200 and from the CUDA limits of compute capability
9.0. The process must run with JAX_PLATFORMS=cpu and, for TPU, TPU_SKIP_MDS_QUERY=1 (see run.py).
"""

from __future__ import annotations

import dataclasses

import jax
from jax.experimental import topologies

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Target:
    """`topology` is libtpu's name of a slice, or for a GPU "hosts x 1 x GPUs per host"; `hbm` bytes per JAX device."""

    platform: str
    topology: str
    hbm: int
    gpu: str = ""


TARGETS = {
    "v5e": Target("tpu", "v5e:2x4", 16 * GIB),
    "v6e": Target("tpu", "v6e:2x4", 32 * GIB),
    "v5p": Target("tpu", "v5p:2x2x2", 95 * GIB),
    "v5p-4": Target("tpu", "v5p:2x2x1", 95 * GIB),
    "tpu7x": Target("tpu", "tpu7x:2x2x1", 96 * GIB),
    "v5p-64": Target("tpu", "v5p:4x4x4", 95 * GIB),
    "h100": Target("cuda", "1x1x8", 80 * 10**9, "h100"),
    "h200": Target("cuda", "1x1x8", 141 * 10**9, "h200"),
    "h100-2": Target("cuda", "2x1x8", 80 * 10**9, "h100"),
}

# name, memory bytes per second, bytes, memory clock in kHz
GPUS = {
    "h100": ("NVIDIA H100 80GB HBM3", 3_352_320_000_000, 84_942_979_072, 2_619_000),
    "h200": ("NVIDIA H200 141GB HBM3e", 4_800_000_000_000, 151_397_597_184, 3_750_000),
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
    name, bandwidth, memory, memory_clock = GPUS[gpu]
    model = f"sm_9.0a with {memory}B RAM, 132 cores, 1980000KHz clock, {memory_clock}KHz mem clock, 52428800B L2$"
    return (
        f"gpu_device_info {{ {HOPPER}"
        f'  name: "{name}" model_str: "{model}" memory_bandwidth: {bandwidth} device_memory_size: {memory}\n}}\n'
        f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{name}"\n'
    )


def target_devices(target: str) -> list[jax.Device]:
    """The devices of one of TARGETS, good for a Mesh and for lowering and compiling, not for running."""
    entry = TARGETS[target]
    if entry.platform == "tpu":
        return list(topologies.get_topology_desc(platform="tpu", topology_name=entry.topology).devices)
    description = topologies.get_topology_desc(
        platform="cuda", topology_name=entry.topology, topology=entry.topology, target_config=gpu_description(entry.gpu)
    )
    return list(description.devices)
