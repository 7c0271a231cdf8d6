"""The topologies that these tests compile for, by short names."""

from __future__ import annotations

import jax
import pytest

from qwen35_jax.planner.topologies import missing_compiler, parse_topology, topology_devices

TARGETS = {
    name: parse_topology(text)
    for name, text in {
        "v5e": "v5e:2x4",
        "v6e": "v6e:2x4",
        "v5p": "v5p:2x2x2",
        "v5p-4": "v5p:2x2x1",
        "tpu7x": "tpu7x:2x2x1",
        "v5p-64": "v5p:4x4x4",
        "h100": "h100:8",
        "h200": "h200:8",
        "h100-2": "h100:2x8",
    }.items()
}


def needs_compiler(target: str) -> None:
    """Skips a test where what compiles for a target is not installed."""
    if missing := missing_compiler(TARGETS[target].platform):
        pytest.skip(f"{missing} is not installed: pip install -e '.[test,aot]'")


def target_devices(target: str) -> list[jax.Device]:
    """The devices of one of TARGETS."""
    return topology_devices(TARGETS[target])
