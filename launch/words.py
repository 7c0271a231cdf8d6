"""Reading the words of a command line: one flag, or what is no flag."""

from __future__ import annotations

import itertools
from collections.abc import Iterator


def flag(arguments: tuple[str, ...], name: str) -> str:
    """The value of the last --name=VALUE or --name VALUE; empty if there is none."""
    value = ""
    for word, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        for dashes in ("--", "-"):
            if word == f"{dashes}{name}":
                value = following
            elif word.startswith(f"{dashes}{name}="):
                value = word.partition("=")[2]
    return value


def positional(arguments: tuple[str, ...]) -> list[str]:
    """The words that are neither flags nor their values, of a command whose flags all have one."""
    return list(_positional(iter(arguments)))


def _positional(words: Iterator[str]) -> Iterator[str]:
    for word in words:
        if word == "--":
            yield from words
        elif not word.startswith("-"):
            yield word
        elif "=" not in word:
            next(words, None)
