"""Training checkpoints: what is restored is what was saved, to the bit, and a killed save is as if it had never begun."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qwen35_jax.errors import UserError
from qwen35_jax.sharding import make_mesh
from qwen35_jax.train.checkpoints import Checkpoints

ROOT = Path(__file__).parents[2]


def _state(seed: int = 0, mesh: str = "4x2", width: int = 16) -> dict:
    """A sharded train state with AdamW's, a frozen bf16 leaf and every kind of float32 that a cast would lose."""
    place = NamedSharding(make_mesh(mesh), P("data", "model"))
    rng = np.random.default_rng(seed)
    odd = np.array([np.nan, -0.0, np.inf, 1e-45, 1 + 2**-23], np.float32)
    w = rng.normal(size=(width, 8)).astype(np.float32)
    w.flat[:5] = odd
    params = {"units": {"layers": {"0": {"q": jax.device_put(w, place)}}}, "final_norm": {"scale": jnp.asarray(odd)}}
    opt = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params)
    opt = jax.tree.map(lambda x: x + seed, opt)
    frozen = {"embed": {"embedding": jax.device_put(w.astype(jnp.bfloat16), place)}}
    return {"params": params, "frozen": frozen, "opt": opt, "step": jnp.int32(seed), "skipped": jnp.int32(0)}


def many_arrays(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {f"w{i}": jnp.asarray(rng.normal(size=(64, 512)).astype(np.float32)) for i in range(300)}


def _abstract(state, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state)


def _same(a, b) -> bool:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    return all(x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def test_restored_is_what_was_saved(tmp_path):
    state, data = _state(3), {"position": 2**60 + 1, "files": ["ä.jsonl", None], "fraction": 0.1}
    run = {"config": "c.steps = 5\n", "seed": 7}
    with Checkpoints(tmp_path, every=5, keep_last=2, run=run) as checkpoints:
        assert checkpoints.latest is None
        assert not checkpoints.save(3, state, data, {})
        assert checkpoints.save(5, state, data, {"loss": np.float32(1.5)})
        assert checkpoints.latest == 5
        assert not checkpoints.save(5, state, data, {}, force=True)  # it is there already
        assert checkpoints.save(7, state, data, {}, force=True)
    with Checkpoints(tmp_path, every=5, keep_last=2) as checkpoints:
        assert checkpoints.steps == [5, 7] and checkpoints.latest == 7
        step, restored, stored_data = checkpoints.restore(_abstract(state))
        assert step == 7 and stored_data == data and checkpoints.stored_run() == run
        assert _same(state, restored)
        assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, state, restored))
        assert checkpoints.restore(_abstract(state), 5)[0] == 5


def test_another_mesh(tmp_path):
    state = _state(1, "4x2")
    with Checkpoints(tmp_path, every=1, keep_last=1) as checkpoints:
        checkpoints.save(1, state, {}, {})
        other = _state(2, "1x8")
        restored = checkpoints.restore(_abstract(other))[1]
    assert _same(state, restored)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, other, restored))


def test_the_state_may_be_donated(tmp_path):
    """Training overwrites the arrays while they are being written."""
    state = many_arrays(0)
    saved = jax.tree.map(np.array, state)
    change = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    with Checkpoints(tmp_path, every=1, keep_last=1) as checkpoints:
        checkpoints.save(1, state, {}, {})
        for _ in range(5):
            state = jax.block_until_ready(change(state))
        assert _same(saved, checkpoints.restore(_abstract(state))[1])


def test_last_and_best_are_kept(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: float("nan"), 4: 2.0, 5: None, 6: 5.0, 7: 4.0}
    state = {"w": jnp.zeros(2)}
    for steps in ((1, 2, 3), (4, 5, 6, 7)):  # the metrics are remembered over a restart
        with Checkpoints(tmp_path, every=1, keep_last=2, keep_best=2) as checkpoints:
            if checkpoints.latest:
                checkpoints.restore(_abstract(state))
            for step in steps:
                checkpoints.save(step, state, {}, {} if losses[step] is None else {"eval/loss": losses[step]})
    with Checkpoints(tmp_path, every=1, keep_last=2, keep_best=2) as checkpoints:
        assert checkpoints.steps == [2, 4, 6, 7]


def test_going_back_removes_what_came_later(tmp_path):
    states = {step: {"w": jnp.full(3, float(step))} for step in (1, 2, 3)}
    with Checkpoints(tmp_path, every=1, keep_last=9) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state, {}, {})
    with Checkpoints(tmp_path, every=1, keep_last=9) as checkpoints:
        checkpoints.restore(_abstract(states[1]), 1)
        assert checkpoints.steps == [1, 2, 3]
        assert checkpoints.save(2, {"w": jnp.full(3, 22.0)}, {"again": True}, {})
        assert checkpoints.steps == [1, 2]
        step, state, data = checkpoints.restore(_abstract(states[1]))
        assert (step, data, float(state["w"][0])) == (2, {"again": True}, 22.0)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == ["1", "2"]


def _has_data(directory: Path) -> bool:
    """Whether a file of arrays of step 2 is there; folders may go while this looks, which `os.walk` passes over."""
    walks = (os.walk(path / "state") for path in directory.glob("2*"))
    return any(files and Path(folder).name == "d" for folder, _, files in itertools.chain.from_iterable(walks))


