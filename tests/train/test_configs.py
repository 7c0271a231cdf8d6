"""The runs in configs/: they load, make sense, and say how they are started."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from qwen35_jax.train.config import check_config, default_config
from qwen35_jax.train.partition import flatten

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("[!_]*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config(path):
    module = runpy.run_path(str(path))
    config = module["get_config"]()
    assert f"python -m qwen35_jax.train --config configs/{path.name} --workdir" in module["__doc__"]
    own = {path for path in flatten(config.to_dict()) if not path.startswith(("model/changes/", "model/vision/"))}
    assert own == set(flatten(default_config().to_dict()))
    config.data.train = config.data.train or ("mine.jsonl",)
    check_config(config)
