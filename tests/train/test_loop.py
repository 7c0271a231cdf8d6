"""A run from its first batch to its last: what is evaluated, saved, recorded and exported on the way, in this process."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from qwen35_jax.checkpoint import open_source
from qwen35_jax.errors import UserError
from qwen35_jax.train.data import TrainData
from qwen35_jax.train.loop import Interrupted, export, train
from tests.train.conftest import SMALL, small_config


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def saved_metrics(workdir: Path, step: int) -> dict:
    return json.loads((workdir / "checkpoints" / str(step) / "metrics" / "metrics").read_text())


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
    config = small_config(**data, loss__mtp=0.0, steps=50, log_every=100, checkpoint__every=2, accumulate=2)
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


def test_told_to_stop_while_it_evaluates(chats, tmp_path, monkeypatch):
    """The evaluation is left at its next batch; steps behind the last log line are in the metrics, and in the checkpoint."""
    drawn, draw = [], TrainData.__next__

    def told(data: TrainData) -> dict:
        if data.get_state()["shuffle_seed"] is None:  # the evaluation's
            drawn.append(len(drawn))
            if len(drawn) == 1:
                signal.raise_signal(signal.SIGTERM)
        return draw(data)

    monkeypatch.setattr(TrainData, "__next__", told)
    chats.write_text("{\n" + chats.read_text())
    data = {"data__train": (str(chats),), "data__eval": (str(chats),), "data__bad_lines": "skip"}
    config = small_config(**data, loss__mtp=0.0, steps=4, eval_every=2, log_every=100)
    with pytest.raises(Interrupted, match="SIGTERM after step 2"):
        train(config, str(tmp_path / "run"))
    assert drawn == [0]
    (line,) = lines(tmp_path / "run")
    assert line["step"] == 2 and line["loss"] > 0
    assert saved_metrics(tmp_path / "run", 2)["loss"] == line["loss"]
    assert f"{chats}:1: the line is not valid JSON" in (tmp_path / "run" / "bad_lines.txt").read_text()


BAD = 11  # of the lines one that the first batches do not read


@pytest.mark.slow
def test_a_bad_line_costs_no_step(chats, tmp_path):
    """What was trained before it is saved and logged; once it is right, the run ends as one that never met it."""
    good = chats.read_text()
    config = small_config(data__train=(str(chats),), loss__mtp=0.0, steps=4, log_every=100)
    train(config, str(tmp_path / "whole"), export_dir=str(tmp_path / "whole_hf"))
    chats.write_text("".join("{\n" if i == BAD else line for i, line in enumerate(good.splitlines(keepends=True))))
    with pytest.raises(UserError, match=f"chats.jsonl:{BAD + 1}: the line is not valid JSON"):
        train(config, str(tmp_path / "cut"))
    (line,) = lines(tmp_path / "cut")
    assert 0 < line["step"] < 4 and saved_metrics(tmp_path / "cut", line["step"])["loss"] == line["loss"]
    chats.write_text(good)
    train(config, str(tmp_path / "cut"), export_dir=str(tmp_path / "cut_hf"))
    assert_same(tmp_path / "cut_hf", tmp_path / "whole_hf")


@pytest.mark.slow
def test_in_fp8_with_a_record_of_each_layer(chats, tmp_path):
    """Stopped and gone on with, it is bitwise the run that was not, and each record is there once."""
    changes = {"data__train": (str(chats),), "fp8__enabled": True, "fp8__monitor_every": 2, "log_every": 1, "loss__mtp": 0.0}
    changes |= {"model__changes": SMALL | {"num_hidden_layers": 4}}  # two units
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
    for layer in ("units/0/layers/1/mixer/out", "units/1/layers/1/mixer/out"):
        assert 0 < records[0][f"fp8/{layer}/product_error"] < 0.1
    losses = [line["loss"] for line in whole if "loss" in line]
    assert losses[-1] < losses[0]
