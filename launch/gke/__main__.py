"""Command line: a job on GKE. `python -m launch.gke --help`."""

from __future__ import annotations

import shlex
import subprocess

import yaml
from absl import flags

from launch.gke.jobset import Options, jobset
from launch.job import make_job
from qwen35_jax import command
from qwen35_jax.errors import UserError

USAGE = """
Starts a JobSet on GKE, whose command runs on every host of a slice.

  python -m launch.gke --slice v5p:4x4x4 --name answer --image IMAGE -- sample --mesh 16x4 --checkpoint gs://… --prompt …
  python -m launch.gke --slice h100:2x8 --name tune --image IMAGE --restarts 5 --spot -- \\
    train --config configs/finetune.py --config.model.source=Qwen/Qwen3.5-0.8B --config.mesh=16x1 \\
    --config.data.batch_size=16 --config.data.train="('gs://…/mine.jsonl',)" --workdir gs://…
  python -m launch.gke --slice v5p:4x4x4 --name copy --image IMAGE -- convert gs://… gs://…

IMAGE is made of launch/Dockerfile. What is started ends with `kubectl delete jobset NAME`.
"""

SLICE = flags.DEFINE_string("slice", None, "accelerators: v5p:4x4x4 (chips), h100:2x8 (nodes x GPUs)")
NAME = flags.DEFINE_string("name", None, "of the JobSet")
IMAGE = flags.DEFINE_string("image", None, "container image with the package in it")
NAMESPACE = flags.DEFINE_string("namespace", "default", "of Kubernetes")
RESTARTS = flags.DEFINE_integer("restarts", 0, "how often it is started again after a failure", lower_bound=0)
SPOT = flags.DEFINE_bool("spot", False, "on spot nodes, which can be taken away")
QUEUE = flags.DEFINE_string("queue", "", "LocalQueue of Kueue")
ACCOUNT = flags.DEFINE_string("service_account", "", "of Kubernetes, that may read and write the buckets")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "print what would be started, and start nothing")

APPLY = ["kubectl", "apply", "-f", "-"]


def main(arguments: list[str]) -> None:
    """Flags to one manifest, which is printed or applied."""
    for flag in (SLICE, NAME, IMAGE):
        if not flag.value:
            raise UserError(f"--{flag.name} is missing; see --help")
    options = Options(NAME.value, IMAGE.value, NAMESPACE.value, RESTARTS.value, SPOT.value, QUEUE.value, ACCOUNT.value)
    text = yaml.safe_dump(jobset(make_job(SLICE.value, arguments), options), sort_keys=False, width=1000)
    if DRY_RUN.value:
        print(f"{shlex.join(APPLY)} <<'END'\n{text}END")
        return
    status = subprocess.run(APPLY, input=text, text=True).returncode
    if status:
        raise UserError(f"kubectl ended with status {status}; nothing was started")


if __name__ == "__main__":
    command.run(main, USAGE)
