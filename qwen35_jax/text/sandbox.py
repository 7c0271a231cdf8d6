"""The jinja2 sandbox in which chat templates run. They come with a checkpoint, so they are untrusted code."""

import datetime
import json
from typing import Any

import jinja2
from jinja2 import ext, nodes, sandbox, utils
from jinja2.parser import Parser


def make_environment() -> sandbox.ImmutableSandboxedEnvironment:
    """An environment with the settings, filters and functions that Hugging Face chat templates are written for."""
    environment = _StrictSandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _make_dict
    environment.globals["namespace"] = _Namespace
    return environment


class _StrictSandbox(sandbox.ImmutableSandboxedEnvironment):
    """Refuses a forbidden attribute at once; jinja2's own sandbox yields an undefined value and waits for its use."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise jinja2.exceptions.SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is not allowed")


class _Namespace(utils.Namespace):
    """`namespace()` without names that begin with an underscore, which are the interpreter's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no named self, so that `namespace(self=…)` works
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _refuse_underscore(name)
        utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


class _GenerationTag(ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text in some templates; it changes nothing here."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace attribute may not begin with an underscore: {name!r}")


def _make_dict(*args: Any, **kwargs: Any) -> dict:
    # A function instead of the type itself: the type would hand out its own attributes.
    return dict(*args, **kwargs)


def _raise_exception(message: Any) -> None:
    raise jinja2.exceptions.TemplateError(str(message))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja2's own filter escapes HTML characters, which the models never saw.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
