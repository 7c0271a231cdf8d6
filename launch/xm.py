"""Command line: a job, or a sweep of jobs, with XManager. `python -m launch.xm --help`."""

from __future__ import annotations

import asyncio
import itertools
import json
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

try:
    from google.cloud import aiplatform
    from google.cloud.aiplatform_v1.types import custom_job
    from xmanager import xm, xm_local
    from xmanager.cloud import vertex
    from xmanager.xm import utils as xm_utils
except ImportError as error:
    raise SystemExit(f"error: launch.xm needs XManager ({error}): pip install -e '.[launch]' -c launch/constraints.txt") from None

from launch.job import Job, make_job
from launch.machines import Slice, parse_slice
from launch.words import flag
from qwen35_jax import command
from qwen35_jax.errors import UserError

USAGE = """
Starts a job, or one for every combination of the values of a sweep, on this machine or on Vertex AI.

  python -m launch.xm -- sample --prompt "What is 37 + 58?"
  python -m launch.xm --sweep config.optimizer.learning_rate=1e-4,3e-4 --sweep config.seed=0,1 -- \\
    train --config configs/finetune_tiny.py --workdir runs/sweep --config.data.train="('mine.jsonl',)"
  python -m launch.xm --executor vertex --slice h100:8 --image IMAGE --project P --bucket B -- \\
    train --config configs/finetune.py --config.model.source=Qwen/Qwen3.5-0.8B --config.mesh=8x1 \\
    --config.data.train="('gs://B/mine.jsonl',)" --workdir gs://B/run

A sweep adds each value as a flag of the job; a training run's --workdir (and --export_hf) get a folder for each combination.
Here the job is `python -m qwen35_jax.…` with the Python that runs this; on Vertex AI, IMAGE is made of launch/Dockerfile.
"""

EXECUTOR = flags.DEFINE_enum("executor", "local", ["local", "vertex"], "where: this machine, or one machine of Vertex AI")
SLICE = flags.DEFINE_string("slice", None, "Vertex AI: the GPUs of one machine, such as h100:8")
IMAGE = flags.DEFINE_string("image", None, "Vertex AI: container image with the package in it")
PROJECT = flags.DEFINE_string("project", None, "Vertex AI: of Google Cloud")
LOCATION = flags.DEFINE_string("location", "us-central1", "Vertex AI: region")
BUCKET = flags.DEFINE_string("bucket", None, "Vertex AI: its staging bucket, without gs://")
SERVICE_ACCOUNT = flags.DEFINE_string("service_account", None, "Vertex AI: that may read and write the buckets")
RESTART = flags.DEFINE_bool(
    "restart", False, "Vertex AI: start again when the machine is lost; a run goes on from its checkpoint"
)
SPOT = flags.DEFINE_bool("spot", False, "Vertex AI: a spot machine, which can be taken away")
SWEEP = flags.DEFINE_multi_string("sweep", [], "FLAG=VALUE,VALUE,…: a job for every value; repeat it for every combination")
TITLE = flags.DEFINE_string("title", "qwen35_jax", "of the experiment")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "print what would be started, and start nothing")

VERTEX_FLAGS = (SLICE, IMAGE, PROJECT, BUCKET)
VERTEX_OPTIONS = (LOCATION, SERVICE_ACCOUNT, RESTART, SPOT)
CONVERSION_MACHINE = "n2-standard-8"  # a conversion needs no accelerator


class VertexClient(vertex.Client):
    """XManager's client, but for what it cannot ask for: machines of H100 and H200 GPUs, spot machines, restarts."""

    def launch(self, name: str, jobs: Sequence[xm.Job]) -> str:
        """Sends the job of one work unit, and returns its resource name."""
        (job,) = jobs
        words = xm.merge_args(job.executable.args, job.args).to_list(xm_utils.ARGV_ESCAPER)
        made, submitted = request(words, None if job.name == "convert" else _where())
        custom = aiplatform.CustomJob(display_name=name, **made)
        custom.submit(**submitted)
        return custom.resource_name


