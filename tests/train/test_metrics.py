"""Metrics: files that stay those of one run, a line to watch, and FLOPs that follow from the shapes."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from tensorboardX.proto.event_pb2 import Event

from qwen35_jax.config import ModelConfig
from qwen35_jax.errors import UserError
from qwen35_jax.model.decoder import parameter_counts
from qwen35_jax.train import metrics as module
from qwen35_jax.train.metrics import (
    MetricsWriter,
    device_memory,
    flops_per_token,
    mfu,
    peak_flops,
    progress_line,
)


def _lines(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def _scalars(directory) -> list[tuple[int, str, float]]:
    found = []
    for file in sorted((directory / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            data = data[16 + size :]
    return found


def test_one_line_a_write_and_tensorboard(tmp_path):
    writer = MetricsWriter(tmp_path / "run")
    writer.write(1, {"loss": jnp.float32(2.5), "learning_rate": 1e-3})
    assert _lines(tmp_path / "run") == [{"step": 1, "loss": 2.5, "learning_rate": 1e-3}]  # at once
    writer.write(2, {"loss": float("nan"), "eval/loss": 1})
    writer.close()
    assert _lines(tmp_path / "run")[1] == {"step": 2, "loss": None, "eval/loss": 1.0}
    assert [s[:2] for s in _scalars(tmp_path / "run")] == [(1, "loss"), (1, "learning_rate"), (2, "loss"), (2, "eval/loss")]


@pytest.mark.parametrize("local", [True, False])
def test_a_run_that_goes_on(tmp_path, monkeypatch, local):
    monkeypatch.setattr(module, "is_local", lambda path: local)
    first = MetricsWriter(tmp_path)
    first.truncate(0)  # nothing there yet
    for step in range(1, 6):
        first.write(step, {"loss": step})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 6, "lo')  # killed while it wrote
    second = MetricsWriter(tmp_path)
    second.truncate(3)
    second.write(4, {"loss": 40})
    second.close()
    assert _lines(tmp_path) == [{"step": s, "loss": float(v)} for s, v in ((1, 1), (2, 2), (3, 3), (4, 40))]
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "tensorboard"}
    assert {(s, v) for s, tag, v in _scalars(tmp_path) if tag == "loss"} >= {(3, 3.0), (4, 40.0)}


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not write metrics in .*file"):
        MetricsWriter(tmp_path / "file").write(1, {"loss": 1})


def test_remote_files_are_written_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "is_local", lambda path: False)
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    writer = MetricsWriter(tmp_path)
    for step, wait in ((1, 0), (2, 10), (3, 10), (4, 11), (5, 1)):
        now[0] += wait
        writer.write(step, {"loss": step})
        assert len(_lines(tmp_path)) == (1 if step < 4 else 4)
    writer.close()
    assert len(_lines(tmp_path)) == 5


def test_other_processes_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    writer = MetricsWriter(tmp_path)
    writer.truncate(0)
    writer.write(1, {"loss": 1})
    writer.report(1, 2, {})
    writer.close()
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_progress_line(tmp_path, capsys):
    metrics = {"loss": 2.3141, "learning_rate": 3e-4, "tokens_per_second": 12345.0, "mfu": 0.4123, "seconds_per_step": 0.4}
    metrics |= {"memory_in_use": 3.1 * 2**30, "memory_limit": 16 * 2**30}
    want = "step 120/2000  loss 2.314  lr 3.0e-4  12.3k tokens/s  MFU 41.2 %  memory 3.1/16.0 GiB  eta 0:12:32"
    assert progress_line(120, 2000, metrics) == want
    assert progress_line(1, 9, {}) == "step 1/9"
    assert (
        progress_line(1, 9, {"mfu": None, "learning_rate": 0.0, "tokens_per_second": 1.5e6})
        == "step 1/9  lr 0.0e0  1.5M tokens/s"
    )
    MetricsWriter(tmp_path).report(1, 9, {})
    assert capsys.readouterr().out == "step 1/9\n"


def test_flops_of_a_token():
    """Against products counted one by one for the smallest and a sparse model."""
    for name in ("0.8b", "27b", "35b-a3b"):
        c = ModelConfig.preset(name)
        d, h, length = c.hidden_size, c.head_dim, 4096
        key, value = c.linear_num_key_heads * c.linear_key_head_dim, c.linear_num_value_heads * c.linear_value_head_dim
        delta = d * (2 * key + 2 * value + 2 * c.linear_num_value_heads) + value * d + 4 * (2 * key + value)
        attention = d * h * (2 * c.num_attention_heads + 2 * c.num_key_value_heads) + c.num_attention_heads * h * d
        mlp = 3 * d * (c.intermediate_size or c.num_experts_per_tok * c.moe_intermediate_size + c.shared_expert_intermediate_size)
        mlp += d * c.num_experts
        n = c.num_hidden_layers
        matrices = n * mlp + n * 3 / 4 * delta + n / 4 * attention + c.vocab_size * d
        scores = n / 4 * 2 * c.num_attention_heads * h * (length / 2)  # multiplications of QK^T and PV
        state = n * 3 / 4 * 3 * c.linear_num_value_heads * c.linear_key_head_dim * c.linear_value_head_dim
        assert flops_per_token(c, length) == pytest.approx(6 * (matrices + scores + state), rel=2e-4)
        draft = 6 * (2 * d * d + attention + mlp + c.vocab_size * d) + 12 * c.num_attention_heads * h * length / 2
        assert flops_per_token(c, length, mtp=True) - flops_per_token(c, length) == pytest.approx(draft, rel=2e-4)


def test_flops_grow_with_what_is_active():
    for name in ("tiny", "9b"):
        c = ModelConfig.preset(name)
        assert flops_per_token(c, 128) > 6 * (parameter_counts(c)["active"] - c.vocab_size * c.hidden_size)
    assert flops_per_token(ModelConfig.preset("35b-a3b"), 1) < flops_per_token(ModelConfig.preset("27b"), 1) / 5


def test_peak_is_never_invented():
    assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("TPU7x") == 1153.5e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and peak_flops("NVIDIA H100 PCIe") is None
    assert peak_flops("cpu") is None and mfu(1e3, 1e9, jax.devices()) is None
    devices = [SimpleNamespace(device_kind="TPU v6 lite")] * 4
    assert mfu(1e4, 1e9, devices) == pytest.approx(1e13 / (4 * 918e12))
    assert not re.search("MFU", progress_line(1, 2, {"mfu": mfu(1e3, 1e9, jax.devices())}))


def test_device_memory():
    assert device_memory() == {}  # CPU devices do not say
    stats = [{"bytes_in_use": n, "bytes_limit": 9, "peak_bytes_in_use": n + 1, "other": 0} for n in (3, 5)]
    devices = [SimpleNamespace(memory_stats=lambda s=s: s) for s in stats]
    assert device_memory(devices) == {"memory_in_use": 5, "memory_peak": 6, "memory_limit": 9}
