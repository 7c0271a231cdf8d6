"""How fast the devices of a mesh axis can talk: from where they stand, and the rates of one link."""

from __future__ import annotations

import itertools
import math

import numpy as np
from jax.sharding import Mesh

from qwen35_jax.planner.topologies import Topology
from qwen35_jax.sharding import MESH_AXES

# Between the two halves of a chip, per link to a neighbour: https://docs.cloud.google.com/tpu/docs/tpu7x
DIE_TO_DIE = 6
# Of a collective on an array of V bytes over n devices, each takes in `factor` x V (n - 1) / n.
FACTORS = {"all-reduce": 2.0, "collective-permute": 1.0}


def wraps(topology: Topology, direction: int) -> bool:
    """Whether the chips of a direction form a ring. 3D: slices of whole 4x4x4 cubes; 2D: the 16 chips of a pod's side."""
    if topology.chip.dimensions == 3:
        return all(n % 4 == 0 for n in topology.shape)
    return topology.shape[direction] == 16


def bandwidth(mesh: Mesh, topology: Topology, axes: tuple[str, ...]) -> float:
    """Bytes a second that every device of a group, the devices along `axes`, can take in from the group at once.

    TPU: one link in each direction of the torus along which the group extends, two where the direction is a ring. GPU:
    NVLink inside a node; for groups over several nodes the network, which the node's members share evenly.
    """
    chip = topology.chip
    index = tuple(slice(None) if a in axes else 0 for a in MESH_AXES)
    group = list(np.asarray(mesh.devices[index], dtype=object).flat)
    if topology.platform == "cuda":
        nodes = len({d.id // topology.shape[1] for d in group})
        if nodes == 1:
            return chip.link
        n = len(group)
        # Of what a device takes in, the part from other nodes comes through the network once for all its node's members.
        return min(chip.link, (n - 1) / n / ((nodes - 1) / nodes) * chip.network * n / nodes)
    links = 0
    for direction, size in enumerate(topology.shape):
        extent = len({tuple(d.coords)[direction] for d in group})
        if extent > 1:
            links += 2 if extent == size and extent > 2 and wraps(topology, direction) else 1
    if not links:
        return DIE_TO_DIE * chip.link * chip.devices
    return links * chip.link


def taken_in(kind: str, size: float, group: int) -> float:
    """Bytes that a device takes in for a collective of `size` bytes (as `hlo.Collective` counts them) over `group` devices."""
    if kind == "collective-permute" or group == 0:
        return size
    return FACTORS.get(kind, 1.0) * size * (group - 1) / group


def axes_of(mesh: Mesh, topology: Topology, group: int) -> tuple[str, ...]:
    """Mesh axes whose devices may be the `group` that HLO names by its size alone: where several fit, the slowest."""
    used = [a for a in MESH_AXES if mesh.shape[a] > 1]
    choices = [c for n in range(1, len(used) + 1) for c in itertools.combinations(used, n)]
    fitting = [c for c in choices if math.prod(mesh.shape[a] for a in c) == group] or [tuple(used)]
    return min(fitting, key=lambda c: bandwidth(mesh, topology, c))