def request(words: list[str], where: Slice | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a job on Vertex AI is made and submitted with; where: as of `worker_pools`."""
    made = {"project": PROJECT.value, "location": LOCATION.value, "staging_bucket": f"gs://{BUCKET.value}"}
    submitted = {"service_account": SERVICE_ACCOUNT.value, "restart_job_on_worker_restart": RESTART.value}
    strategy = {"scheduling_strategy": custom_job.Scheduling.Strategy.SPOT} if SPOT.value else {}
    return made | {"worker_pool_specs": worker_pools(words, where)}, submitted | strategy


def worker_pools(words: list[str], where: Slice | None) -> list[dict[str, Any]]:
    """One machine that runs the words in the image, as Vertex AI is asked for it; None: one without accelerators."""
    machine = {"machine_type": CONVERSION_MACHINE}
    if where is not None:
        kind = {"accelerator_type": where.kind.vertex, "accelerator_count": where.chips}
        machine = {"machine_type": where.machine} | kind
    container = {"image_uri": IMAGE.value, "command": words}
    if where is not None:
        container["env"] = [{"name": name, "value": value} for name, value in where.container_environment.items()]
    return [{"machine_spec": machine, "replica_count": 1, "container_spec": container}]


def main(arguments: list[str]) -> None:
    """Flags to an experiment of one job for each combination of the sweep."""
    remote = EXECUTOR.value == "vertex"
    for flag_ in VERTEX_FLAGS:
        if remote != bool(flag_.value):
            text = "is missing: see --help" if remote else "belongs to --executor vertex"
            raise UserError(f"--{flag_.name} {text}")
    for flag_ in VERTEX_OPTIONS:
        if not remote and flags.FLAGS[flag_.name].present:
            raise UserError(f"--{flag_.name} belongs to --executor vertex")
    jobs = [make_job(SLICE.value, words) for words in combinations(arguments, SWEEP.value)]
    if remote:
        _where()
        for job in jobs:
            job.need_bucket("a machine of Vertex AI")
    if DRY_RUN.value:
        for job in jobs:
            print(_asked(job) if remote else shlex.join(_local(job)))
        return
    try:
        asyncio.run(_start(jobs, remote))
    except (xm.ExperimentUnitError, RuntimeError) as error:
        raise UserError(f"a job of the experiment failed: {error}") from error


async def _start(jobs: list[Job], remote: bool) -> None:
    """Here one job after the other: each takes all devices."""
    if remote:
        vertex.set_default_client(VertexClient(PROJECT.value, LOCATION.value))
    executor = xm_local.Vertex() if remote else xm_local.Local()
    async with xm_local.create_experiment(TITLE.value) as experiment:
        for job in jobs:
            words = job.command() if remote else _local(job)[1:]
            spec = (
                xm.container(executor.Spec(), IMAGE.value, args=words)
                if remote
                else xm.binary(path=sys.executable, executor_spec=executor.Spec(), args=words)
            )
            (executable,) = experiment.package([spec])
            unit = await experiment.add(xm.Job(executable, executor, name=job.name))
            if not remote:
                await unit.wait_until_complete()


def _asked(job: Job) -> str:
    """The request as JSON, but for the name that XManager gives it."""
    made, submitted = request(job.command(), job.slice)
    return json.dumps(made | {name: getattr(value, "name", value) for name, value in submitted.items()}, indent=1)


def _local(job: Job) -> list[str]:
    return job.command(python=sys.executable)


def _where() -> Slice | None:
    """The machine on Vertex AI. UserError where it has none such."""
    where = parse_slice(SLICE.value)
    if not where.kind.vertex or where.hosts != 1:
        raise UserError(f"--slice {SLICE.value}: on Vertex AI give one machine of GPUs, such as h100:8; for more see launch/gke")
    return where


def combinations(words: list[str], sweep: list[str]) -> list[list[str]]:
    """The words of each job: with a flag for every value, and for training a --workdir (--export_hf) of its own."""
    choices = []
    for text in sweep:
        name, _, values = text.partition("=")
        if not name or not all(values.split(",")):
            raise UserError(f"--sweep {text!r}: write FLAG=VALUE,VALUE, such as config.seed=0,1")
        choices.append([(name, value) for value in values.split(",")])
    result = []
    for chosen in itertools.product(*choices):
        label = "_".join(f"{name.rpartition('.')[2]}={value}" for name, value in chosen)
        own = {name: flag(tuple(words), name) for name in ("workdir", "export_hf")} if chosen else {}
        folders = [f"--{name}={value.rstrip('/')}/{label}" for name, value in own.items() if value]
        result.append([*words, *(f"--{name}={value}" for name, value in chosen), *folders])
    return result


if __name__ == "__main__":
    command.run(main, USAGE)
