"""XManager: its local executor really runs the command; what Vertex AI would be asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from qwen35_jax.errors import UserError
from tests.forked import FAST, ROOT
from tests.launch.cases import DATA, GOLDEN, xm_cases, xm_outputs

pytest.importorskip("xmanager")

from absl import flags  # noqa: E402
from absl.testing import flagsaver  # noqa: E402
from google.auth import credentials  # noqa: E402
from google.cloud.aiplatform_v1.services.job_service import JobServiceClient  # noqa: E402
from google.cloud.aiplatform_v1.types import CustomJob  # noqa: E402
from xmanager import xm as xm_core  # noqa: E402
from xmanager import xm_local, xm_mock  # noqa: E402

from launch import xm  # noqa: E402
from launch.machines import parse_slice  # noqa: E402


def start(home, *arguments: str) -> subprocess.CompletedProcess:
    """The launcher; XManager keeps its experiments under HOME."""
    words = [sys.executable, "-W", "ignore", "-m", "launch.xm", *arguments]
    environment = os.environ | FAST | {"HOME": str(home)}
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module")
def dry_runs(tmp_path_factory):
    return xm_outputs(str(tmp_path_factory.mktemp("home")))


@pytest.mark.parametrize("name", xm_cases())
def test_dry_runs(dry_runs, name):
    assert dry_runs[name] == (GOLDEN / name).read_text()


def test_a_local_launch_really_runs_sample(tmp_path):
    """One after the other, for each value of a sweep."""
    done = start(tmp_path, "--sweep", "seed=1,2", "--", "sample", "--prompt", "What is 37 + 58?", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("37 + 58 = 95") == 2, done.stdout


def test_a_job_that_fails_is_an_error_of_the_launcher(tmp_path):
    done = start(tmp_path, "--", "convert", str(tmp_path / "nowhere"), str(tmp_path / "there"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: a job of the experiment failed: ")
    assert "nowhere" in done.stdout + done.stderr


def test_a_sweep_is_a_job_for_every_combination(tmp_path):
    train = ["train", "--config", "configs/finetune_tiny.py", "--config.data.train=mine.jsonl", "--workdir", "runs/s/"]
    done = start(
        tmp_path, "--dry_run", "--sweep", "config.seed=0,1", "--sweep=config.optimizer.learning_rate=1e-4,3e-4", "--", *train
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.replace(sys.executable, "PYTHON").splitlines()
    start_of_all = f"PYTHON -m qwen35_jax.{' '.join(train)} --config.seed="
    assert lines == [
        f"{start_of_all}{seed} --config.optimizer.learning_rate={rate} --workdir=runs/s/seed={seed}_learning_rate={rate}"
        for seed in (0, 1)
        for rate in ("1e-4", "3e-4")
    ]


def test_a_sweep_in_the_mock_experiment(monkeypatch):
    """XManager's own: of each combination one work unit, packaged in the experiment, for the local executor."""
    experiment = xm_mock.MockExperiment()
    packaged = []

    def package(packageables):
        packaged.extend(packageables)
        return [xm_mock.MockExecutable() for _ in packageables]

    monkeypatch.setattr(experiment, "package", package)
    monkeypatch.setattr(xm_local, "create_experiment", lambda title: experiment)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"], known_only=True)
    with flagsaver.flagsaver(sweep=["seed=1,2"]):
        xm.main(["sample", "--prompt", "Why?"])
    assert list(experiment.work_units) == [1, 2]
    assert [(job.name, type(job.executor)) for job in experiment.launched_jobs] == [("sample", xm_local.Local)] * 2
    binary = [each.executable_spec for each in packaged]
    assert all(isinstance(each, xm_core.Binary) and each.path == sys.executable for each in binary)
    words = [each.args.to_list(str) for each in packaged]
    assert words == [["-m", "qwen35_jax.sample", "--prompt", "Why?", f"--seed={seed}"] for seed in (1, 2)]


