"""Reading the small text files of a checkpoint directory, local or remote."""

import json
from typing import Any

from etils import epath

from qwen35_jax.errors import UserError


def read_text(directory: epath.PathLike, name: str) -> str | None:
    """The UTF-8 text of `directory/name`, or None if there is no such file.

    Bytes are read through etils.epath, so `gs://` directories work. Raises UserError if the text is not UTF-8.
    """
    path = epath.Path(directory) / name
    if not path.exists():
        return None
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); download the file again") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def read_json_object(directory: epath.PathLike, name: str) -> dict[str, Any] | None:
    """The JSON object in `directory/name`, or None if there is no such file. Raises UserError if it is not one."""
    text = read_text(directory, name)
    if text is None:
        return None
    path = epath.Path(directory) / name
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, but an object is expected")
    return value


def one_line(error: BaseException | str) -> str:
    """The message of an error on one line, whatever it contains."""
    return " ".join(str(error).split()) or type(error).__name__
