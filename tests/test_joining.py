"""Hosts find one another from what Slurm, GKE and TPU VMs tell them, and each reads only its slices of a checkpoint."""

from __future__ import annotations

import json
import re
import socket

import pytest

from qwen35_jax.checkpoint import orbax_writer
from qwen35_jax.checkpoint.conversion import convert
from tests.checkpoint.synthetic import canonical_tensors, hf_config, write
from tests.joining import join_all
from tests.launch.cases import GOLDEN


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return str(s.getsockname()[1])


def slurm(host: int, count: int) -> dict:
    told = {"JOB_ID": "77", "STEP_NODELIST": "localhost,other", "NTASKS": str(count), "PROCID": str(host), "LOCALID": "0"}
    return {"environment": {f"SLURM_{name}": value for name, value in told.items()}}


def gke_tpu(host: int, count: int) -> dict:
    names = ",".join(["localhost"] * count)
    return {"environment": {"TPU_WORKER_HOSTNAMES": names, "TPU_WORKER_ID": str(host)}, "metadata": {}}


def tpu_vm(host: int, count: int) -> dict:
    ends = ",".join(f"worker-{i}:{i}:127.0.0.1" for i in range(count))
    return {"metadata": {"agent-worker-number": str(host), "worker-network-endpoints": ends, "tpu-env": "ZONE: 'z'"}}


def gke_gpu(host: int, count: int) -> dict:
    """The flags of the pods' manifest, with what Kubernetes and its name server make of them."""
    words = [line.strip().removeprefix("- ").strip("'") for line in (GOLDEN / "gke_h100_sample.txt").read_text().splitlines()]
    words = words[words.index("--coordinator") :][:6]
    assert words[2:4] == ["--hosts", str(count)]
    words[1] = "localhost:" + free_port() if host == 0 else words[1]
    return {"flags": [word.replace("$(NODE_RANK)", str(host)) for word in words]}


def run_of(environment, count: int, **more) -> list[dict]:
    """One run: --coordinator auto, but where the environment gives the flags."""
    told = [environment(host, count) for host in range(count)]
    port = free_port()
    for host in told:
        host.setdefault("flags", ["--coordinator", "auto"])
        host["flags"] = [*host["flags"], "--mesh", f"{count}x1"]
        if "auto" not in host["flags"]:
            host["flags"][1] = told[0]["flags"][1]
        host.setdefault("environment", {})["JAX_COORDINATOR_PORT"] = port
        host |= more
    return told


PLACES = {
    "slurm": (slurm, 2, "localhost"),
    "slurm_four": (slurm, 4, "localhost"),
    "gke_tpu": (gke_tpu, 2, "localhost"),
    "tpu_vm": (tpu_vm, 2, "127.0.0.1"),
    "gke_gpu": (gke_gpu, 2, "localhost"),
}


@pytest.fixture(scope="module")
def joined():
    """(what the hosts found in each place, what was said)"""
    runs = [run_of(environment, count, call="place") for environment, count, _ in PLACES.values()]
    runs.append(run_of(slurm, 2, call="place", deaf=True))
    answers, errors = join_all(runs)
    return dict(zip([*PLACES, "deaf"], answers, strict=True)), errors


@pytest.mark.parametrize("name", PLACES)
def test_hosts_join_from_their_environment(joined, name):
    _, count, first = PLACES[name]
    assert joined[0][name] == [[host, count, first, count] for host in range(count)]


def test_a_host_that_cannot_watch_the_first_says_so_and_goes_on(joined):
    """Where only the coordinator's port is open, JAX's heartbeats remain."""
    answers, errors = joined
    assert answers["deaf"] == [[host, 2, "localhost", 2] for host in (0, 1)]
    (note,) = (line for line in errors.splitlines() if line.startswith("note:"))
    assert re.fullmatch(
        r"note: host 1 of 2 \(.+\) cannot reach the first one at localhost:\d+ \(Connection refused\): "
        r"a host that dies is noticed after 100 s",
        note,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Experts are most of it, as in the large models."""
    config = hf_config(moe=True, experts=8, hidden=128, ffn=512)
    directory = tmp_path_factory.mktemp("checkpoint")
    tensors = canonical_tensors(config, vision=False)
    write(directory / "hf", config, tensors, shards=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orbax_writer, "CHUNK_BYTES", 128 << 10)  # as many chunks as the tensors of a large model have
        convert(str(directory / "hf"), str(directory / "orbax"))
    (directory / "sizes.json").write_text(
        json.dumps(
            {
                kind: sum(x.nbytes for n, x in tensors.items() if (".experts." in n) == (kind == "experts"))
                for kind in ("experts", "other")
            }
        )
    )
    return directory


@pytest.fixture(scope="module")
def readings(checkpoint):
    forms = [(form, mesh, int(mesh[0]) * int(mesh[2])) for form in ("hf", "orbax") for mesh in ("2x1", "1x2", "4x1")]
    runs = [run_of(slurm, count, call="reading", arguments=[str(checkpoint / form), mesh]) for form, mesh, count in forms]
    return {(form, mesh): found for (form, mesh, _), found in zip(forms, join_all(runs)[0], strict=True)}


@pytest.mark.parametrize("form", ["hf", "orbax"])
@pytest.mark.parametrize("mesh", ["2x1", "1x2", "4x1"])
def test_a_host_reads_its_experts_and_no_others(checkpoint, readings, form, mesh):
    """Also as the system counts it, where files are read and not mapped: its share, what all need, and chunks' edges."""
    sizes, found = json.loads((checkpoint / "sizes.json").read_text()), readings[form, mesh]
    share = sizes["experts"] // len(found)
    assert sizes["experts"] > 5 * sizes["other"]
    assert [host["experts"] for host in found] == [share] * len(found)
    for name in found[0]["rows"]:
        assert sorted(row for host in found for row in set(host["rows"][name])) == list(range(8)), name
    if form == "orbax":
        assert all(share < host["files"] < share + 1.5 * sizes["other"] for host in found), (sizes, found)
