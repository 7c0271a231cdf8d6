"""What a slice or a set of GPU nodes is made of: hosts, chips, JAX devices, and what Google's services call them.

Sources: the pages "TPU configurations" of Cloud TPU and "Plan TPUs in GKE" and "About GPUs in GKE" of GKE.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

from qwen35_jax.errors import UserError

FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # of chips: v5e and v6e
SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")  # cubes that are not whole: v5p and tpu7x
CUBE = 4  # larger slices are made of cubes of 4 x 4 x 4 chips


# What every launcher sets for JAX. Chips that are not there are an error, and not virtual CPU devices; and JAX would take three
# quarters of a GPU's memory.
TPU_ENVIRONMENT = {"JAX_PLATFORMS": "tpu,cpu"}
GPU_ENVIRONMENT = {"JAX_PLATFORMS": "cuda,cpu", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
# In containers of Google's the GPUs' driver is mounted where the loader does not look. On Slurm's nodes it would hide the user's.
GPU_CONTAINER = {"LD_LIBRARY_PATH": "/usr/local/nvidia/lib64"}


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """A kind of accelerator.

    Attributes:
        gke: its name in the node label of GKE.
        machine: of Compute Engine; `{chips}` is the number of chips of a host.
        devices: JAX devices a chip.
        cubes: the largest slice in cubes of 64 chips; 0 for slices that lie in a plane, None for GPUs.
        tpu_vm: prefix of its names as a TPU VM, followed by `tpu_vm_units` a chip; empty where there are none.
        runtime: software version of its TPU VMs.
        vertex: what Vertex AI calls it; empty where it has none.
    """

    gke: str
    machine: str
    devices: int = 1
    cubes: int | None = None
    tpu_vm: str = ""
    tpu_vm_units: int = 1
    runtime: str = ""
    vertex: str = ""


ACCELERATORS = {
    "v5e": Accelerator("tpu-v5-lite-podslice", "ct5lp-hightpu-{chips}t", 1, 0, "v5litepod-", 1, "v2-alpha-tpuv5-lite"),
    "v5p": Accelerator("tpu-v5p-slice", "ct5p-hightpu-{chips}t", 1, 96, "v5p-", 2, "v2-alpha-tpuv5"),
    "v6e": Accelerator("tpu-v6e-slice", "ct6e-standard-{chips}t", 1, 0, "v6e-", 1, "v2-alpha-tpuv6e"),
    "tpu7x": Accelerator("tpu7x", "tpu7x-standard-{chips}t", 2, 144),
    "h100": Accelerator("nvidia-h100-80gb", "a3-highgpu-{chips}g", vertex="NVIDIA_H100_80GB"),
    "h100-mega": Accelerator("nvidia-h100-mega-80gb", "a3-megagpu-{chips}g", vertex="NVIDIA_H100_MEGA_80GB"),
    "h200": Accelerator("nvidia-h200-141gb", "a3-ultragpu-{chips}g", vertex="NVIDIA_H200_141GB"),
}
GPUS = 8  # of a node: of these machines the whole one


@dataclasses.dataclass(frozen=True)
class Slice:
    """What one job runs on. `topology` is that of the chips; for GPUs nodes x GPUs of a node."""

    accelerator: str
    topology: str
    hosts: int
    chips: int  # of a host

    @property
    def kind(self) -> Accelerator:
        return ACCELERATORS[self.accelerator]

    @property
    def is_tpu(self) -> bool:
        return self.kind.cubes is not None

    @property
    def devices(self) -> int:
        """Devices that JAX sees on all hosts."""
        return self.hosts * self.chips * self.kind.devices

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the job's processes."""
        return TPU_ENVIRONMENT if self.is_tpu else GPU_ENVIRONMENT

    @property
    def container_environment(self) -> dict[str, str]:
        """The same where they run in a container of Google's."""
        return self.environment | ({} if self.is_tpu else GPU_CONTAINER)

    @property
    def machine(self) -> str:
        return self.kind.machine.format(chips=self.chips)

    @property
    def tpu_vm(self) -> str:
        """The flags by which gcloud makes it of TPU VMs. UserError where there are none.

        An accelerator type is a number of chips, to which Cloud TPU gives the most compact shape; another one is asked for.
        """
        if not self.kind.tpu_vm:
            names = ", ".join(name for name, a in ACCELERATORS.items() if a.tpu_vm)
            raise UserError(
                f"{self.accelerator}: there are no TPU VMs of it (but of {names}); see launch/gke and launch/slurm.sh"
            )
        chips = self.hosts * self.chips
        if self.kind.cubes and self.topology != compact(chips):
            return f"--type {self.accelerator} --topology {self.topology}"
        return f"--accelerator-type {self.kind.tpu_vm}{chips * self.kind.tpu_vm_units}"


def compact(chips: int) -> str:
    """Of the topologies AxBxC of so many chips of a v5p the one with the smallest sides."""
    sides = [n for n in range(1, chips + 1) if chips % n == 0]
    found = [(a, b, chips // a // b) for a in sides for b in sides if chips % (a * b) == 0]
    texts = {"x".join(str(n) for n in shape): shape for shape in found}
    able = {text: shape for text, shape in texts.items() if text in SMALL or _whole(shape)}
    return min(able, key=lambda text: sum(able[text]))


def parse_slice(text: str) -> Slice:
    """'v5p:4x4x4' (chips), 'h100:2x8' (nodes x GPUs) or 'h100:8' (one node). UserError for what cannot be had."""
    name, _, topology = text.partition(":")
    if name not in ACCELERATORS:
        raise UserError(f"slice {text!r}: accelerators are {', '.join(ACCELERATORS)}; write v5p:4x4x4, v6e:4x4 or h100:2x8")
    cubes = ACCELERATORS[name].cubes
    if cubes is None:
        match = re.fullmatch(rf"(?:([1-9]\d{{0,3}})x)?{GPUS}", topology)
        if not match:
            raise UserError(
                f"slice {text!r}: write NODESx{GPUS}, such as {name}:2x{GPUS}: a node is taken whole, with {GPUS} GPUs"
            )
        hosts = int(match[1] or 1)
        return Slice(name, f"{hosts}x{GPUS}", hosts, GPUS)
    _check_topology(text, name, topology, cubes)
    chips = math.prod(int(n) for n in topology.split("x"))
    host = 8 if topology == "2x4" else min(4, chips)
    return Slice(name, topology, chips // host, host)


def _check_topology(text: str, name: str, topology: str, cubes: int) -> None:
    if not cubes:
        if topology not in FLAT:
            raise UserError(f"slice {text!r}: topologies of {name} are {', '.join(FLAT)}")
        return
    sides = [int(n) for n in topology.split("x")] if re.fullmatch(r"\d{1,3}x\d{1,3}x\d{1,3}", topology) else []
    if topology not in SMALL and not (_whole(sides) and math.prod(sides) <= cubes * CUBE**3):
        larger = f"AxBxC of multiples of {CUBE}, A <= B <= C, of at most {cubes * CUBE**3} chips"
        raise UserError(f"slice {text!r}: topologies of {name} are {', '.join(SMALL)} and {larger}")


def _whole(sides: Sequence[int]) -> bool:
    """Whether a slice with these sides is made of whole cubes, and its sides are in order."""
    return bool(sides) and 0 not in sides and list(sides) == sorted(sides) and not any(n % CUBE for n in sides)
