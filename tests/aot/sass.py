"""What the GPU's assemblers made of the Mosaic GPU kernels of a process: registers, spills and instructions, from its dumps."""

from __future__ import annotations

import collections
import dataclasses
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen35_jax.planner.topologies import wheel_tool

_REGISTERS = re.compile(r"Used (\d+) registers")
_PTX_VERSION = re.compile(r"^\.version \d+\.\d+", re.MULTILINE)
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]*)")


@dataclasses.dataclass(frozen=True)
class Assembly:
    """One kernel: registers a thread, bytes spilled (stores and loads), how often each instruction stands in the code.

    Registers and spills are the most that any assembler reports: the one that XLA takes, which depends on the machine (nvJitLink
    or a ptxas), the ptxas on PATH if there is one, and that of the wheel nvidia-cuda-nvcc. Instructions are named without their
    suffixes: QGMMA multiplies FP8 and HGMMA bfloat16 on the tensor cores; MULTICAST are the copies to several blocks. Counts are
    of the code as it lies, a loop's body once. warnings: of the assemblers, such as that products wait for each other.
    """

    registers: int
    spilled: int
    instructions: dict[str, int]
    warnings: tuple[str, ...]


def dump_settings(folder: str | Path) -> dict[str, str]:
    """The environment in which a process writes its kernels' assembly into `folder`; read when JAX is imported."""
    return {
        "MOSAIC_GPU_DUMP_PTX": "1",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_DUMP_SASS": "1",
        "MOSAIC_GPU_DUMP_TO": str(folder),
        "CUDA_ROOT": str(wheel_tool("nvdisasm").parents[1]),
    }


def needs_disassembler() -> None:
    """Skips a test where NVIDIA's disassembler or its wheel's assembler is not installed."""
    if not wheel_tool("ptxas") or not wheel_tool("nvdisasm"):
        pytest.skip("nvidia-cuda-nvcc or nvidia-cuda-nvdisasm is not installed: pip install -e '.[test,aot]'")


def read_assembly(folder: str | Path) -> dict[str, list[Assembly]]:
    """By kernel name, in the order in which they were compiled."""
    found = collections.defaultdict(list)
    for path in sorted(Path(folder).glob("*.ptxas"), key=_number):
        name = path.stem.rpartition("_")[0]
        reports = [path.read_text(), *_assemble(path.with_suffix(".ptx"))]
        code = next(path.parent.glob(f"{path.stem}.sass*")).read_text()
        registers = max(int(_REGISTERS.search(report)[1]) for report in reports)
        spilled = max(sum(sum(map(int, match)) for match in _SPILLS.findall(report)) for report in reports)
        instructions = collections.Counter(_INSTRUCTION.findall(code))
        instructions["MULTICAST"] = code.count(".MULTICAST")
        warnings = tuple(line for report in reports for line in report.splitlines() if "Performance Loss" in line)
        found[name].append(Assembly(registers, spilled, dict(instructions), warnings))
    return dict(found)


def _assemble(path: Path) -> Iterator[str]:
    """What each ptxas says of a kernel. That on PATH may be older than the PTX, which says so: it needs no more than PTX 8.6."""
    source = _PTX_VERSION.sub(".version 8.6", path.read_text(), count=1)
    for assembler in filter(None, (wheel_tool("ptxas"), shutil.which("ptxas"))):
        command = [assembler, "-arch=sm_90a", "-v", "-", "-o", path.with_suffix(".cubin")]
        done = subprocess.run(command, input=source, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{assembler}: {done.stderr}"
        yield done.stderr


def _number(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])
