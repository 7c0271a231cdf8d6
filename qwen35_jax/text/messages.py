"""Chat messages: checked, and brought into the one form that templates expect."""

import json
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qwen35_jax.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")


def normalise_messages(messages: Any) -> list[dict[str, Any]]:
    """Check chat messages and return them as plain JSON values, ready for a template.

    A message is a mapping with a `role`, a `content` (string, or list of parts such as {"type": "text", "text": …} and
    {"type": "image", …}; may be absent for the assistant), and for the assistant optionally `reasoning_content` (or
    `reasoning`, `thinking`) and `tool_calls`, whose arguments are a mapping or, as OpenAI has it, a JSON string of one.
    Keys with the value None count as absent; other keys are passed on. Raises UserError saying which message is wrong.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise UserError(f"a chat is a list of messages like {{'role': 'user', 'content': '…'}}, not {_kind(messages)}")
    if not messages:
        raise UserError("a chat needs at least one message, but the list is empty")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def normalise_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Check tool descriptions (a list of JSON objects) and return them as plain JSON values; None and [] give None."""
    if tools is None:
        return None
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise UserError(f"tools must be a list of JSON objects, not {_kind(tools)}")
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise UserError(f"tools[{i}] must be a JSON object, not {_kind(tool)}")
    return plain(list(tools)) or None


def plain(value: Any) -> Any:
    """`value` rebuilt from plain JSON types; anything else (an image, an array) becomes a string naming its type.

    A template thus never gets hold of an object whose methods could do something.
    """
    if value is None:
        return None
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return f"<{type(value).__name__}>"


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UserError(f"{where} must be an object with role and content, not {_kind(message)}")
    result = {str(key): plain(value) for key, value in message.items() if value is not None}
    role = result.get("role")
    if role not in ROLES:
        raise UserError(f"{where}: role {role!r} is not one of {', '.join(ROLES)}")
    if "content" in result:
        _check_content(result["content"], f"{where}.content")
    elif role != "assistant":
        raise UserError(f"{where}: a {role} message needs content")
    if role == "assistant":
        _take_reasoning(result, where)
        if "tool_calls" in result:
            result["tool_calls"] = _tool_calls(result["tool_calls"], f"{where}.tool_calls")
    return result


def _check_content(content: Any, where: str) -> None:
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        raise UserError(f"{where} must be a string or a list of parts, not {_kind(content)}")
    for i, part in enumerate(content):
        if not isinstance(part, dict):
            raise UserError(f"{where}[{i}] must be an object like {{'type': 'text', 'text': '…'}}, not {_kind(part)}")
        if part.get("type") == "text" and not isinstance(part.get("text"), str):
            raise UserError(f"{where}[{i}]: a text part needs a string under 'text', not {_kind(part.get('text'))}")


def _take_reasoning(message: dict[str, Any], where: str) -> None:
    """Templates read `reasoning_content`; servers also send it as `reasoning` or `thinking`."""
    name = next((name for name in REASONING_NAMES if name in message), None)
    if name is None:
        return
    if not isinstance(message[name], str):
        raise UserError(f"{where}.{name} must be a string, not {_kind(message[name])}")
    message["reasoning_content"] = message[name]


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise UserError(f"{where} must be a list, not {_kind(calls)}")
    return [_tool_call(call, f"{where}[{i}]") for i, call in enumerate(calls)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """One call, either {"function": {"name", "arguments"}, …} or {"name", "arguments"}, with parsed arguments."""
    if not isinstance(call, dict):
        raise UserError(f"{where} must be an object, not {_kind(call)}")
    if "function" in call:
        return {**call, "function": _function(call["function"], f"{where}.function")}
    return _function(call, where)


def _function(function: Any, where: str) -> dict[str, Any]:
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{where} must be an object with a string under 'name'")
    if "arguments" not in function:
        return function
    arguments = function["arguments"]
    if isinstance(arguments, str):
        try:
            # Servers send "" for a call without arguments.
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}.arguments is a string that is not JSON: {error}") from error
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise UserError(f"{where}.arguments must be an object or a JSON string of one, not {_kind(arguments)}")
    return {**function, "arguments": arguments}


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
