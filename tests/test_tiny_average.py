"""The average of checkpoints: its numbers, what is copied, and what is refused."""

from __future__ import annotations

import re
import sys

import ml_dtypes
import numpy as np
import pytest

from qwen35_jax.checkpoint.safetensors_file import SafetensorsFile, make_header, write_safetensors
from scripts import tiny_average


def checkpoint(directory, **tensors):
    directory.mkdir()
    (directory / "config.json").write_text(directory.name)
    header = make_header({name: (x.dtype, x.shape) for name, x in tensors.items()})
    write_safetensors(directory / tiny_average.WEIGHTS, header, tensors.values())
    return directory


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["tiny_average", *map(str, arguments)])
    tiny_average.main()


@pytest.fixture
def checkpoints(tmp_path):
    rng = np.random.default_rng(0)
    arrays = [{"a": rng.normal(size=(3, 5)).astype(ml_dtypes.bfloat16), "b": rng.normal(size=7).astype("f4")} for _ in range(3)]
    return [checkpoint(tmp_path / f"{i}", **tensors) for i, tensors in enumerate(arrays)], arrays


def test_the_average(checkpoints, tmp_path, monkeypatch):
    directories, arrays = checkpoints
    run(monkeypatch, *directories, "--shares", 0.5, 0.3, 0.2, "--out", tmp_path / "out")
    found = SafetensorsFile(tmp_path / "out" / tiny_average.WEIGHTS)
    for name in ("a", "b"):
        want = np.average([x[name].astype("f8") for x in arrays], axis=0, weights=(0.5, 0.3, 0.2))
        assert found.tensors[name].dtype == arrays[0][name].dtype
        np.testing.assert_allclose(found.read(name).astype("f8"), want, rtol=2**-8 if name == "a" else 1e-6, atol=1e-6)
    assert (tmp_path / "out" / "config.json").read_text() == "0"


def test_what_does_not_go_together(checkpoints, tmp_path, monkeypatch, capsys):
    (first, second, _), _ = checkpoints
    other = checkpoint(tmp_path / "other", a=np.zeros((3, 5), "f4"))
    (tmp_path / "empty").mkdir()
    quantised = checkpoint(tmp_path / "fp8", a=np.zeros((3, 5), ml_dtypes.float8_e4m3fn))
    cases = (
        ((first, second, "--shares", 0.5, "--out", tmp_path / "out"), "give one for each of the 2 directories, 1 in all"),
        ((first, second, "--shares", 0.5, 0.6, "--out", tmp_path / "out"), "1 in all"),
        ((first, second, "--shares", "nan", 0.6, "--out", tmp_path / "out"), "1 in all"),
        (
            (quantised, quantised, "--shares", 0.5, 0.5, "--out", tmp_path / "out"),
            "fp8: a is in FP8, .* average before quantising",
        ),
        ((first, tmp_path / "empty", "--shares", 0.5, 0.5, "--out", tmp_path / "out"), "empty has no model.safetensors"),
        ((first, other, "--shares", 0.5, 0.5, "--out", tmp_path / "out"), "differs from .*0 in 1 tensors, such as b"),
        ((first, second, "--shares", 0.5, 0.5, "--out", first), "exists already"),
    )
    for arguments, message in cases:
        with pytest.raises(SystemExit):
            run(monkeypatch, *arguments)
        assert re.search(message, capsys.readouterr().err), message
    assert not (tmp_path / "out").exists()
