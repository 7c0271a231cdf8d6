"""From a record to token ids and the weight that each of them has in the loss."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qwen35_jax.errors import UserError
from qwen35_jax.text import ChatTemplate, Tokenizer
from qwen35_jax.train.data.pictures import PictureReader, Pictures
from qwen35_jax.vision_io import Visual, collect_pictures, expand

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
ASSISTANT = TURN_START + "assistant\n"
ASSISTANT_TURN = re.compile(re.escape(ASSISTANT) + ".*?" + re.escape(TURN_END), re.DOTALL)
CHOICES = ("assistant", "all")


@dataclasses.dataclass(frozen=True)
class EncodeOptions:
    """loss_on: "assistant" (what the assistant would generate) or "all" tokens of a chat; enable_thinking: for the template."""

    loss_on: str = "assistant"
    enable_thinking: bool | None = None

    def __post_init__(self):
        if self.loss_on not in CHOICES:
            raise UserError(f"loss_on is {self.loss_on!r}; accepted are {', '.join(CHOICES)}")


@dataclasses.dataclass(frozen=True)
class Example:
    """One document.

    Attributes:
        tokens: int32 [T].
        loss_weights: float32 [T], the weight of each token as a target; the first one, which nothing predicts, has 0.
        splittable: whether a document that is too long may be cut into several; else it is cut off.
        pictures: of a chat that has some.
    """

    tokens: np.ndarray
    loss_weights: np.ndarray
    splittable: bool
    pictures: Pictures | None = None

    def cut(self, end: int) -> Example:
        """Its first `end` tokens."""
        pictures = self.pictures and self.pictures.cut(end)
        return Example(self.tokens[:end], self.loss_weights[:end], self.splittable, pictures)


class ExampleEncoder:
    """Turns records into examples: `encoder(record)`. `reader` reads the pictures of chats; None: they are errors."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        options: EncodeOptions = EncodeOptions(),
        reader: PictureReader | None = None,
    ):
        """Raises UserError if the template's assistant turns cannot be found in its text, and loss_on needs them."""
        self._tokenizer = tokenizer
        self._reader = reader
        self._template = template
        self._options = options
        self._opening = self._generation_prompt() if options.loss_on == "assistant" else ""

    def __call__(self, record: Mapping[str, Any], folder: str = "") -> Example:
        """Encode {"text": …} or {"messages": […], "tools": […]}. Raises UserError for a record that is neither.

        Text is followed by the tokenizer's end-of-document (pad) token and is trained on in full. A chat is rendered by the
        template, which decides what becomes of earlier thinking. With loss_on "assistant" those tokens are trained on that
        the assistant would generate: in each of its turns what follows the template's generation prompt, up to and
        including `<|im_end|>`. An assistant message with "weight": 0 is left out. The messages' parts may be pictures (see
        `collect_pictures`), whose relative paths count from `folder`; no placeholder is trained on.
        """
        if ("text" in record) == ("messages" in record):
            keys = ", ".join(map(repr, record)) or "nothing"
            raise UserError(f"expected either 'text' or 'messages', but there is {keys}")
        visuals: list[Visual] = []
        tokens, weights = self._text(record["text"]) if "text" in record else self._chat(record, folder, visuals)
        tokens, weights = np.asarray(tokens, np.int32), np.asarray(weights, np.float32)
        weights[:1] = 0
        if self._reader is not None:
            weights[self._reader.is_placeholder(tokens)] = 0
        if not weights.any():
            raise UserError("there is no token to train on")
        pictures = self._reader.place(tokens, visuals) if visuals else None
        return Example(tokens, weights, splittable="text" in record, pictures=pictures)

    def _text(self, text: Any) -> tuple[list[int], list[int]]:
        if not isinstance(text, str):
            raise UserError(f"'text' must be a string, not a {type(text).__name__}")
        if not text:
            raise UserError("'text' is empty")
        if self._tokenizer.pad_token_id is None:
            raise UserError("the tokenizer has no pad token to end a text with: set pad_token in tokenizer_config.json")
        tokens = [*self._encode(text), self._tokenizer.pad_token_id]
        return tokens, [1] * len(tokens)

    def _chat(self, record: Mapping[str, Any], folder: str, visuals: list[Visual]) -> tuple[list[int], list[int]]:
        """Tokens and weights; what the chat shows is added to `visuals`."""
        tokens, weights = [], []
        for text, weight in self._parts(record, folder, visuals):
            ids = self._encode(text)
            tokens += ids
            weights += [weight] * len(ids)
        return tokens, weights

    def _parts(self, record: Mapping[str, Any], folder: str, visuals: list[Visual]) -> Iterator[tuple[str, int]]:
        """The rendered chat, cut where the weight changes: where the assistant takes over and where its turn ends.

        Each part is encoded alone, so that the tokens are those of generation, where the prompt ends at the same place.
        """
        text = self._render(record, folder, visuals)
        if self._options.loss_on == "all":
            yield text, 1
            return
        messages = [message for message in record["messages"] if message["role"] == "assistant"]
        turns = list(ASSISTANT_TURN.finditer(text))
        if len(turns) != len(messages):
            raise UserError(f"the chat has {len(messages)} assistant messages, but the template made {len(turns)} turns of them")
        position = 0
        for message, turn in zip(messages, turns, strict=True):
            start = turn.start() + len(ASSISTANT)
            if text.startswith(self._opening, start):
                start += len(self._opening)
            yield text[position:start], 0
            yield text[start : turn.end()], _weight(message)
            position = turn.end()
        yield text[position:], 0

    def _render(self, record: Mapping[str, Any], folder: str, visuals: list[Visual]) -> str:
        (messages, pictures), tools = collect_pictures(record["messages"]), record.get("tools")
        thinking = self._options.enable_thinking
        text = self._template.render(messages, tools=tools, enable_thinking=thinking, add_generation_prompt=False)
        _check_parts(messages, self._reader is not None)
        raw = json.dumps([messages, tools], ensure_ascii=False)
        for marker in (TURN_START, TURN_END):
            if marker in raw:
                raise UserError(f"a message contains {marker}, which would begin or end a turn")
        if self._reader is None:
            return text
        visuals += self._reader.read(pictures, folder)
        return expand(text, visuals)

    def _generation_prompt(self) -> str:
        """What the template puts behind the assistant's header for generation, such as `<think>` and a line feed."""
        chat = [{"role": "user", "content": "Hello"}]
        thinking = self._options.enable_thinking
        told, asked = (self._template.render(chat, enable_thinking=thinking, add_generation_prompt=a) for a in (False, True))
        if not asked.startswith(told + ASSISTANT):
            raise UserError(
                f"chat template {self._template.source} does not open the assistant's turn with {ASSISTANT!r}, "
                "so its turns cannot be found: set loss_on to 'all'"
            )
        return asked.removeprefix(told + ASSISTANT)

    def _encode(self, text: str) -> list[int]:
        try:
            text.encode()  # JSON can spell halves of surrogate pairs, which no tokenizer takes
        except UnicodeEncodeError as error:
            raise UserError(f"the text holds U+{ord(text[error.start]):04X}, which is no character") from error
        return self._tokenizer.encode(text)


def encode_example(
    record: Mapping[str, Any], tokenizer: Tokenizer, template: ChatTemplate, options: EncodeOptions = EncodeOptions()
) -> Example:
    """The example of one record; see `ExampleEncoder`, which is the faster form for many."""
    return ExampleEncoder(tokenizer, template, options)(record)


def _weight(message: Mapping[str, Any]) -> int:
    weight = message.get("weight")
    if weight is None:
        return 1
    if weight not in (0, 1):
        raise UserError(f"the weight of a message must be 0 or 1, not {weight!r}")
    return int(weight)


def _check_parts(messages: Sequence[Mapping[str, Any]], sees: bool) -> None:
    for i, message in enumerate(messages):
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if part.get("type") in ("image", "video"):
                if not sees:
                    raise UserError(f"messages[{i}] has a picture, but the run is one of text: set data.patches")
            elif part.get("type", "text") != "text" or "text" not in part:
                raise UserError(f"messages[{i}] has a part that is neither text nor an image nor a video")
