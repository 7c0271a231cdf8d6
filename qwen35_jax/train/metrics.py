"""What a training run reports: one JSON object a line, TensorBoard scalars, and a line for whoever watches.

Model FLOPs and the devices' peak give the MFU; where the peak is not known there is none.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
import tensorboardX
from etils import epath

from qwen35_jax.checkpoint.safetensors_file import is_local
from qwen35_jax.config import ModelConfig
from qwen35_jax.errors import UserError
from qwen35_jax.model.decoder import parameter_counts

FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"
REMOTE_SECONDS = 30  # object stores cannot append: there files are written anew, this often

# Dense bf16 FLOP/s of one JAX device, by `device_kind`. A tpu7x chip (2307e12) is two devices.
PEAK_FLOPS = {
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA H100 80GB HBM3": 989e12,  # SXM; the PCIe and NVL cards are slower and have other names
    "NVIDIA H200": 989e12,
}


class MetricsWriter:
    """Writes `workdir`/metrics.jsonl and `workdir`/tensorboard, local or gs://, from the first process alone.

    Call `truncate` before the first `write` of a run that goes on, and `close` at the end.
    """

    def __init__(self, workdir: epath.PathLike):
        self._workdir = epath.Path(workdir)
        self._file = self._workdir / FILE
        self._writes = jax.process_index() == 0
        self._local = is_local(self._workdir)
        self._lines: list[str] | None = None  # remote: the whole file
        self._uploaded = 0.0
        self._events: tensorboardX.SummaryWriter | None = None
        self._events_dir: str | None = None
        self._purge: int | None = None

    def truncate(self, step: int) -> None:
        """Drops what was written for later steps, and a line that was cut short: the run goes on from `step`."""
        if not self._writes:
            return
        self._purge = step + 1
        lines = [line for line in self._stored() if _step_of(line) <= step]
        if not self._local:
            self._lines = lines
        elif self._file.exists():
            partial = self._workdir / f".{FILE}.partial"
            partial.write_text("".join(lines))
            os.replace(partial, self._file)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends {"step": step, name: number, …}. Numbers that are not finite become null: JSON has none.

        UserError where the file cannot be written.
        """
        if not self._writes:
            return
        numbers = {name: float(value) for name, value in metrics.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        line = json.dumps({"step": step, **finite}) + "\n"
        try:
            self._append(line)
            self._add_events(step, numbers)
        except OSError as e:
            raise UserError(f"could not write metrics in {self._workdir}: {e.strerror or e}") from e

    def report(self, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        """Prints the progress line."""
        if self._writes:
            print(progress_line(step, total, metrics), flush=True)

    def close(self) -> None:
        """Writes what is still held back."""
        if self._events is not None:
            self._events.close()
        if self._writes and not self._local:
            self._upload()

    def _stored(self) -> list[str]:
        return self._file.read_text().splitlines(keepends=True) if self._file.exists() else []

    def _append(self, line: str) -> None:
        if self._local:
            self._workdir.mkdir(parents=True, exist_ok=True)
            with self._file.open("a") as f:
                f.write(line)
            return
        if self._lines is None:
            self._lines = self._stored()
        self._lines.append(line)
        if time.monotonic() - self._uploaded > REMOTE_SECONDS:
            self._upload()

    def _add_events(self, step: int, numbers: dict[str, float]) -> None:
        if self._events is None:
            self._events_dir = os.fspath(self._workdir / TENSORBOARD) if self._local else tempfile.mkdtemp()
            # The suffix keeps apart the files of runs that begin in the same second.
            suffix = f".{self._purge or 0}"
            self._events = tensorboardX.SummaryWriter(self._events_dir, purge_step=self._purge, filename_suffix=suffix)
        for name, value in numbers.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()

    def _upload(self) -> None:
        self._uploaded = time.monotonic()
        self._workdir.mkdir(parents=True, exist_ok=True)
        self._file.write_text("".join(self._lines or []))
        if self._events_dir is not None:
            target = self._workdir / TENSORBOARD
            target.mkdir(parents=True, exist_ok=True)
            for file in epath.Path(self._events_dir).iterdir():
                (target / file.name).write_bytes(file.read_bytes())


def _step_of(line: str) -> float:
    """The step of a line; infinity for a line that is cut short."""
    if not line.endswith("\n"):
        return math.inf
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def progress_line(step: int, total: int, metrics: Mapping[str, Any]) -> str:
    """`step 120/2000  loss 2.314  lr 3.0e-4  12.3k tokens/s  MFU 41.2 %  memory 3.1/16.0 GiB  eta 0:12:31`.

    Each part is there if its metrics are: loss, learning_rate, tokens_per_second, mfu (a fraction), memory_in_use and
    memory_limit (bytes), seconds_per_step; and `skipped 2` if there were steps that are not finite.
    """
    parts = [f"step {step}/{total}"]
    if "loss" in metrics:
        parts.append(f"loss {float(metrics['loss']):.3f}")
    if "learning_rate" in metrics:
        parts.append("lr " + re.sub(r"e([+-])0*(\d)", r"e\1\2", f"{float(metrics['learning_rate']):.1e}").replace("e+", "e"))
    if "tokens_per_second" in metrics:
        parts.append(f"{_short(float(metrics['tokens_per_second']))} tokens/s")
    if metrics.get("mfu") is not None:
        parts.append(f"MFU {100 * float(metrics['mfu']):.1f} %")
    if metrics.get("memory_in_use") is not None:
        limit = f"/{metrics['memory_limit'] / 2**30:.1f}" if metrics.get("memory_limit") else ""
        parts.append(f"memory {metrics['memory_in_use'] / 2**30:.1f}{limit} GiB")
    if metrics.get("skipped"):
        parts.append(f"skipped {metrics['skipped']:.0f}")
    if "seconds_per_step" in metrics:
        seconds = round(float(metrics["seconds_per_step"]) * (total - step))
        parts.append(f"eta {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}")
    return "  ".join(parts)


def _short(x: float) -> str:
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= factor:
            return f"{x / factor:.3g}{letter}"
    return f"{x:.3g}"


def flops_per_token(config: ModelConfig, sequence_length: int, *, mtp: bool = False) -> float:
    """Model FLOPs of one trained token, forward and backward, without what rematerialisation does again.

    6 x the parameters that a token is multiplied with: all but the embedding table (a lookup; where it is tied it counts
    as the head), of the experts those that a token is routed to; plus, for each layer with full attention,
    12 x heads x head width x T / 2 (QK^T and PV over the causal half of T positions; packed documents need less); plus, for
    each Gated DeltaNet layer, 18 x value heads x key width x value width (S^T k, the update of S and S^T q, as the
    recurrence is written: chunked forms do more). `mtp`: the multi-token-prediction layer and its pass through the head
    too.
    """
    c = config
    counts = parameter_counts(c)
    table = c.vocab_size * c.hidden_size
    multiplied = counts["active"] - (0 if c.tie_word_embeddings else table)
    attention_layers = c.num_units
    if mtp and c.mtp_num_hidden_layers:
        idle = 3 * c.hidden_size * c.moe_intermediate_size * (c.num_experts - c.num_experts_per_tok)
        multiplied += counts["mtp"] - idle + table
        attention_layers += 1
    attention = 12 * c.num_attention_heads * c.head_dim * sequence_length / 2
    recurrence = 18 * c.linear_num_value_heads * c.linear_key_head_dim * c.linear_value_head_dim
    return 6.0 * multiplied + attention_layers * attention + (c.num_hidden_layers - c.num_units) * recurrence


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of one device of this kind; None where the table has none (CPUs among them)."""
    return PEAK_FLOPS.get(device_kind)


def mfu(tokens_per_second: float, flops: float, devices: list) -> float | None:
    """Model FLOPs (`flops` a token) over what the devices could do at their peak; None where that is not known."""
    peak = peak_flops(devices[0].device_kind)
    return None if peak is None else tokens_per_second * flops / (peak * len(devices))


def device_memory(devices: list | None = None) -> dict[str, int]:
    """Bytes of the fullest of this process's devices: memory_in_use, memory_peak, memory_limit; {} where they do not say."""
    stats = [s for d in devices or jax.local_devices() if (s := d.memory_stats())]
    names = {"memory_in_use": "bytes_in_use", "memory_peak": "peak_bytes_in_use", "memory_limit": "bytes_limit"}
    fullest = max(stats, key=lambda s: s.get("bytes_in_use", 0), default={})
    return {name: fullest[key] for name, key in names.items() if key in fullest}
