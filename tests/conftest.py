"""Every test sees eight virtual CPU devices and shares one compilation cache; --only-skips makes other skips fail. --gpu is for
the tests of the Hopper kernels (docs/kernels.md)."""

from __future__ import annotations

import gc
import os
import re
import signal
from pathlib import Path

import hypothesis
import jax
import pytest

CACHE = Path(__file__).parents[1] / ".cache" / "jax"
# Files that take long come first, so that at the end no worker is left alone with one.
LONG = (
    *("test_hosts.py", "train/test_train.py", "test_sample.py", "train/test_step.py", "train/test_vision.py"),
    *("ops/test_gated_delta_tpu.py", "generate/", "ops/test_fp8_training.py", "train/test_loop.py", "train/test_fp8.py"),
    *("ops/test_fp8_tpu.py", "test_golden.py"),
)


MANY = 25_000  # memory mappings
_kept = 0  # mappings that were left when compiled functions were forgotten last
_timed: set[str] = set()  # what JAX has timed in this test


def pytest_addoption(parser):
    parser.addoption("--optimize", action="store_true", help="compile as users do, which takes several times as long")
    parser.addoption("--gpu", action="store_true", help="run GPU kernels on this machine's GPU, not interpreted on the CPU")
    parser.addoption("--only-skips", metavar="REGEX", help="a skip whose reason does not match REGEX is a failure")


def pytest_configure(config):
    # Who runs out of time says what had failed until then; and what runs in the background has commands that can be interrupted.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    slow_machine = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
    hypothesis.settings.register_profile("slow machine", slow_machine)
    hypothesis.settings.load_profile("slow machine")
    gpu = config.getoption("--gpu")
    jax.config.update("jax_platforms", "cuda,cpu" if gpu else "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    if gpu and jax.default_backend() != "gpu":
        raise pytest.UsageError("--gpu: JAX finds no GPU here")
    if not gpu and not config.getoption("--optimize"):
        _compile_fast()
    jax.config.update("jax_compilation_cache_dir", str(CACHE))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.01)
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: _timed.add(event))


def _compile_fast():
    """Small programs, run once: compiling them well takes longer than running them badly."""
    jax.config.update("jax_disable_most_optimizations", True)
    if jax.__version_info__ < (0, 11):  # half the compile time; later ones know only the other emitters
        given = os.environ.get("XLA_FLAGS", "")
        # Programs that are not cut up to be compiled in parallel take a twelfth less processor time: both cores have work.
        os.environ["XLA_FLAGS"] = f"{given} --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        jax.devices()  # reads them: the commands that tests start optimise, which takes twice as long with this one
        os.environ["XLA_FLAGS"] = given


def pytest_collection_modifyitems(items):
    def place(item) -> int:
        return next((i for i, part in enumerate(LONG) if part in item.nodeid), len(LONG))

    items.sort(key=place)


def _refuse_skip(config, report):
    allowed = config.getoption("--only-skips")
    if allowed is None or not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not re.search(allowed, reason):
        report.outcome, report.longrepr = "failed", f"skipped where it must run: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    _refuse_skip(item.config, report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    _refuse_skip(collector.config, report)
    return report


def mappings() -> int:
    """How many memory mappings this process has: XLA:CPU takes several for every kernel and crashes when there are no more."""
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


def many_mappings() -> bool:
    """Whether this process nears the limit of memory mappings (65,530 on Linux)."""
    return mappings() > MANY


@pytest.fixture(autouse=True)
def forget_compiled_functions():
    """Not after every test where models that are kept hold many: what they do not hold would be traced and loaded again."""
    global _kept
    yield
    if not _timed:  # nothing was traced or compiled; counting takes 10 ms
        return
    _timed.clear()
    if mappings() > max(MANY, min(_kept + MANY // 5, 2 * MANY)):
        jax.clear_caches()
        gc.collect()
        _kept = mappings()
