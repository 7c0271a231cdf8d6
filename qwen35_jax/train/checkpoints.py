"""Checkpoints of a training run: the whole state, bit for bit, written while training goes on; only complete ones count."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from qwen35_jax.checkpoint.safetensors_file import is_local
from qwen35_jax.checkpoint.source import some
from qwen35_jax.errors import UserError

DIRECTORY = "checkpoints"
STATE = "state"
COMMIT = "commit_success.txt"  # Orbax's mark of a complete checkpoint
TEMPORARY = ".orbax-checkpoint-tmp"  # the ending of an unfinished save, which Orbax clears when it opens the directory
CHUNK_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class _Keep:
    """Orbax preservation policy: the last n, and the k whose metric is smallest (those without a finite one are none)."""

    last: int
    best: int
    metric: str

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """One bool a checkpoint; they come sorted by step."""
        kept = {c.step for c in checkpoints[-self.last :]}
        values = [((c.metrics or {}).get(self.metric), c.step) for c in checkpoints]
        finite = sorted((v, step) for v, step in values if isinstance(v, int | float) and math.isfinite(v))
        kept |= {step for _, step in finite[: self.best]}
        return [c.step in kept for c in checkpoints]


class Checkpoints:
    """The checkpoints under `workdir`/checkpoints, local or gs://, a directory a step. All processes call it together.

    A checkpoint holds every array of the state as it is (no cast, no compression) under its path, and as JSON the data
    state, the metrics and what `run` says of the run. It counts when Orbax has committed it: what a killed process left
    behind is cleared when the next one opens the directory.

    Use as a context manager, or call `close`: saving goes on in the background.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        every: int,
        keep_last: int,
        keep_best: int = 0,
        best_metric: str = "eval/loss",
        run: dict[str, Any] | None = None,
        clear: bool = True,
    ):
        """Opens or makes the directory and clears what unfinished saves left in it.

        Args:
            workdir: of the run.
            every: steps between checkpoints.
            keep_last: how many of the newest stay (at least 1).
            keep_best: how many stay, however old, because their `best_metric` is smallest.
            best_metric: a name in the metrics given to `save`.
            run: JSON-able facts stored with every checkpoint, such as the configuration's text and the seed.
            clear: False to read only: unfinished saves, perhaps of a process that goes on, stay.

        Raises UserError for impossible numbers and for a directory that cannot be written.
        """
        for name, value, least in (("every", every, 1), ("keep_last", keep_last, 1), ("keep_best", keep_best, 0)):
            if value < least:
                raise UserError(f"checkpoint.{name} is {value}; it must be {least} or more")
        # Orbax takes absolute paths only.
        self.directory = epath.Path(os.path.abspath(workdir) if is_local(workdir) else workdir) / DIRECTORY
        self._run, self._clear = run or {}, clear
        policies = ocp.training.save_decision_policies
        self._when = policies.AnySavePolicy([policies.FixedIntervalPolicy(every), policies.PreemptionCheckpointingPolicy()])
        self._keep = _Keep(keep_last, keep_best, best_metric)
        self._saving: ocp.AsyncResponse[bool] | None = None
        self._position: int | None = None  # the step that the run stands at: last saved or restored here
        self._open()

    def _open(self) -> None:
        context = ocp.Context()
        # Compressing float32 noise costs three times the time of writing it and saves a tenth of the bytes.
        context.array.saving.use_compression = False
        context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
        try:
            self._orbax = ocp.training.Checkpointer(
                self.directory,
                context=context,
                save_decision_policy=self._when,
                preservation_policy=self._keep,
                cleanup_tmp_directories=self._clear,
            )
        except OSError as e:
            raise UserError(f"cannot use {self.directory} for checkpoints: {e.strerror or e}") from None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, in order."""
        self.wait()
        return [c.step for c in self._orbax.checkpoints]

    @property
    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return max(self.steps, default=None)

    def should_save(self, step: int) -> bool:
        """Whether `save` would write at this step: every so many steps, and when the machine is about to be taken away."""
        return step != self._position and self._orbax.should_save(step)

    def save(self, step: int, state: Any, data_state: dict, metrics: dict, force: bool = False) -> bool:
        """Starts writing a checkpoint where `should_save(step)` or `force`; True if it did.

        Args:
            step: the optimizer step that `state` is after.
            state: pytree of jax.Arrays. They may be donated as soon as this returns.
            data_state: JSON-able; the same on every process.
            metrics: name -> number, of which `best_metric` decides what `keep_best` keeps.
            force: save at any step, such as the last. The step that this run saved or restored last is left alone.

        First waits for a save that is still going on, and removes checkpoints of later steps than the run stands at: they
        are there after `restore` of an older one, and the directory is that of one run. Raises UserError where that save or
        this one cannot be written, and where the directory has checkpoints and none was restored.
        """
        if self._position is None and self._orbax.latest is not None:
            raise UserError(f"{self.directory} has checkpoints of another run: continue it, or start in another directory")
        self._remove_later()
        if step == self._position or not (force or self.should_save(step)):
            return False
        self.wait()
        record = {"data": data_state, "run": self._run}
        numbers = {name: float(value) for name, value in metrics.items()}
        with self._reported():
            self._saving = self._orbax.save_checkpointables_async(
                step, {STATE: _named(state)}, force=True, metrics=numbers, custom_metadata=record
            )
        self._position = step
        return True

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[int, Any, dict]:
        """Reads (step, state, data state) of `step`, or of the newest complete checkpoint.

        Args:
            abstract_state: the state's structure, with ShapeDtypeStructs whose shardings say where each array goes.
            step: one of `steps`.

        Raises UserError where there is no such checkpoint, where it is damaged, and, saying what differs, where it is
        one of another model or optimizer.
        """
        step, path, stored, record = self._described(step)
        wanted = _named(abstract_state)
        _compare(stored, wanted, path)
        with _damage(path):
            arrays = self._orbax.load_checkpointables(step, {STATE: wanted})[STATE]
        self._position = step
        leaves = [arrays[name] for name in wanted]
        return step, jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), record["data"]

    def stored_run(self, step: int | None = None) -> dict[str, Any]:
        """What `run` said when the checkpoint of `step`, or the newest, was written. UserError as for `restore`."""
        return self._described(step)[3]["run"]

    def wait(self) -> None:
        """Returns when the save that is going on is complete. UserError if it could not be written."""
        response, self._saving = self._saving, None
        if response is not None:
            with self._reported():
                response.result()

    def close(self) -> None:
        """Waits, and ends the background threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def _described(self, step: int | None) -> tuple[int, epath.Path, dict, dict]:
        """The step (None: the newest), its directory, the forms of its arrays by name, and its JSON record."""
        steps = self.steps
        if not steps or step not in (None, *steps):
            have = f"it has {', '.join(map(str, steps))}" if steps else "it has none"
            raise UserError(f"no checkpoint{'' if step is None else f' of step {step}'} in {self.directory}: {have}")
        step = steps[-1] if step is None else step
        path = self.directory / str(step)
        with _damage(path):
            metadata = self._orbax.checkpointables_metadata(step)
            stored, record = metadata.metadata.get(STATE), metadata.custom_metadata
            if stored is None or record is None:
                raise ValueError("the description of its contents cannot be read")
            return step, path, stored, record

    def _remove_later(self) -> None:
        """Removes checkpoints of later steps than the run stands at, each of them incomplete before any of it is gone."""
        if self._position is None or self._orbax.latest is None or self._orbax.latest.step <= self._position:
            return
        later = [s for s in self.steps if s > self._position]
        if jax.process_index() == 0:
            for step in later:
                path = self.directory / str(step)
                (path / COMMIT).unlink(missing_ok=True)
                if is_local(path):
                    path = path.rename(path.parent / (path.name + TEMPORARY))
                path.rmtree()
        multihost_utils.sync_global_devices("later checkpoints are removed")
        self._orbax.close()
        self._open()

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as e:  # TensorStore reports a full disk as a ValueError
            raise UserError(f"could not write a checkpoint in {self.directory}: {_reason(e)}") from e


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by path: the keys, fields and places that lead to them, joined by "/"."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def _compare(stored: dict, wanted: dict, path: epath.Path) -> None:
    """UserError where names, shapes or dtypes of the arrays are not those that are wanted."""
    texts = []
    missing, unexpected = [n for n in wanted if n not in stored], [n for n in stored if n not in wanted]
    if missing:
        texts.append(f"it lacks {some(missing)}")
    if unexpected:
        texts.append(f"it has {some(unexpected)} that this run has not")
    changed = [
        f"{n} is {_form(stored[n])} instead of {_form(wanted[n])}"
        for n in wanted
        if n in stored and _form(stored[n]) != _form(wanted[n])
    ]
    if changed:
        texts.append(some(changed, 3))
    if texts:
        advice = "continue with the model, optimizer and freezing that wrote it, or start in another directory"
        raise UserError(f"checkpoint {path} is of another run: {'; '.join(texts)}: {advice}")


def _form(x: Any) -> str:
    return f"{np.dtype(x.dtype).name}{list(x.shape)}"


@contextlib.contextmanager
def _damage(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except Exception as e:  # the libraries below make all kinds of errors of files that are missing or cut off
        raise UserError(f"checkpoint {path} is damaged ({_reason(e)}); remove it to use the one before") from e


def _reason(error: Exception) -> str:
    code = re.search(r"os_error_code='(\d+)'", str(error))  # as TensorStore has it
    text = os.strerror(int(code[1])) if code else str(error)
    return " ".join(text.split())[:200] or type(error).__name__
