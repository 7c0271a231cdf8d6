"""Instruction bundles of Pallas TPU kernels: what the TPU compiler writes down of its schedules while it compiles."""

from __future__ import annotations

import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from tests.aot.devices import target_devices
from tests.aot.run import SETTINGS

DUMP = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true"
_TOTAL = re.compile(r"total scheduled bundles:\s+(\d+)")


def one_device(target: str):
    """A mesh of one device of a generation, and a function (*shape, dtype=float32) of abstract arrays on it."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=target_devices(target)[:1])

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, jax.P()))

    return mesh, array


def compile_on(mesh, function, arguments):
    """`function`, which sees one shard, compiled."""
    local = jax.shard_map(function, mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)
    return jax.jit(local).lower(*arguments).compile()


def bundles_of(dump: Path, kernel: str) -> int | None:
    """Bundles of the kernel of this name, the last of them by file name, which begins with the time; None where the compiler
    wrote none."""
    found = sorted(dump.glob(f"*-{kernel}[._]*schedule-analysis_final_bundles.txt"))
    return int(_TOTAL.search(found[-1].read_text()).group(1)) if found else None


def estimated_cycles(text: str) -> int:
    """Cycles of optimised HLO for TPU as the compiler estimates them, without kernels; a loop's body as often as it runs."""
    trips = {m[1]: int(m[2]) for m in re.finditer(r'body=%?([\w.\-]+).*known_trip_count":\{"n":"(\d+)"', text)}
    total, times = 0, 1
    for line in text.splitlines():
        if line.endswith("{") and (name := re.match(r"(?:ENTRY )?%?([\w.\-]+) ", line)):
            times = trips.get(name[1], 1)
        if found := re.search(r'estimated_cycles":"(\d+)"', line):
            total += times * int(found[1])
    return total


def cycles_where_products_are(text: str) -> int:
    """Cycles of optimised HLO for TPU as the compiler estimates them, of the computation whose fusions hold the most products:
    the body of an innermost loop, run once."""
    cycles, called, products, name = collections.Counter(), collections.defaultdict(list), collections.Counter(), ""
    for line in text.splitlines():
        if line.endswith("{") and (found := re.match(r"(?:ENTRY )?%?([\w.\-]+) ", line)):
            name = found[1]
        products[name] += bool(re.search(r" (convolution|dot)\(", line))
        called[name] += re.findall(r"calls=%?([\w.\-]+)", line)
        cycles[name] += sum(map(int, re.findall(r'estimated_cycles":"(\d+)"', line)))
    return cycles[max(called, key=lambda name: sum(products[callee] for callee in called[name]))]


def compile_elsewhere(module: str, *arguments: str, kernels: tuple[str, ...]) -> tuple[object, dict[str, int]]:
    """`python -m module arguments` in a process of its own: the JSON that it prints last, and the bundles of each kernel."""
    with tempfile.TemporaryDirectory() as dump:
        settings = SETTINGS | {"LIBTPU_INIT_ARGS": f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {DUMP.format(dump)}"}
        command = [sys.executable, "-m", module, *arguments]
        root = Path(__file__).parents[2]
        done = subprocess.run(command, cwd=root, env=os.environ | settings, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{' '.join(arguments)} did not compile:\n{done.stderr[-4000:]}"
        found = {kernel: bundles_of(Path(dump), kernel) for kernel in kernels}
        return json.loads(done.stdout.splitlines()[-1]), {kernel: n for kernel, n in found.items() if n is not None}
