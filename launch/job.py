"""What runs on every host: one of the commands, its flags, and how the hosts find one another.

    python -m launch.job SLICE sample|convert|train FLAG...

prints, for the scripts of this folder and a line each: hosts, chips of a host, TPU VM type, its runtime, the command.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
import sys

from launch.machines import Slice, parse_slice
from launch.training import training_config
from launch.words import flag
from qwen35_jax import command
from qwen35_jax.errors import UserError
from qwen35_jax.sharding import parse_mesh

JOBS = ("sample", "convert", "train")
OURS = ("coordinator", "hosts", "host")  # flags that the launchers give


@dataclasses.dataclass(frozen=True)
class Job:
    """A command line that fits its slice. `slice` is None for one host as it is: conversions, and what runs on this machine."""

    name: str
    arguments: tuple[str, ...]
    slice: Slice | None

    @property
    def hosts(self) -> int:
        return self.slice.hosts if self.slice else 1

    def command(self, *more: str, python: str = "python") -> list[str]:
        """The words of the command; `more` flags come last, and are for several hosts only."""
        return [python, "-m", f"qwen35_jax.{self.name}", *self.arguments, *(more if self.hosts > 1 else ())]

    def need_bucket(self, where: str) -> None:
        """UserError for a training run whose checkpoints would be lost with the machine that wrote them."""
        workdir = flag(self.arguments, "workdir")
        if self.name == "train" and not workdir.startswith("gs://"):
            raise UserError(
                f"--workdir {workdir or '(missing)'}: what {where} writes to its disk is lost: give a gs:// directory"
            )


def make_job(slice_text: str | None, words: list[str]) -> Job:
    """UserError for an unknown slice or job, for a training run that would refuse its configuration, and where the mesh does not
    multiply to the devices of the slice (None: any). It asks for no device and reads no checkpoint."""
    where = parse_slice(slice_text) if slice_text is not None else None
    if not words or words[0] not in JOBS:
        raise UserError(f"job {words[0] if words else '(missing)'}: give {', '.join(JOBS)}, and its flags behind it")
    name, arguments = words[0], tuple(words[1:])
    given = [f for f in OURS if flag(arguments, f)]
    if given:
        raise UserError(f"--{given[0]} is what the launcher gives: leave it out")
    mesh = training_config(arguments).mesh if name == "train" else flag(arguments, "mesh") or "1x1"
    if name == "convert" or where is None:
        return Job(name, arguments, None)
    devices = math.prod(parse_mesh(mesh))
    if devices != where.devices:
        text = f"{where.accelerator}:{where.topology} has {where.devices}"
        raise UserError(f"mesh {mesh} has {devices} devices, but {text}, on {where.hosts} hosts: give a mesh of all of them")
    return Job(name, arguments, where)


def main() -> None:
    """The lines that the scripts read."""
    if len(sys.argv) < 2:
        raise UserError("give SLICE JOB FLAG...")
    job, where = make_job(sys.argv[1], sys.argv[2:]), parse_slice(sys.argv[1])
    if where.is_tpu:
        job.need_bucket("a TPU VM")
    tpu_vm = (where.tpu_vm, where.kind.runtime) if where.kind.tpu_vm else ("", "")
    print(where.hosts, where.chips, *tpu_vm, shlex.join(job.command("--coordinator", "auto")), sep="\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        command.complain(str(error))
        raise SystemExit(1) from None
