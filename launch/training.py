"""What is checked of a training run before a machine is asked for: its configuration, without any of JAX's devices.

What must be looked up elsewhere, such as the checkpoint and the data, the run itself checks when it starts.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict, config_flags

from launch.words import flag
from qwen35_jax import command
from qwen35_jax.config import PRESETS, ModelConfig
from qwen35_jax.errors import UserError
from qwen35_jax.sharding import MESH_AXES, Sharding, check_mesh, parse_mesh
from qwen35_jax.train.config import check_config, check_cuts


def training_config(arguments: tuple[str, ...]) -> ConfigDict:
    """The configuration that `train` reads from these flags. UserError where it does not load, or train would refuse it."""
    if not flag(arguments, "config"):
        raise UserError("--config is missing: give a file of configs/ or your own")
    file = flag(arguments, "config").partition(":")[0]
    if not Path(file).is_file():
        raise UserError(f"--config: no such file: {file}")
    words, values = ["train", *arguments], flags.FlagValues()
    found = config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=words)
    command.parsed(values, words, known_only=True)
    try:
        check_config(found.value)
        check_mesh_of(found.value)
    except (AttributeError, KeyError, TypeError) as error:  # what get_config() gave is no configuration of ours
        reason = " ".join(str(error).split())
        raise UserError(f"--config {file}: {reason}; start from default_config(), as configs/finetune.py does") from error
    return found.value


def check_mesh_of(c: ConfigDict) -> None:
    """UserError where the mesh does not cut a preset, the batch or the sequences."""
    sharding = Sharding(AbstractMesh(parse_mesh(c.mesh), MESH_AXES), c.context_parallel)
    if c.model.source in PRESETS and not c.model.changes:
        check_mesh(ModelConfig.preset(c.model.source), sharding)
    check_cuts(c, sharding)
