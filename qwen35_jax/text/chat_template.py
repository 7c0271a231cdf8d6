"""Chat messages to prompt text, by the checkpoint's own jinja template or by ours."""

import importlib.resources
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from etils import epath

from qwen35_jax.errors import UserError
from qwen35_jax.text import files, sandbox
from qwen35_jax.text.messages import normalise_messages, normalise_tools, plain
from qwen35_jax.text.tokenizer import special_token_names


class ChatTemplate:
    """A compiled chat template. Make one with `from_directory` or `built_in`."""

    def __init__(self, default: str, tool_use: str | None = None, *, source: str, variables: Mapping[str, Any] | None = None):
        """Compile the template texts; `source` names them in errors, `variables` are visible to every rendering.

        `tool_use`, if given, takes the place of `default` where tools are passed. Raises UserError for bad syntax.
        """
        self.source = source
        self._variables = dict(variables or {})
        environment = sandbox.make_environment()
        self._default = _compile(environment, default, source)
        self._tool_use = self._default if tool_use is None else _compile(environment, tool_use, f"{source} (tool_use)")

    @classmethod
    def from_directory(cls, directory: epath.PathLike, *, thinking_by_default: bool = True) -> "ChatTemplate":
        """The template of a checkpoint directory.

        Looked for in chat_template.jinja, chat_template.json, then `chat_template` of tokenizer_config.json; where
        there is none, ours is taken, and `thinking_by_default` chooses its flavour (True for 4B and larger, False for
        0.8B and 2B). Raises UserError, naming the file, if what is there cannot be used.
        """
        names = special_token_names(directory) or {}
        text = files.read_text(directory, "chat_template.jinja")
        if text is not None:
            return cls(text, source=str(epath.Path(directory) / "chat_template.jinja"), variables=names)
        for name in ("chat_template.json", "tokenizer_config.json"):
            config = files.read_json_object(directory, name)
            if config is not None and config.get("chat_template") is not None:
                source = str(epath.Path(directory) / name)
                default, tool_use = _named_templates(config["chat_template"], source)
                return cls(default, tool_use, source=source, variables=names)
        return cls.built_in(thinking_by_default)

    @classmethod
    def built_in(cls, thinking_by_default: bool) -> "ChatTemplate":
        """Our own template of Qwen3.5's chat format."""
        return cls(built_in_template(thinking_by_default), source="the built-in Qwen3.5 template")

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
        **extra: Any,
    ) -> str:
        """The prompt for `messages` (see `normalise_messages` for their form).

        `enable_thinking` None leaves the choice to the template. `extra` goes to the template as it is (for instance
        `add_vision_id`, `preserve_thinking`). Raises UserError for messages that are malformed or that the template
        refuses, and for a template that fails or reaches outside its sandbox.
        """
        variables = {"documents": None, **self._variables}
        if enable_thinking is not None:
            variables["enable_thinking"] = bool(enable_thinking)
        try:
            variables.update(plain(extra))
            variables["messages"] = normalise_messages(messages)
            variables["tools"] = normalise_tools(tools)
        except RecursionError as error:
            raise UserError("the chat messages or tools are nested too deeply") from error
        template = self._default if variables["tools"] is None else self._tool_use
        return self._run(template, variables | {"add_generation_prompt": add_generation_prompt})

    def _run(self, template: jinja2.Template, variables: dict[str, Any]) -> str:
        try:
            return template.render(variables)
        except jinja2.exceptions.SecurityError as error:
            raise UserError(f"chat template {self.source} tries to leave its sandbox: {files.one_line(error)}") from error
        except jinja2.exceptions.TemplateError as error:
            raise UserError(f"chat template {self.source}: {files.one_line(error)}") from error
        except Exception as error:  # a template is a program of somebody else: it can raise anything
            kind = type(error).__name__
            raise UserError(f"chat template {self.source} failed with {kind}: {files.one_line(error)}") from error


def built_in_template(thinking_by_default: bool) -> str:
    """The text of our own template, complete, in one of its two flavours."""
    body = importlib.resources.files("qwen35_jax.text").joinpath("chat_template.jinja").read_text(encoding="utf-8")
    flavour = "true" if thinking_by_default else "false"
    return f"{{%- set thinking_by_default = {flavour} %}}\n{body}"


def _compile(environment: jinja2.Environment, text: str, source: str) -> jinja2.Template:
    try:
        return environment.from_string(text)
    except jinja2.exceptions.TemplateSyntaxError as error:
        message = files.one_line(error.message or error)
        raise UserError(f"chat template {source} has a syntax error in line {error.lineno}: {message}") from error
    except Exception as error:  # whatever else a hostile text makes the compiler raise, such as RecursionError
        kind = type(error).__name__
        raise UserError(f"chat template {source} cannot be compiled: {kind}: {files.one_line(error)}") from error


def _named_templates(value: Any, source: str) -> tuple[str, str | None]:
    """(default, tool_use) from a `chat_template` entry: one text, or a list of {"name", "template"}."""
    if isinstance(value, str):
        return value, None
    entries = value if isinstance(value, list) else [value]
    if not all(isinstance(e, dict) and isinstance(e.get("name"), str) and isinstance(e.get("template"), str) for e in entries):
        raise UserError(f"{source}: chat_template must be a text or a list of objects with a name and a template")
    named = {entry["name"]: entry["template"] for entry in entries}
    if "default" not in named:
        raise UserError(f"{source}: none of the chat templates is named 'default' (there are: {', '.join(named) or 'none'})")
    return named["default"], named.get("tool_use")
