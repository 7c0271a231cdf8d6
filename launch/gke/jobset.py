"""The JobSet (jobset.x-k8s.io/v1alpha2) of a job on a slice of TPUs or on GPU nodes of GKE, made as XPK makes its workloads.

One replicated job is the slice, one pod of it a host; all pods run the same command. On TPUs GKE tells each pod its place
in the slice, and JAX reads it (`--coordinator auto`). On GPUs the flags say where the first pod is: a JobSet gives it the name
NAME-slice-0-0.NAME. A pod that fails ends its job, and the JobSet starts all of them again, `restarts` times.
"""

from __future__ import annotations

import dataclasses
import re

from launch.job import Job
from launch.machines import Slice
from qwen35_jax.errors import UserError

REPLICATED_JOB = "slice"
PORT = 6002  # of the first pod: JAX's coordination service
SPOT = "cloud.google.com/gke-spot"
CONVERSION = {"cpu": "8", "memory": "32Gi"}  # a conversion streams; what it holds at once is a few tensors


@dataclasses.dataclass(frozen=True)
class Options:
    """How the job is run. `name` is the JobSet's; `queue` is a Kueue LocalQueue's, empty without Kueue."""

    name: str
    image: str
    namespace: str = "default"
    restarts: int = 0
    spot: bool = False
    queue: str = ""
    service_account: str = ""

    def __post_init__(self):
        # A pod is named NAME-slice-0-INDEX-RANDOM, and names end at 63 letters.
        for flag, value, most in (("name", self.name, 40), ("namespace", self.namespace, 63)):
            if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", value) or len(value) > most:
                raise UserError(f"--{flag} {value!r}: write small letters, digits and dashes, at most {most}, a letter first")


def jobset(job: Job, options: Options) -> dict:
    """The manifest, as JSON."""
    job.need_bucket("a pod")
    queue = {"labels": {"kueue.x-k8s.io/queue-name": options.queue}} if options.queue else {}
    # Each slice has a node pool to itself.
    exclusive = {"annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": options.name, "namespace": options.namespace}
        | queue
        | (exclusive if job.slice and job.slice.is_tpu else {}),
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": options.name},
            "failurePolicy": {"maxRestarts": options.restarts},
            "replicatedJobs": [{"name": REPLICATED_JOB, "replicas": 1, "template": {"spec": _job_spec(job, options)}}],
        },
    }


def _job_spec(job: Job, options: Options) -> dict:
    return {
        "parallelism": job.hosts,
        "completions": job.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # the JobSet counts restarts: one pod that fails ends all
        "template": {"spec": _pod_spec(job, options)},
    }


def _pod_spec(job: Job, options: Options) -> dict:
    selector, tolerations = _node(job.slice)
    if options.spot:
        selector = selector | {SPOT: "true"}
        tolerations = [*tolerations, {"key": SPOT, "operator": "Equal", "value": "true", "effect": "NoSchedule"}]
    account = {"serviceAccountName": options.service_account} if options.service_account else {}
    network = {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"} if job.slice else {}
    return {
        **account,
        **network,
        "restartPolicy": "Never",
        # After SIGTERM a training run saves its state and ends; the others do not hear it as a pod's first process.
        "terminationGracePeriodSeconds": 300 if job.name == "train" else 30,
        **({"nodeSelector": selector, "tolerations": tolerations} if selector else {}),
        "containers": [_container(job, options)],
        # NCCL's shared memory, for which the default of 64 MiB is too small.
        **({"volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}]} if job.slice else {}),
    }


def _container(job: Job, options: Options) -> dict:
    words, variables = job.command("--coordinator", "auto"), []
    if job.slice:
        variables = [{"name": name, "value": value} for name, value in job.slice.container_environment.items()]
    if job.hosts > 1 and not job.slice.is_tpu:
        first = f"{options.name}-{REPLICATED_JOB}-0-0.{options.name}:{PORT}"
        words = job.command("--coordinator", first, "--hosts", str(job.hosts), "--host", "$(NODE_RANK)")
        index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        variables.append({"name": "NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": index}}})
    own = len(job.command())
    mounts = {"securityContext": {"privileged": True}, "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}]}
    return {
        "name": job.name,
        "image": options.image,
        # Kubernetes replaces $(NAME) in words; what the user wrote stays as it is.
        "command": [word.replace("$(", "$$(") for word in words[:own]] + words[own:],
        **({"env": variables} if variables else {}),
        "resources": _resources(job.slice),
        **(mounts if job.slice else {}),
    }


def _resources(where: Slice | None) -> dict:
    if where is None:
        return {"requests": CONVERSION}
    return {"limits": {"google.com/tpu" if where.is_tpu else "nvidia.com/gpu": str(where.chips)}}


def _node(where: Slice | None) -> tuple[dict, list]:
    """Node selector and tolerations."""
    if where is None:
        return {}, []
    if where.is_tpu:
        labels = {"accelerator": where.kind.gke, "topology": where.topology}
        selector = {f"cloud.google.com/gke-tpu-{name}": value for name, value in labels.items()}
        return selector, [{"key": "google.com/tpu", "operator": "Exists"}]
    return {"cloud.google.com/gke-accelerator": where.kind.gke}, [{"key": "nvidia.com/gpu", "operator": "Exists"}]
