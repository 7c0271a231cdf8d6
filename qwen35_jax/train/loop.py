"""The training loop: batches through the compiled step, with checkpoints, evaluations and metrics, until it is done."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from qwen35_jax.checkpoint import check_export_target, export_hf
from qwen35_jax.checkpoint.source import check_directory
from qwen35_jax.compilation import use_compilation_cache
from qwen35_jax.errors import UserError
from qwen35_jax.sharding import together
from qwen35_jax.train.checkpoints import Checkpoints
from qwen35_jax.train.config import check_config
from qwen35_jax.train.data import BadLines, TrainData, make_data
from qwen35_jax.train.fp8 import scalars
from qwen35_jax.train.metrics import MetricsWriter, device_memory, flops_per_token, mfu
from qwen35_jax.train.run import Run, find_origin, initial_state, make_run
from qwen35_jax.train.stopping import StopSignal

PROFILED_STEPS = (3, 6)  # from the third step of this process on: the first ones wait for compilation and data


class Interrupted(Exception):
    """The run was told to end by this signal, and has saved its state."""

    def __init__(self, number: int, step: int):
        super().__init__(f"{signal.Signals(number).name} after step {step}; the same command goes on from there")
        self.number = number


def train(config: ConfigDict, workdir: str, *, export_dir: str | None = None, profile_dir: str | None = None) -> dict[str, float]:
    """Runs `config` to its last step, from the newest checkpoint in `workdir` if there is one.

    Args:
        config: see `train.config.default_config`.
        workdir: for checkpoints, metrics.jsonl, TensorBoard and the names of bad lines that are skipped; local or gs://.
        export_dir: where the trained model goes as a Hugging Face directory; it must not exist.
        profile_dir: for a jax.profiler trace of three steps, the fourth to the sixth of this process.

    Returns the last metrics. Raises UserError for wrong input, and where too many steps in a row had no finite loss or
    gradient; Interrupted after SIGTERM or SIGINT. The last checkpoint stands; one more is written before Interrupted, and before
    the UserError of a bad line where there is one host.
    """
    with together():
        check_config(config)
        check_directory(epath.Path(workdir), "give a directory for the run")
        if export_dir:
            check_export_target(export_dir)
        if profile_dir and not check_directory(epath.Path(profile_dir), "give a directory for the trace"):
            epath.Path(profile_dir).mkdir(parents=True, exist_ok=True)  # complains now, not after the traced steps
        use_compilation_cache()
        if config.data.patches and config.data.bad_lines == "skip" and jax.process_count() > 1:
            # Each host reads the pictures by itself: one that skipped a line alone would pack other batches from there on.
            raise UserError("config.data.bad_lines: several hosts cannot skip lines with pictures; set it to stop")
        run = make_run(config, find_origin(config))
        tokenizer, template = run.tokenizer(), run.template()
        quiet = jax.process_index() > 0
        bad = BadLines(workdir)
        options = {"quiet": quiet, "named": bad, "reader": run.pictures(config.accumulate)}
        data = make_data(config.data, tokenizer, template, **options)
        evaluation = make_data(config.data, tokenizer, template, train=False, **options) if config.data.eval else None
    record = {"config": json.loads(config.to_json()), "seed": config.seed}
    saved = config.checkpoint
    with (
        contextlib.closing(bad),
        contextlib.closing(data),
        Checkpoints(workdir, **saved, run=record) as checkpoints,
        contextlib.closing(MetricsWriter(workdir)) as writer,
        StopSignal(run.model.sharding.mesh) as stop,
    ):
        loop = _Loop(run, data, evaluation, bad, checkpoints, writer, stop)
        loop.begin()
        metrics = loop.run_steps(profile_dir)
    if export_dir:
        _export(run, loop.state, export_dir)
    return metrics


def export(config: ConfigDict, workdir: str, directory: str, step: int) -> None:
    """Writes the checkpoint of `step` in `workdir`, a run of `config`, as the Hugging Face directory `directory`.

    Raises UserError where there is no such checkpoint, where it is of another run, and where the directory exists.
    """
    with together():
        check_config(config)
        if not check_directory(epath.Path(workdir), "give the directory of a run"):
            raise UserError(f"there is no directory {workdir}: give that of a run")
        check_export_target(directory)
        run = make_run(config, find_origin(config))
    with Checkpoints(workdir, **config.checkpoint, clear=False) as checkpoints:  # the run may be going on
        _, state, _ = checkpoints.restore(run.state, step)
    _export(run, state, directory)


class _Loop:
    """One run on its way. `state` is the train state after `step` steps."""

    def __init__(self, run: Run, data: TrainData, evaluation: TrainData | None, bad: BadLines, checkpoints, writer, stop):
        self.run, self.config, self.data, self.bad = run, run.config, data, bad
        self.checkpoints, self.writer, self.stop = checkpoints, writer, stop
        self.evaluation = evaluation
        self.first_evaluation = evaluation.get_state() if evaluation else None
        self.state: dict[str, Any] = {}
        self.step = 0
        self.evaluated: int | None = None  # the step of the last evaluation
        self.meter = _Meter(run)
        self.metrics: dict[str, float] = {}

    def begin(self) -> None:
        """The state to start from: the newest checkpoint's, or a new one."""
        if self.checkpoints.latest is None:
            self.state = initial_state(self.run)
            if self.run.draws_tower:
                self._say("the vision tower starts from random weights")
        else:
            self.step, self.state, position = self.checkpoints.restore(self.run.state)
            self.data.set_state(position)
            self._say(f"resumed from the checkpoint of step {self.step}")
            self._say_changes(self.checkpoints.stored_run(self.step)["config"])
        if self.config.data.bad_lines == "stop":
            self._read_ahead()
        self.writer.truncate(self.step)

    def _read_ahead(self) -> None:
        """Reads the first batches and goes back: a bad line is named before minutes of compilation, not after."""
        for data in filter(None, (self.data, self.evaluation)):
            position = data.get_state()
            next(data, None)
            data.set_state(position)

    def run_steps(self, profile_dir: str | None) -> dict[str, float]:
        """Trains to the last step and returns the last metrics."""
        config, last = self.config, self.config.steps
        if self.step >= last:
            self._say(f"nothing to do: the checkpoint is of step {self.step} of {last}")
            return self.metrics
        if profile_dir and last - self.step <= PROFILED_STEPS[0]:
            text = f"--profile traces the steps after the first {PROFILED_STEPS[0]}, but {last - self.step} are left"
            raise UserError(f"{text}: raise config.steps, or leave it out")
        train_step = self._compiled(self.run.train_step)
        eval_step = self._compiled(self.run.eval_step) if self.evaluation else None
        every = config.fp8.monitor_every
        monitor = self._compiled(self.run.monitor_step) if every else None
        self.meter, previous = _Meter(self.run), None  # its clock begins behind compilation
        with _profiler(profile_dir) as profile:
            while self.step < last and not self.stop.came():
                batch = self._next_batch()
                if batch is None:
                    break
                profile(self.step, self.state)
                if monitor and self.step % every == 0:
                    self._record_fp8(monitor, batch)
                self.state, metrics = train_step(self.state, batch)
                self.step += 1
                self.meter.add(metrics)
                self._check_finite(previous)  # of the step before: its numbers are there already
                previous = metrics
                due = self.checkpoints.should_save(self.step)
                # Beside a checkpoint too: it holds these numbers, and a run that goes on from it begins to count here.
                if self.step % config.log_every == 0 or self.step == last or due:
                    self._log()
                with self.meter.paused():
                    self._after_step(eval_step, due, self.step == last)
        self._check_finite(previous)
        self._stop_if_told()
        if self.step < last:
            self._say(f"the data ended after {config.data.epochs} epochs, at step {self.step} of {last}")
            self._log()
            if previous is not None:  # else it had ended when this process began
                self._after_step(eval_step, due=False, last=True)
            self._stop_if_told()
        self.checkpoints.wait()
        return self.metrics

    def _after_step(self, eval_step: Callable | None, due: bool, last: bool) -> None:
        """Evaluation, and a checkpoint where one is due, also where the evaluation data turn out to be bad."""
        config, every = self.config, self.config.eval_every
        wanted = last or (every and self.step % every == 0) or (due and config.checkpoint.keep_best)
        try:
            if eval_step and wanted and self.evaluated != self.step:
                with self._saved_if_bad():
                    self._log_evaluation(self._evaluate(eval_step))
        finally:
            if due or last:
                self._save()

    def _log_evaluation(self, found: dict[str, float]) -> None:
        if not found:
            return
        self.evaluated = self.step
        self.metrics |= found
        self.writer.write(self.step, found)
        self._say(f"step {self.step}  " + "  ".join(f"{name} {value:.4f}" for name, value in found.items()))

    def _stop_if_told(self) -> None:
        if number := self.stop.number():
            self._log()
            self._save()
            self.checkpoints.wait()
            raise Interrupted(number, self.step)

    def _save(self, position: dict | None = None) -> None:
        """A checkpoint, of the data's present position unless another one is given."""
        # An evaluation of other weights says nothing of these: keep_best would keep the wrong ones.
        metrics = {n: x for n, x in self.metrics.items() if self.evaluated == self.step or not n.startswith("eval/")}
        if self.checkpoints.save(self.step, self.state, position or self.data.get_state(), metrics, force=True):
            self._say(f"step {self.step}  checkpoint")

    def _next_batch(self) -> dict | None:
        with self._saved_if_bad():
            batch = next(self.data, None)
        return None if batch is None else self._placed(batch)

    @contextlib.contextmanager
    def _saved_if_bad(self) -> Iterator[None]:
        """Where what is inside meets a bad line, the steps until then are saved, at the position that the data have before it."""
        position = self.data.get_state()
        try:
            yield
        except UserError:
            if self.step and jax.process_count() == 1:  # hosts save together, but a line may be bad in the files of one
                self._log()
                self._save(position)
                self.checkpoints.wait()
            raise

    def _placed(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """The batch on the devices: every process has all of it and gives its own devices their rows."""

        def put(x: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
            x = x.reshape(like.shape)
            return jax.make_array_from_callback(x.shape, like.sharding, lambda index: x[index])

        return {name: put(batch[name], like) for name, like in self.run.batch(self.config.accumulate).items()}

    def _evaluate(self, eval_step: Callable) -> dict[str, float]:
        """The losses over all of the evaluation data; {} where the run is told to stop meanwhile."""
        self.evaluation.set_state(self.first_evaluation)
        totals: dict[str, float] = {}
        for batch in self.evaluation:
            if self.stop.came():
                self._say(f"step {self.step}  evaluation left unfinished")
                return {}
            sums = eval_step(self.state["params"], self.state["frozen"], self._placed(batch))
            for name, value in jax.device_get(sums).items():
                totals[name] = totals.get(name, 0.0) + float(value)
        if not totals.get("weight"):
            raise UserError("the evaluation data has no tokens with a weight: look at config.data.eval and loss_on")
        result = {"eval/loss": totals["nll"] / totals["weight"]}
        if totals.get("mtp_weight"):
            result["eval/mtp_loss"] = totals["mtp_nll"] / totals["mtp_weight"]
        return result

    def _record_fp8(self, monitor: Callable, batch: dict) -> None:
        """Each layer's quantisation errors in the step that comes, to the metrics."""
        found = jax.device_get(monitor(self.state["params"], self.state["frozen"], batch))
        self.writer.write(self.step + 1, scalars(found))

    def _check_finite(self, metrics: dict | None) -> None:
        if metrics is None or float(metrics["skipped_in_a_row"]) < self.config.stop_after_skipped:
            return
        self._log()
        count, saved = int(metrics["skipped_in_a_row"]), self.checkpoints.latest
        where = f"the last good checkpoint is of step {saved}" if saved is not None else "there is no checkpoint yet"
        advice = "lower the learning rate or look at the data"
        raise UserError(f"{count} steps in a row had no finite loss or gradient, and changed nothing; {where}: {advice}")

    def _log(self) -> None:
        """The metrics of the steps since the last log line, where there are some."""
        if not self.meter.steps:
            return
        metrics = self.meter.take() | {"data/bad_lines": self.data.bad_lines, "data/truncated": self.data.truncated}
        self.metrics |= metrics
        self.writer.write(self.step, metrics)
        self.writer.report(self.step, self.config.steps, metrics)
        self.bad.write()

    def _compiled(self, make: Callable) -> Callable:
        self._say(f"compiling {make.__name__}: on CPUs this takes a minute or more the first time")
        begin = time.perf_counter()
        compiled = make().compile()
        self._say(f"compiled {make.__name__} in {time.perf_counter() - begin:.1f} s")
        return compiled

    def _say_changes(self, stored: dict) -> None:
        """Fields in which this run's configuration is not that of the checkpoint."""
        mine = _flat(json.loads(self.config.to_json()))
        changed = [name for name, value in _flat(stored).items() if mine.get(name) != value]
        if changed:
            self._say(f"note: the configuration differs from the checkpoint's in {', '.join(changed)}")

    def _say(self, text: str) -> None:
        if jax.process_index() == 0:
            print(text, file=sys.stderr, flush=True)


class _Meter:
    """Metrics between two log lines: losses are means over them, the others those of the last step; speeds are of steps alone."""

    def __init__(self, run: Run):
        self.run, self.steps = run, []
        self.begin = time.perf_counter()

    def add(self, metrics: dict[str, jax.Array]) -> None:
        self.steps.append(metrics)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What goes on inside, evaluation and saving, does not count as time of steps."""
        begin = time.perf_counter()
        yield
        self.begin += time.perf_counter() - begin

    def take(self) -> dict[str, float]:
        config, model = self.run.config, self.run.model
        steps = [{name: float(x) for name, x in metrics.items()} for metrics in jax.device_get(self.steps)]
        elapsed = time.perf_counter() - self.begin
        means = {n: float(np.mean([s[n] for s in steps])) for n in steps[0] if n.endswith("loss") or n == "balance"}
        length = config.data.sequence_length
        speed = len(steps) * config.data.batch_size * length / elapsed
        result = steps[-1] | means | {"tokens_per_second": speed, "seconds_per_step": elapsed / len(steps)}
        flops = flops_per_token(model.config, length, mtp=self.run.loss.has_mtp)
        share = mfu(speed, flops, list(model.sharding.mesh.devices.flat))
        self.steps, self.begin = [], time.perf_counter()
        return result | device_memory() | ({} if share is None else {"mfu": share})


def _export(run: Run, state: dict, directory: str) -> None:
    origin = run.origin
    if jax.process_index() == 0:
        print(f"writing {directory}", file=sys.stderr, flush=True)
    export_hf(
        run.merged(state),
        run.model.config,
        directory,
        template_dir=origin.tokenizer_dir,
        hf_config=origin.hf_config,
        vision_source=origin.source,
    )


@contextlib.contextmanager
def _profiler(directory: str | None) -> Iterator[Callable[[int, Any], None]]:
    """A function to call before each step, with the state it starts from, which traces PROFILED_STEPS, counted from the first."""
    first: list[int] = []
    running = False

    def profile(step: int, state: Any) -> None:
        nonlocal running
        first.append(step) if not first else None
        if directory and step - first[0] == PROFILED_STEPS[0]:
            jax.profiler.start_trace(directory)
            running = True
        elif running and step - first[0] == PROFILED_STEPS[1]:
            jax.block_until_ready(state)  # devices run behind: the last step is to be in the trace whole
            jax.profiler.stop_trace()
            running = False

    try:
        yield profile
    finally:
        if running:
            jax.profiler.stop_trace()


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
