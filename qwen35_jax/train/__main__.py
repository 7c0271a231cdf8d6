"""Command line of training. `python -m qwen35_jax.train --help`."""

from __future__ import annotations

from qwen35_jax import command

if __name__ == "__main__":
    command.quiet_interrupts()

import sys
from pathlib import Path

from absl import flags, logging
from ml_collections import config_flags

from qwen35_jax import hosts
from qwen35_jax.errors import UserError
from qwen35_jax.train.loop import Interrupted, export, train

USAGE = """
Trains a model: from random weights, or further from a checkpoint; all of it, parts of it, or with LoRA.

  python -m qwen35_jax.train --config configs/NAME.py --workdir DIR
  python -m qwen35_jax.train --config configs/NAME.py --workdir DIR --config.steps=100 --config.mesh=2x4 --export_hf OUT
  python -m qwen35_jax.train --config configs/finetune.py --workdir DIR --config.data.train="('a.jsonl', 'b.jsonl')"

The same command goes on from the newest checkpoint in DIR. With --export_hf OUT --export_step N it trains no further, but writes
what the checkpoint of step N holds. All fields of a configuration, with their defaults, are in qwen35_jax/train/config.py.
"""

CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config(); --config.FIELD=VALUE changes a field")
WORKDIR = flags.DEFINE_string("workdir", None, "directory for checkpoints and metrics; local or gs://")
EXPORT_HF = flags.DEFINE_string("export_hf", None, "write the trained model here as a Hugging Face directory; local or gs://")
EXPORT_STEP = flags.DEFINE_integer("export_step", None, "train no further: export the checkpoint of this step", lower_bound=0)
PROFILE = flags.DEFINE_string("profile", None, "write a jax.profiler trace of three steps to this directory")

hosts.declare_flags()


def main(arguments: list[str]) -> None:
    """Flags to one call."""
    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}; see --help")
    if not flags.FLAGS["config"].present:
        raise UserError("--config is missing; see --help")
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    if not Path(file.partition(":")[0]).is_file():
        raise UserError(f"--config: no such file: {file}")
    if WORKDIR.value is None:
        raise UserError("--workdir is missing; see --help")
    for flag in (WORKDIR, EXPORT_HF, PROFILE):
        if flag.value == "":
            raise UserError(f"--{flag.name} is empty: give a directory")
    if EXPORT_STEP.value is not None and (EXPORT_HF.value is None or PROFILE.value is not None):
        raise UserError("--export_step trains nothing, and exports one checkpoint: it needs --export_hf, and no --profile")
    logging.set_verbosity(logging.WARNING)
    with hosts.joined(CONFIG.value.mesh):
        try:
            if EXPORT_STEP.value is None:
                train(CONFIG.value, WORKDIR.value, export_dir=EXPORT_HF.value, profile_dir=PROFILE.value)
            else:
                export(CONFIG.value, WORKDIR.value, EXPORT_HF.value, EXPORT_STEP.value)
        except Interrupted as stop:
            print(f"stopped: {stop}", file=sys.stderr)
            raise SystemExit(128 + stop.number) from None


if __name__ == "__main__":
    command.run(main, USAGE)
