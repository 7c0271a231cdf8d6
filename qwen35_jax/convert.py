"""Command line: Hugging Face checkpoints to Orbax and back, and to FP8. `python -m qwen35_jax.convert --help`."""

from __future__ import annotations

from qwen35_jax import command

if __name__ == "__main__":
    command.quiet_interrupts()

import sys

import jax
from absl import flags, logging

from qwen35_jax.checkpoint.conversion import FORMS, QUANTISATIONS, convert
from qwen35_jax.errors import UserError

USAGE = """
Converts a checkpoint between Hugging Face safetensors and Orbax, without changing a bit; or quantises it to FP8.

  python -m qwen35_jax.convert SRC DST                  SRC is a Hugging Face directory or hub id
  python -m qwen35_jax.convert SRC DST --to hf          SRC is a directory made by the line above
  python -m qwen35_jax.convert SRC DST --quantize fp8   SRC is any of these in BF16; DST is a Hugging Face directory as the
                                                        published FP8 ones: 128x128 blocks, for sample --keep_fp8

DST (local or gs://) must not exist; it appears when it is complete. After an interruption run the same line again.
"""

TO = flags.DEFINE_enum("to", None, FORMS, "what DST will be: orbax (default): Orbax arrays; hf: the files of the original")
QUANTIZE = flags.DEFINE_enum("quantize", None, QUANTISATIONS, "fp8: DST holds the linear layers in FP8, in Hugging Face's form")
REVISION = flags.DEFINE_string("revision", None, "revision of a hub id")


def _unraisable(report: sys.UnraisableHookArgs) -> None:
    """After a failed save, the other writes under way report to an event loop that is gone: that says nothing."""
    if not isinstance(report.exc_value, RuntimeError):
        sys.__unraisablehook__(report)


def main(arguments: list[str]) -> None:
    if len(arguments) != 2:
        raise UserError(f"expected SRC and DST, got {len(arguments)} arguments; see --help")
    for name, text in (("SRC", arguments[0]), ("DST", arguments[1]), ("--revision", REVISION.value)):
        if text == "":
            raise UserError(f"{name} is empty; see --help")
    jax.config.update("jax_platforms", "cpu")  # Orbax asks JAX for its devices; files need no accelerator
    logging.set_verbosity(logging.FATAL)  # Orbax warns that there is no OCDBT to merge, and logs errors that it raises too
    sys.unraisablehook = _unraisable
    convert(*arguments, TO.value, quantize=QUANTIZE.value, revision=REVISION.value)


if __name__ == "__main__":
    command.run(main, USAGE)
