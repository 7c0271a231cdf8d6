"""All that times the kernels on the device at hand, one table after the other, each from a process of its own.

python -m benchmarks.all_kernels
python -m benchmarks.all_kernels --small   (sizes that a CPU finishes in minutes: whether it all runs)

On an H200 the tables have columns with the shares of the aims that are reached (`benchmarks.aims`). What fails does not keep the
rest from running; the command fails at the end.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys

import jax
from absl import app, flags

from qwen35_jax.compat import HAS_MOSAIC_GPU

SMALL = flags.DEFINE_bool("small", False, "small sizes and one sample of each")
LIMIT = flags.DEFINE_integer("limit", 1800, "seconds that one of them may take", lower_bound=1)

# The first two of the rule are the shapes of the aims, without XLA's form, whose tiles take minutes to choose there.
FULL = [
    ("gdn", "--batch", "4", "--models", "397b-a17b", "--forms", "kernel"),
    ("gdn", "--time", "32768", "--models", "35b-a3b", "--forms", "kernel"),
    ("gdn",),
    ("fp8",),
    ("decode",),
]
REDUCED = [
    ("gdn", "--time", "64", "--models", "0.8b", "--rounds", "1"),
    ("fp8", "--shapes", "small", "--rounds", "1"),
    ("decode", "--models", "0.8b", "--slots", "2", "--rounds", "1"),
]


def describe() -> None:
    """Prints the device and the versions as JSON; in a process of its own, since whoever asks holds the device."""
    device = jax.devices()[0]
    names = [d.metadata["Name"] for d in importlib.metadata.distributions()]
    wanted = [n for n in names if n in ("jax", "jaxlib", "libtpu") or (n.startswith("jax-cuda") and n.endswith("-pjrt"))]
    hopper = device.platform == "gpu" and HAS_MOSAIC_GPU and device.compute_capability == "9.0"
    versions = {name: importlib.metadata.version(name) for name in sorted(set(wanted))}
    print(json.dumps({"device": device.device_kind, "hopper": hopper, "versions": versions}))


def run(module: str, *arguments: str) -> bool:
    """Whether `python -m benchmarks.module arguments` ended well within the limit; what it prints is seen as it comes."""
    name = f"benchmarks.{module}"
    print(f"\n== {' '.join((name, *arguments))}", flush=True)
    try:
        code = subprocess.run([sys.executable, "-m", name, *arguments], timeout=LIMIT.value).returncode
    except subprocess.TimeoutExpired:
        print(f"{name} was not done after {LIMIT.value} seconds", flush=True)
        return False
    if code:
        print(f"{name} ended with {code}", flush=True)
    return code == 0


def main(_) -> None:
    ask = [sys.executable, "-c", "from benchmarks.all_kernels import describe; describe()"]
    found = json.loads(subprocess.run(ask, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    print(", ".join((found["device"], *(f"{name} {version}" for name, version in found["versions"].items()))), flush=True)
    jobs = list(REDUCED if SMALL.value else FULL)
    if found["hopper"]:
        jobs.insert(0, ("hopper", "--rounds", "1") if SMALL.value else ("hopper",))
    else:
        print("benchmarks.hopper is left out: it needs an H100 or H200 and jax 0.11 or newer", flush=True)
    failed = [" ".join(job) for job in jobs if not run(*job)]
    if failed:
        print(f"\n{len(failed)} of {len(jobs)} failed: {'; '.join(failed)}", flush=True)
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
