"""A file of prompts: plain text, one a line, or JSON lines."""

import json
from typing import Any, NamedTuple

from etils import epath

from qwen35_jax.errors import UserError
from qwen35_jax.text.files import one_line
from qwen35_jax.text.messages import normalise_messages


class FilePrompt(NamedTuple):
    """A prompt and its place, such as "x.jsonl line 3", counted from 1; "" for one of no file. tools: those of a chat, as
    OpenAI has them."""

    where: str
    prompt: str | list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


def read_prompts(path: epath.PathLike) -> list[FilePrompt]:
    """Those of each line that is not blank.

    A line of a .jsonl file is {"prompt": text} or {"messages": chat}, this perhaps with {"tools": […]}, as in training data;
    other keys are not looked at. A line of any other file is a prompt itself. Raises UserError that names the line for what is
    neither, and if there is no prompt at all.
    """
    path = epath.Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from error
    # Only line feeds end a line: JSON strings may hold U+2028 and others that str.splitlines cuts at.
    lines = [(f"{path} line {number}", line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1)]
    lines = [(where, line) for where, line in lines if line.strip()]
    if not lines:
        raise UserError(f"{path} holds no prompts")
    return [_prompt(line, where) if path.suffix == ".jsonl" else FilePrompt(where, line) for where, line in lines]


def _prompt(line: str, where: str) -> FilePrompt:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {one_line(error)}") from error
    if not isinstance(item, dict) or ("prompt" in item) == ("messages" in item):
        raise UserError(f'{where} must be an object with either "prompt" (text) or "messages" (a list)')
    if "prompt" not in item:
        return FilePrompt(where, _chat(item["messages"], where), _tools(item.get("tools"), where))
    if not isinstance(item["prompt"], str):
        raise UserError(f'{where}: "prompt" is a {type(item["prompt"]).__name__}, but text is expected')
    if not item["prompt"].strip():
        raise UserError(f"{where}: the prompt is empty")
    if item.get("tools"):
        raise UserError(f'{where}: "tools" go with "messages", not with "prompt"')
    return FilePrompt(where, item["prompt"])


def _tools(tools: Any, where: str) -> list[dict[str, Any]] | None:
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UserError(f'{where}: "tools" must be a list of objects')
    return tools or None


def _chat(messages: Any, where: str) -> list[dict[str, Any]]:
    try:
        normalise_messages(messages)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except RecursionError as error:
        raise UserError(f"{where}: the messages are nested too deeply") from error
    return messages
