"""What the GPU's assembler made of the Mosaic GPU kernels of a process: registers, spills and instructions, from its dumps."""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import re
from pathlib import Path

_REGISTERS = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]*)")


@dataclasses.dataclass(frozen=True)
class Assembly:
    """One kernel: registers a thread, bytes spilled (stores and loads), how often each instruction stands in the code.

    Instructions are named without their suffixes: QGMMA multiplies FP8 and HGMMA bfloat16 on the tensor cores; MULTICAST are
    the copies to several blocks. Counts are
    of the code as it lies, a loop's body once. warnings: of the assembler, such as that products wait for each other.
    """

    registers: int
    spilled: int
    instructions: dict[str, int]
    warnings: tuple[str, ...]


def dump_settings(folder: str | Path) -> dict[str, str]:
    """The environment in which a process writes its kernels' assembly into `folder`; read when JAX is imported."""
    return {
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_DUMP_SASS": "1",
        "MOSAIC_GPU_DUMP_TO": str(folder),
        "CUDA_ROOT": str(_disassembler().parents[1]),
    }


def has_disassembler() -> bool:
    return _disassembler() is not None


def _disassembler() -> Path | None:
    """nvdisasm of the wheel nvidia-cuda-nvdisasm, which is no module: it lies in a namespace of NVIDIA's wheels."""
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec else ()
    return next((path for root in roots for path in Path(root).glob("cu*/bin/nvdisasm")), None)


def read_assembly(folder: str | Path) -> dict[str, list[Assembly]]:
    """By kernel name, in the order in which they were compiled."""
    found = collections.defaultdict(list)
    for path in sorted(Path(folder).glob("*.ptxas"), key=_number):
        name = path.stem.rpartition("_")[0]
        report, code = path.read_text(), next(path.parent.glob(f"{path.stem}.sass*")).read_text()
        spilled = sum(sum(map(int, match)) for match in _SPILLS.findall(report))
        instructions = collections.Counter(_INSTRUCTION.findall(code))
        instructions["MULTICAST"] = code.count(".MULTICAST")
        warnings = tuple(line for line in report.splitlines() if "Performance Loss" in line)
        found[name].append(Assembly(int(_REGISTERS.search(report)[1]), spilled, dict(instructions), warnings))
    return dict(found)


def _number(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])
