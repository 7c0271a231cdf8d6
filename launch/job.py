"""What runs on every host: one of the commands, its flags, and how the hosts find one another.

    python -m launch.job SLICE sample|convert|train FLAG...

prints, for the scripts of this folder and a line each: hosts, chips of a host, gcloud's flags for TPU VMs, their runtime,
NAME=VALUE of the environment, the command.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
import sys

from launch.machines import Slice, parse_slice
from launch.training import training_config
from launch.words import flag, positional
from qwen35_jax import command
from qwen35_jax.errors import UserError
from qwen35_jax.sharding import parse_mesh

JOBS = ("sample", "convert", "train")
OURS = ("coordinator", "hosts", "host")  # flags that the launchers give
OUTPUTS = ("workdir", "export_hf")  # flags of train: directories of what it makes


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

    @property
    def outputs(self) -> dict[str, str]:
        """{flag or argument: the directory that is written there}. A training run without --workdir has an empty one."""
        if self.name == "convert":
            return {"DST": positional(self.arguments)[1]}
        given = {name: flag(self.arguments, name) for name in OUTPUTS if self.name == "train"}
        return {f"--{name}": value for name, value in given.items() if value or name == "workdir"}

    def need_bucket(self, where: str) -> None:
        """UserError for what would be lost with the machine that wrote it."""
        for name, value in self.outputs.items():
            if not value.startswith("gs://"):
                text = f"{name} {value or '(missing)'}: what {where} writes to its disk is lost"
                raise UserError(f"{text}: give a gs:// directory")


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
    if name == "convert" and len(positional(arguments)) != 2:
        raise UserError(f"convert takes SRC and DST, got {len(positional(arguments))} arguments")
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
    variables = " ".join(f"{name}={value}" for name, value in job.slice.environment.items()) if job.slice else ""
    print(where.hosts, where.chips, *tpu_vm, variables, shlex.join(job.command("--coordinator", "auto")), sep="\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        command.complain(str(error))
        raise SystemExit(1) from None