VERTEX = {"executor": "vertex", "slice": "h100:8", "image": "registry/image:1", "project": "my-project", "bucket": "my-bucket"}
TRAIN = ["train", "--config", "configs/finetune.py", DATA, "--config.mesh=8x1", "--workdir", "gs://bucket/run"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """XManager opens its database once in a process."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def requests(monkeypatch, home):
    """What reaches Vertex AI's client, in place of the service; with credentials of nobody."""
    sent = []

    def create(self, parent, custom_job, **_):
        sent.append((parent, custom_job if isinstance(custom_job, CustomJob) else CustomJob(custom_job)))
        return CustomJob(name="projects/1/locations/us-central1/customJobs/2")

    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr("google.auth.default", lambda *_, **__: (credentials.AnonymousCredentials(), "my-project"))
    monkeypatch.setattr(JobServiceClient, "create_custom_job", create)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"], known_only=True)
    return sent


def test_the_request_to_vertex(requests, capsys):
    with flagsaver.flagsaver(**VERTEX, spot=True, restart=True, service_account="me@my-project", sweep=["config.seed=0,1"]):
        xm.main(TRAIN)
        with flagsaver.flagsaver(dry_run=True):
            capsys.readouterr()
            xm.main(TRAIN)
    printed = capsys.readouterr().out
    assert [parent for parent, _ in requests] == ["projects/my-project/locations/us-central1"] * 2
    asked = []
    for seed, (_, job) in enumerate(requests):
        (pool,) = job.job_spec.worker_pool_specs
        assert pool.machine_spec.machine_type == "a3-highgpu-8g" and pool.replica_count == 1
        assert (pool.machine_spec.accelerator_type.name, pool.machine_spec.accelerator_count) == ("NVIDIA_H100_80GB", 8)
        words = [
            "python",
            "-m",
            "qwen35_jax.train",
            *TRAIN[1:],
            f"--config.seed={seed}",
            f"--workdir=gs://bucket/run/seed={seed}",
        ]
        assert list(pool.container_spec.command) == words and pool.container_spec.image_uri == "registry/image:1"
        assert job.job_spec.scheduling.strategy.name == "SPOT" and job.job_spec.scheduling.restart_job_on_worker_restart
        assert job.job_spec.service_account == "me@my-project"
        machine = {"machine_type": "a3-highgpu-8g", "accelerator_type": "NVIDIA_H100_80GB", "accelerator_count": 8}
        variables = parse_slice("h100:8").container_environment
        given = [{"name": name, "value": value} for name, value in variables.items()]
        assert [(variable.name, variable.value) for variable in pool.container_spec.env] == list(variables.items())
        container = {"image_uri": "registry/image:1", "command": words, "env": given}
        pool = {"machine_spec": machine, "replica_count": 1, "container_spec": container}
        where = {"project": "my-project", "location": "us-central1", "staging_bucket": "gs://my-bucket"}
        how = {"service_account": "me@my-project", "restart_job_on_worker_restart": True, "scheduling_strategy": "SPOT"}
        asked.append(where | {"worker_pool_specs": [pool]} | how)
    assert printed == "".join(json.dumps(one, indent=1) + "\n" for one in asked)


def test_a_conversion_on_vertex_takes_no_gpu(requests):
    with flagsaver.flagsaver(**VERTEX):
        xm.main(["convert", "Qwen/Qwen3.5-4B", "gs://bucket/there"])
    ((_, job),) = requests
    (pool,) = job.job_spec.worker_pool_specs
    assert (pool.machine_spec.machine_type, pool.machine_spec.accelerator_count) == ("n2-standard-8", 0)
    assert list(pool.container_spec.command)[-2:] == ["Qwen/Qwen3.5-4B", "gs://bucket/there"]


@pytest.mark.parametrize(
    ("given", "words", "message"),
    [
        ({"executor": "vertex"}, TRAIN, "--slice is missing"),
        ({"slice": "h100:8"}, TRAIN, "--slice belongs to --executor vertex"),
        (VERTEX | {"slice": "h100:2x8"}, [*TRAIN, "--config.mesh=4x4"], "on Vertex AI give one machine of GPUs"),
        (VERTEX | {"slice": "v6e:2x2"}, ["sample", "--mesh", "2x2"], "on Vertex AI give one machine of GPUs"),
        (
            VERTEX,
            [*TRAIN, "--workdir", "runs/here"],
            "what a machine of Vertex AI writes to its disk is lost",
        ),
        (VERTEX, [*TRAIN, "--export_hf=runs/it"], "--export_hf runs/it: what a machine of Vertex AI writes to its disk is lost"),
        (VERTEX, ["convert", "Qwen/Qwen3.5-4B", "there"], "DST there: what a machine of Vertex AI"),
        (VERTEX, ["sample", "--mesh", "4x1"], "mesh 4x1 has 4 devices"),
        ({"sweep": ["config.seed"]}, TRAIN, "write FLAG=VALUE,VALUE"),
    ],
)
def test_what_does_not_fit(requests, given, words, message):
    with flagsaver.flagsaver(**given), pytest.raises(UserError, match=message):
        xm.main(words)
    assert not requests