def _killed_in_the_middle(workdir: Path, moment: str) -> bool:
    """Runs killed_save.py and kills it at that moment of its second save; False if the save was faster."""
    directory = workdir / "checkpoints"
    command = [sys.executable, "-m", "tests.train.killed_save", str(workdir)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "complete\n"
        assert process.stdout.readline() == "saving\n"
        while moment != "at once" and not _has_data(directory) and not (directory / "2").exists():
            assert process.poll() in (None, 0)
            time.sleep(0.001)
        process.kill()
        process.communicate()
    return not (directory / "2").exists()


@pytest.mark.parametrize("moment", ["at once", "when there are files"])
def test_killed_in_the_middle_of_a_save(tmp_path, moment):
    tries = (tmp_path / str(i) for i in range(5))
    workdir = next((path for path in tries if _killed_in_the_middle(path, moment)), None)
    assert workdir is not None, "each time the save was done before the process could be killed"
    directory = workdir / "checkpoints"
    assert moment == "at once" or list(directory.glob("2*"))
    with Checkpoints(workdir, every=1, keep_last=1) as checkpoints:
        assert checkpoints.latest == 1
        step, state, data = checkpoints.restore(_abstract(many_arrays(0)))
        assert step == 1 and data == {"line": 1} and _same(state, many_arrays(1))
        assert checkpoints.save(2, many_arrays(2), {"line": 2}, {})
        assert checkpoints.latest == 2
        assert _same(checkpoints.restore(_abstract(state))[1], many_arrays(2))
    assert [p.name for p in directory.glob("[12]*")] == ["2"]


def test_half_removed_checkpoint(tmp_path):
    """Orbax removes old checkpoints file by file: one whose removal was cut short does not disturb the next run."""
    state = _state()
    with Checkpoints(tmp_path, every=1, keep_last=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, {}, {"eval/loss": 1.0})
    old = tmp_path / "checkpoints" / "1"
    for name in ("metrics", "_CHECKPOINT_METADATA", "state"):
        shutil.rmtree(old / name) if (old / name).is_dir() else (old / name).unlink()
        with Checkpoints(tmp_path, every=1, keep_last=2, keep_best=1) as checkpoints:
            assert checkpoints.restore(_abstract(state))[0] == 2
    with pytest.raises(UserError, match="damaged"), Checkpoints(tmp_path, every=1, keep_last=1) as c:
        c.restore(_abstract(state), 1)
    with Checkpoints(tmp_path, every=1, keep_last=1) as checkpoints:
        checkpoints.restore(_abstract(state))
        checkpoints.save(3, state, {}, {})
        assert checkpoints.steps == [3]
    assert not old.exists()


def test_mistakes_are_one_line(tmp_path):
    state = _state()
    with pytest.raises(UserError, match="keep_last is 0"):
        Checkpoints(tmp_path, every=1, keep_last=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot use"):
        Checkpoints(tmp_path / "file", every=1, keep_last=1)
    with Checkpoints(tmp_path / "run", every=1, keep_last=1) as checkpoints:
        with pytest.raises(UserError, match="no checkpoint in .*: it has none"):
            checkpoints.restore(_abstract(state))
        checkpoints.save(1, state, {}, {})
        with pytest.raises(UserError, match="no checkpoint of step 4 in .*: it has 1"):
            checkpoints.restore(_abstract(state), 4)
        others = {
            r"q is float32\[16, 8\] instead of float32\[32, 8\]": _state(width=32),
            r"embedding is bfloat16\[16, 8\] instead of float32": state | {"frozen": jax.tree.map(jnp.float32, state["frozen"])},
            r"lacks opt/momentum; it has .*mu.* that this run has not": state | {"opt": {"momentum": jnp.zeros(3)}},
            r"it has skipped that": {k: v for k, v in state.items() if k != "skipped"},
        }
        for text, other in others.items():
            with pytest.raises(UserError, match=text) as e:
                checkpoints.restore(_abstract(other))
            assert "\n" not in str(e.value)
        with Checkpoints(tmp_path / "run", every=1, keep_last=1) as again, pytest.raises(UserError, match="of another run"):
            again.save(2, state, {}, {})
        for file in (tmp_path / "run" / "checkpoints" / "1" / "state" / "d").iterdir():
            file.write_bytes(file.read_bytes()[:10])
        with pytest.raises(UserError, match="damaged") as e:
            checkpoints.restore(_abstract(state))
        assert "\n" not in str(e.value)


def test_full_disk_is_one_line(tmp_path):
    program = f"""
import jax, resource, signal
jax.config.update("jax_platforms", "cpu")
from qwen35_jax.errors import UserError
from qwen35_jax.train.checkpoints import Checkpoints
from tests.train.test_checkpoints import many_arrays
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
checkpoints = Checkpoints({str(tmp_path)!r}, every=1, keep_last=1)
checkpoints.save(1, many_arrays(1), {{}}, {{}})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoints.save(2, many_arrays(2), {{}}, {{}})
    checkpoints.wait()
except UserError as e:
    print("error:", e)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert "File too large" in done.stdout and done.stdout.count("\n") == 1, done.stdout + done.stderr
    with Checkpoints(tmp_path, every=1, keep_last=1) as checkpoints:
        assert checkpoints.steps == [1]
