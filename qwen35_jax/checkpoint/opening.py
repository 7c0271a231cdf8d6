"""From what a user writes (a directory, a gs:// address, a hub id) to a source of tensors."""

from __future__ import annotations

import re

from etils import epath

from qwen35_jax.checkpoint.orbax_source import OrbaxSource
from qwen35_jax.checkpoint.safetensors_file import is_local
from qwen35_jax.checkpoint.source import PARTIAL, RECORD, HuggingFaceSource, check_directory, download
from qwen35_jax.errors import UserError, reachable

ORBAX_MARKS = ("_CHECKPOINT_METADATA", "orbax.checkpoint")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def open_source(path_or_id: str, revision: str | None = None) -> HuggingFaceSource | OrbaxSource:
    """Opens a checkpoint: reads its configuration and headers, and no weights.

    Args:
        path_or_id: a directory with safetensors or one that `convert` made (local or gs://), or a hub id such as
            `Qwen/Qwen3.5-4B`, which huggingface_hub downloads into its cache.
        revision: branch, tag or commit of a hub id.

    Raises UserError, in one line, for whatever is not there, damaged or not what it says.
    """
    path = epath.Path(path_or_id)
    if not check_directory(path):
        if not HUB_ID.fullmatch(path_or_id):
            raise UserError(f"no such directory: {path_or_id}")
        path = download(path_or_id, revision)
    elif revision is not None:
        raise UserError(f"a revision belongs to a hub id, but {path_or_id} is a directory")
    with reachable(path):
        return _open(path)


def _open(path: epath.Path) -> HuggingFaceSource | OrbaxSource:
    if not is_local(path) and (path.parent / (path.name + PARTIAL)).exists():
        raise UserError(f"{path} is an unfinished conversion: run the conversion again")
    names = {p.name for p in path.iterdir()}
    if not names:
        raise UserError(f"{path} is empty: expected config.json and safetensors, or a converted checkpoint")
    if RECORD in names and names & set(ORBAX_MARKS):
        return OrbaxSource(path)
    if names & set(ORBAX_MARKS):
        raise UserError(f"{path} is an Orbax checkpoint without {RECORD}, so no conversion made it: give the original directory")
    return HuggingFaceSource(path)
