"""A run from its first batch to its last: what is evaluated, saved, recorded and exported on the way, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qwen35_jax.checkpoint import open_source
from qwen35_jax.errors import UserError
from qwen35_jax.train.loop import export, train
from tests.train.conftest import small_config


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def tensors(directory: Path) -> dict[str, np.ndarray]:
    source = open_source(str(directory))
    return {name: np.asarray(source.read(name)) for name in source.tensors}


def assert_same(a: Path, b: Path) -> None:
    a, b = tensors(a), tensors(b)
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_data_that_end_before_the_steps(chats, tmp_path, capsys):
    """One epoch: what is left is logged, evaluated, saved and exported; and an older checkpoint can be exported too."""
    data = {"data__train": (str(chats),), "data__eval": (str(chats),), "data__epochs": 1}
    config = small_config(**data, loss__mtp=0.0, steps=50, log_every=100, checkpoint__every=2)
    metrics = train(config, str(tmp_path / "run"), export_dir=str(tmp_path / "hf"))
    last = lines(tmp_path / "run")[-1]["step"]
    assert 2 < last < 50 and f"after 1 epochs, at step {last} of 50" in capsys.readouterr().err
    found = {name for line in lines(tmp_path / "run") if line["step"] == last for name in line}
    assert {"loss", "eval/loss"} <= found and np.isfinite(metrics["eval/loss"])
    assert (tmp_path / "run" / "checkpoints" / str(last)).is_dir()

    before = lines(tmp_path / "run")
    train(config, str(tmp_path / "run"))  # once more: nothing is left to do
    assert lines(tmp_path / "run") == before

    export(config, str(tmp_path / "run"), str(tmp_path / "again"), last)
    assert_same(tmp_path / "again", tmp_path / "hf")
    older = max(step for step in map(int, (p.name for p in (tmp_path / "run" / "checkpoints").glob("[0-9]*"))) if step < last)
    export(config, str(tmp_path / "run"), str(tmp_path / "older"), older)
    assert any(
        np.any(x != y) for x, y in zip(tensors(tmp_path / "older").values(), tensors(tmp_path / "hf").values(), strict=True)
    )
    with pytest.raises(UserError, match="no checkpoint of step 1 in"):
        export(config, str(tmp_path / "run"), str(tmp_path / "none"), 1)


def test_bad_lines_of_the_evaluation_lose_no_step(chats, tmp_path):
    evaluation = tmp_path / "eval.jsonl"
    evaluation.write_text(chats.read_text() + "{\n")
    config = small_config(data__train=(str(chats),), data__eval=(str(evaluation),), loss__mtp=0.0, steps=2)
    with pytest.raises(UserError, match="eval.jsonl:65: the line is not valid JSON"):
        train(config, str(tmp_path / "run"))
    evaluation.write_text(chats.read_text())
    train(config, str(tmp_path / "run"), export_dir=str(tmp_path / "hf"))  # nothing is left to do but to export
    assert (tmp_path / "hf" / "model.safetensors").is_file()


@pytest.mark.slow
def test_in_fp8_with_a_record_of_each_layer(chats, tmp_path):
    """Stopped and gone on with, it is bitwise the run that was not, and each record is there once."""
    changes = {"data__train": (str(chats),), "fp8__enabled": True, "fp8__monitor_every": 2, "log_every": 1, "loss__mtp": 0.0}
    for name, steps in (("whole", (4,)), ("cut", (2, 4))):
        for number in steps:
            config = small_config(**changes, steps=number, optimizer__schedule="constant")
            train(config, str(tmp_path / name), export_dir=str(tmp_path / f"{name}{number}"))
    assert_same(tmp_path / "whole4", tmp_path / "cut4")
    whole, cut = (
        [{k: v for k, v in line.items() if "second" not in k} for line in lines(tmp_path / name)] for name in ("whole", "cut")
    )
    assert whole == cut
    records = [line for line in whole if any(name.startswith("fp8/") for name in line)]
    assert [line["step"] for line in records] == [1, 3]
    assert any(name.endswith("mixer/out/product_error") for name in records[0])
    losses = [line["loss"] for line in whole if "loss" in line]
    assert losses[-1] < losses[0]
