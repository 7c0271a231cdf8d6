"""The manifests against the schema of JobSet v1alpha2 and of the pods in it, and what XPK's workloads have in common with them.

The schema is that of the models in kubeflow-trainer-api, which are generated from the OpenAPI descriptions of Kubernetes and
JobSet. A field that the schema does not know is dropped by them, so a manifest must come back as it was.
"""

from __future__ import annotations

import copy

import pytest
import yaml

from tests.launch.cases import GOLDEN, gke_cases

jobset = pytest.importorskip("kubeflow_trainer_api.models.jobset_v1alpha2_job_set", exc_type=ImportError)


def manifest(name: str) -> dict:
    first, *lines, last = (GOLDEN / name).read_text().splitlines()
    assert (first, last) == ("kubectl apply -f - <<'END'", "END")
    return yaml.safe_load("\n".join(lines))


def through_the_schema(value: dict) -> dict:
    return jobset.JobsetV1alpha2JobSet.from_dict(copy.deepcopy(value)).to_dict()


@pytest.mark.parametrize("name", gke_cases())
def test_the_schema_knows_every_field(name):
    assert through_the_schema(manifest(name)) == manifest(name)


def test_the_schema_is_not_indifferent():
    """A misspelt field, in the JobSet or in a pod, is dropped; a value of another type is refused."""
    for path in ((), ("spec",), ("spec", "failurePolicy"), ("spec", "replicatedJobs", 0, "template", "spec", "template", "spec")):
        wrong = manifest("gke_v5p_train.txt")
        node = wrong
        for key in path:
            node = node[key]
        node["colour"] = "green"
        assert through_the_schema(wrong) != wrong
    wrong = manifest("gke_v5p_train.txt")
    wrong["spec"]["failurePolicy"]["maxRestarts"] = "many"
    with pytest.raises(ValueError):
        through_the_schema(wrong)


@pytest.mark.parametrize(
    ("accelerator", "hosts", "chips", "selector"),
    [
        ("v5p", 4, {"google.com/tpu": "4"}, {"accelerator": "tpu-v5p-slice", "topology": "2x2x4"}),
        ("v6e", 4, {"google.com/tpu": "4"}, {"accelerator": "tpu-v6e-slice", "topology": "4x4"}),
        ("tpu7x", 4, {"google.com/tpu": "4"}, {"accelerator": "tpu7x", "topology": "2x2x4"}),
        ("h100", 2, {"nvidia.com/gpu": "8"}, None),
    ],
)
def test_each_host_is_a_pod_with_all_its_chips(accelerator, hosts, chips, selector):
    spec = manifest(f"gke_{accelerator}_sample.txt")["spec"]
    (group,) = spec["replicatedJobs"]
    job = group["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert (job["parallelism"], job["completions"], job["completionMode"], job["backoffLimit"]) == (hosts, hosts, "Indexed", 0)
    assert container["resources"]["limits"] == chips
    labels = {f"cloud.google.com/gke-tpu-{name}": value for name, value in (selector or {}).items()}
    assert pod["nodeSelector"] == (labels or {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"})
    words = container["command"]
    assert "Why isn't the sky $$(green)?" in words  # which Kubernetes makes $(green) of again
    if accelerator == "h100":
        # The first pod's name, as JobSet and XPK have it: JOBSET-REPLICATEDJOB-JOB-POD.SUBDOMAIN.
        first = f"my-sample-{group['name']}-0-0.{spec['network']['subdomain']}:6002"
        assert words[-6:] == ["--coordinator", first, "--hosts", "2", "--host", "$(NODE_RANK)"]
        names = ["JAX_PLATFORMS", "XLA_PYTHON_CLIENT_MEM_FRACTION", "LD_LIBRARY_PATH", "NODE_RANK"]
        assert [variable["name"] for variable in container["env"]] == names
    else:
        assert words[-2:] == ["--coordinator", "auto"]


def test_spot_nodes_and_restarts():
    spec = manifest("gke_v5p_train.txt")["spec"]
    pod = spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 5
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert "cloud.google.com/gke-spot" in [toleration["key"] for toleration in pod["tolerations"]]
