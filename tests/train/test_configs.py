"""The runs in configs/: they load, make sense, and say how they are started."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from qwen35_jax.errors import UserError
from qwen35_jax.train.config import check_config, default_config
from qwen35_jax.train.partition import flatten

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("[!_]*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config(path):
    module = runpy.run_path(str(path))
    for part in module.get("PARTS", [""]):
        config = module["get_config"](*filter(None, [part]))
        name = f"{path.name}:{part}" if part else path.name
        assert f"python -m qwen35_jax.train --config configs/{name} --workdir" in module["__doc__"]
        own = {path for path in flatten(config.to_dict()) if not path.startswith(("model/changes/", "model/vision/"))}
        assert own == set(flatten(default_config().to_dict()))
        config.data.train = config.data.train or ("mine.jsonl",)
        check_config(config)


IDLE = [
    ({"eval_every": 10}, "config.eval_every asks for evaluations: name files in config.data.eval"),
    ({"optimizer.muon_b1": 0.9}, "config.optimizer.muon_b1 does nothing with config.optimizer.name 'adamw': leave it out"),
    ({"optimizer.muon_learning_rate": 1e-3}, "muon_learning_rate does nothing .* set name to muon"),
    ({"optimizer.decay_fraction": 0.5}, "decay_fraction does nothing with config.optimizer.schedule 'cosine': .* to wsd"),
    ({"optimizer.final_fraction": 0.0, "optimizer.schedule": "constant"}, "final_fraction does nothing .* to cosine or wsd"),
]
USED = [
    {"eval_every": 10, "data.eval": ("mine.jsonl",)},
    {"optimizer.name": "muon", "optimizer.muon_b1": 0.9, "optimizer.muon_learning_rate": 1e-3},
    {"optimizer.schedule": "wsd", "optimizer.decay_fraction": 0.5, "optimizer.final_fraction": 0.0},
    {"optimizer.final_fraction": 0.0},
]


def changed(fields: dict) -> ConfigDict:
    c = default_config()
    c.update_from_flattened_dict(fields | {"data.train": ("mine.jsonl",)})
    return c


@pytest.mark.parametrize(("fields", "message"), IDLE, ids=lambda x: "")
def test_fields_that_would_do_nothing(fields, message):
    with pytest.raises(UserError, match=message) as error:
        check_config(changed(fields))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fields", USED, ids=lambda x: "")
def test_fields_that_do_something(fields):
    check_config(changed(fields))


def test_a_part_that_there_is_not():
    (path,) = (path for path in CONFIGS if path.stem == "tiny_vision")
    with pytest.raises(ValueError, match="tiny_vision.py:whole: the parts are places, pictures, mixture, text, towns"):
        runpy.run_path(str(path))["get_config"]("whole")
