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
    for part in module.get("PARTS", [""]):
        config = module["get_config"](*filter(None, [part]))
        name = f"{path.name}:{part}" if part else path.name
        assert f"python -m qwen35_jax.train --config configs/{name} --workdir" in module["__doc__"]
        own = {path for path in flatten(config.to_dict()) if not path.startswith(("model/changes/", "model/vision/"))}
        assert own == set(flatten(default_config().to_dict()))
        config.data.train = config.data.train or ("mine.jsonl",)
        check_config(config)


def test_a_part_that_there_is_not():
    (path,) = (path for path in CONFIGS if path.stem == "tiny_vision")
    with pytest.raises(ValueError, match="tiny_vision.py:whole: the parts are places, pictures, mixture, text, towns"):
        runpy.run_path(str(path))["get_config"]("whole")
