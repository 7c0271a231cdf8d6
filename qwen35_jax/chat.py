"""A conversation at the terminal, with pictures: what `sample --chat` runs."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Callable

from qwen35_jax.errors import UserError
from qwen35_jax.generate import LanguageModel
from qwen35_jax.generate.multimodal import content_with_pictures
from qwen35_jax.vision_io import Picture, is_data_url


class Chat:
    """Messages from standard input, answers to standard output as they come.

    system: the system message, if any. picture(kind, source): the picture that a file is, kind "image" or "video".
    rendering: how chats become prompts, limits of pictures included, as `LanguageModel.prepare` takes it; options: those of
    `LanguageModel.stream`.
    """

    def __init__(
        self, lm: LanguageModel, system: str | None, picture: Callable[[str, str], Picture], rendering: dict, options: dict
    ):
        if lm.tokenizer is None:
            raise UserError("this checkpoint has no tokenizer.json, so it cannot chat")
        self.lm, self.picture, self.rendering, self.options = lm, picture, rendering, options
        self.system = [] if system is None else [{"role": "system", "content": system}]
        self._reset()

    def _reset(self) -> None:
        self.messages, self.pictures = list(self.system), []

    def run(self) -> None:
        """/image and /video show what the next message is about, /reset forgets everything, /exit or Ctrl-D ends; Ctrl-C
        stops an answer. After an error with a message, what was shown for it waits for the next one."""
        print("Type a message; /image FILE or /video FILE shows one, /reset starts over, /exit ends.", file=sys.stderr)
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                print()
                return
            if line == "/exit":
                return
            try:
                self._take(line)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)

    def _take(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        if line == "/reset":
            self._reset()
        elif command in ("/image", "/video"):
            self.pictures.append(self._shown(command[1:], argument.strip()))
        elif re.fullmatch("/[A-Za-z]+", command):
            raise UserError(f"{line[:40]} is no command; there are /image FILE, /video FILE, /reset and /exit")
        elif line:
            self._answer(line)
            self.pictures = []

    def _shown(self, kind: str, text: str) -> Picture:
        """A picture, read now and once: what is wrong with it is said now, and its file may go."""
        if not text:
            raise UserError(f"/{kind} needs a file: /{kind} FILE")
        content = content_with_pictures("", [self.picture(kind, _typed_path(text))])
        (visual,) = self.lm.prepare([{"role": "user", "content": content}], **self.rendering).visuals
        return Picture(kind, visual)

    def _answer(self, line: str) -> None:
        """Adds a message and its answer, which is written as it comes; after an error neither."""
        asked, answer = {"role": "user", "content": content_with_pictures(line, self.pictures)}, ""
        prompt = self.lm.prepare([*self.messages, asked], **self.rendering)
        thinks = self.lm.tokenizer.decode(prompt.token_ids[-4:], skip_special_tokens=False).rstrip().endswith("<think>")
        with contextlib.suppress(KeyboardInterrupt):
            for piece in self.lm.stream([prompt], **self.options):
                answer += piece.text
                print(piece.text, end="", flush=True)
        print(flush=True)
        self.messages += [asked, _message(answer, thinks)]


def _message(answer: str, thinks: bool) -> dict[str, str]:
    """The assistant's, of an answer that begins in a thought or not: one that is cut off in its thought has said nothing yet."""
    if not thinks:
        return {"role": "assistant", "content": answer}
    thought, _, said = answer.partition("</think>")
    return {"role": "assistant", "reasoning_content": thought.strip("\n"), "content": said.lstrip("\n")}


def _typed_path(text: str) -> str:
    """A path as it is, or as a shell takes it: quotes, backslashes, ~."""
    if os.path.exists(text) or is_data_url(text) or re.match(r"[A-Za-z]\w+://", text):
        return text
    with contextlib.suppress(ValueError):  # a quote that is not closed
        words = shlex.split(text)
        text = words[0] if len(words) == 1 else text
    return os.path.expanduser(text)
