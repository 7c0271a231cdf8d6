"""Processes that join as hosts and say what came of it: forks of one process, since importing JAX takes longer than joining.

`python -m tests.joining` reads JSON from stdin, a list of runs, each a list of hosts, and prints what each host's function
returned. A host is {"flags": […], "environment": {…}, "call": name of a function below, "arguments": […]}. On a TPU VM
that is not there it has "metadata": {…}, what the metadata server says (empty on GKE, which says it in the environment).
"deaf" is one that cannot reach the port of the first one's lifeline.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import jax
from absl import flags
from jax._src.clusters import cloud_tpu_cluster, cluster

from qwen35_jax import hosts
from qwen35_jax.checkpoint import load_params, open_source
from qwen35_jax.compat import coordinator_host
from qwen35_jax.config import ModelConfig
from qwen35_jax.model import Model
from qwen35_jax.sharding import Sharding, make_mesh
from tests.forked import FAST, ROOT


def join_all(runs: list[list[dict]]) -> tuple[list[list], str]:
    """What each host of each run returned, and what all of them wrote to stderr."""
    program = [sys.executable, "-W", "ignore", "-m", "tests.joining"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TPU_", "MEGASCALE_"))}
    environment |= FAST
    done = subprocess.run(program, input=json.dumps(runs), capture_output=True, text=True, timeout=400, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def place() -> list:
    """[which host, of how many, where the first is, devices of all]"""
    return [jax.process_index(), jax.process_count(), coordinator_host(), len(jax.devices())]


def reading(directory: str, mesh: str) -> dict:
    """Loads a checkpoint: bytes asked of each kind of tensor, the rows of its experts, and what this process read of files."""
    source = open_source(directory)
    config = ModelConfig.from_hf(source.config)
    abstract = Model(config, Sharding(make_mesh(mesh))).abstract_params(stacked=False)
    asked, rows, read = {"experts": 0, "other": 0}, {}, source.read

    def counted(name: str, index=()):
        values = read(name, index)
        kind = "experts" if ".experts." in name else "other"
        asked[kind] += values.nbytes
        if kind == "experts":
            start, stop, _ = index[0].indices(source.tensors[name].shape[0])
            rows.setdefault(name, []).extend(range(start, stop))
        return values

    source.read = counted
    before = _read_by_this_process()
    jax.block_until_ready(load_params(source, config, abstract))
    return asked | {"rows": rows, "files": _read_by_this_process() - before}


def _read_by_this_process() -> int:
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def _host(told: dict) -> object:
    os.environ.update(told.get("environment", {}))
    if (metadata := told.get("metadata")) is not None:
        os.environ.pop("TPU_SKIP_MDS_QUERY", None)  # which JAX sets where it sees no TPU
        cloud_tpu_cluster.running_in_cloud_tpu_vm = cluster.running_in_cloud_tpu_vm = True
        cloud_tpu_cluster.get_metadata = lambda key: (metadata.get(key, ""), 200 if key in metadata else 404)
    if told.get("deaf"):
        socket.create_connection = _refused
    flags.FLAGS(["test", *told["flags"]])
    with hosts.joined(flags.FLAGS["mesh"].value):
        found = globals()[told["call"]](*told.get("arguments", []))
    jax.distributed.shutdown()
    return found


def _refused(*_, **__):
    raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))


def _start(told: dict) -> tuple[int, int]:
    """(process id, where its answer can be read)"""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    status = 1
    try:
        os.write(writer, json.dumps(_host(told)).encode())
        status = 0
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def main() -> None:
    answers = []
    for run in json.load(sys.stdin):
        started = [_start(host) for host in run]
        texts = [os.fdopen(reader, "rb").read() for _, reader in started]
        if any([os.waitpid(pid, 0)[1] for pid, _ in started]):
            raise SystemExit("a host failed")
        answers.append([json.loads(text) for text in texts])
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    import qwen35_jax.sample  # noqa: F401  The flags of a command; elsewhere they would collide with those of benchmarks.

    main()
