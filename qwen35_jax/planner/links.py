"""How fast the devices of a mesh axis can talk: from where they stand, and the rates of one link."""

from __future__ import annotations

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
    chip, group = topology.chip, _group(mesh, axes)
    if topology.platform == "cuda":
        nodes = _nodes(mesh, topology, axes)
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


def step_bandwidth(mesh: Mesh, topology: Topology, axes: tuple[str, ...]) -> float:
    """Bytes a second that a device can take in from one other of its group, as permutes bring them: over one link, or on GPUs,
    where the group is of several nodes, over one network card, since all wait for those whose neighbour is elsewhere."""
    if topology.platform == "cuda":
        return topology.chip.network if _nodes(mesh, topology, axes) > 1 else topology.chip.link
    one_chip = len({tuple(d.coords) for d in _group(mesh, axes)}) == 1
    return bandwidth(mesh, topology, axes) if one_chip else topology.chip.link


def taken_in(kind: str, size: float, group: int) -> float:
    """Bytes that a device takes in for a collective of `size` bytes (as `hlo.Collective` counts them) over `group` devices."""
    if kind == "collective-permute" or group == 0:
        return size
    return FACTORS.get(kind, 1.0) * size * (group - 1) / group


def axes_of(mesh: Mesh, pairs: tuple[tuple[int, int], ...]) -> tuple[str, ...]:
    """Mesh axes along which these pairs of devices (places in the flat mesh) talk; all where HLO names none."""
    if not pairs:
        return tuple(a for a in mesh.axis_names if mesh.shape[a] > 1)
    one, other = (np.unravel_index(numbers, mesh.devices.shape) for numbers in np.transpose(pairs))
    return tuple(a for a, i, j in zip(mesh.axis_names, one, other, strict=True) if np.any(i != j))


def _group(mesh: Mesh, axes: tuple[str, ...]) -> list:
    """The devices along `axes` of the first one."""
    index = tuple(slice(None) if a in axes else 0 for a in MESH_AXES)
    return list(np.asarray(mesh.devices[index], dtype=object).flat)


def _nodes(mesh: Mesh, topology: Topology, axes: tuple[str, ...]) -> int:
    """Of GPUs: on how many nodes such a group is."""
    return len({d.id // topology.shape[1] for d in _group(mesh, axes)})
