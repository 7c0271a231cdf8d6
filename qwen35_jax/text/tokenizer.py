"""The tokenizer of a checkpoint: byte-level BPE from tokenizer.json, through the `tokenizers` library."""

from collections.abc import Iterable
from typing import Any

import tokenizers
from etils import epath
from tokenizers.decoders import ByteLevel

from qwen35_jax.errors import UserError
from qwen35_jax.text import files

# The names Qwen3.5 uses, for a directory that has tokenizer.json but no tokenizer_config.json.
QWEN_EOS = "<|im_end|>"
QWEN_PAD = "<|endoftext|>"


class Tokenizer:
    """Text to ids and back. Make one with `Tokenizer.from_directory`."""

    def __init__(self, backend: tokenizers.Tokenizer, eos_token: str | None = QWEN_EOS, pad_token: str | None = QWEN_PAD):
        """`backend` must decode byte-level tokens; `eos_token` and `pad_token` are names in its vocabulary or None."""
        if not isinstance(backend.decoder, ByteLevel):
            raise UserError(f"the tokenizer's decoder is {backend.decoder!r}, but only ByteLevel (as in Qwen3.5) is known")
        # A file may carry the padding and truncation of whoever saved it; neither belongs to the vocabulary.
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._specials = frozenset(t.content for t in backend.get_added_tokens_decoder().values() if t.special)
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.eos_token_id: int | None = None if eos_token is None else backend.token_to_id(eos_token)
        self.pad_token_id: int | None = None if pad_token is None else backend.token_to_id(pad_token)

    @classmethod
    def from_directory(cls, directory: epath.PathLike) -> "Tokenizer | None":
        """Read `tokenizer.json` (and the names of the end and pad tokens from `tokenizer_config.json`).

        Returns None where there is no tokenizer.json: such a model works on ids only.
        Raises UserError, naming the file, if a file is broken.
        """
        text = files.read_text(directory, "tokenizer.json")
        if text is None:
            return None
        path = epath.Path(directory) / "tokenizer.json"
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception for anything it cannot parse
            raise UserError(f"{path} is not a tokenizer that can be read: {files.one_line(error)}") from error
        names = special_token_names(directory)
        try:
            return cls(backend) if names is None else cls(backend, names.get("eos_token"), names.get("pad_token"))
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. Names of added tokens (`<|im_start|>` …) become those tokens; nothing is put in front.

        Raises UserError for lone surrogates: Python puts them where bytes are not UTF-8, and JSON can spell them.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            bad = f"U+{ord(text[error.start]):04X} behind {text[max(0, error.start - 20) : error.start]!r}"
            raise UserError(f"the text holds {bad}, which is no character: write it in UTF-8") from error
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; ids without a token vanish, bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str | None:
        """The token of an id as it stands in the vocabulary (byte-level alphabet), or None."""
        return self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None

    def is_special(self, token: str) -> bool:
        """Whether `decode(skip_special_tokens=True)` leaves this token out."""
        return token in self._specials


def special_token_names(directory: epath.PathLike) -> dict[str, str] | None:
    """`{"eos_token": "<|im_end|>", …}` of tokenizer_config.json, without null ones; None if there is no such file."""
    config = files.read_json_object(directory, "tokenizer_config.json")
    if config is None:
        return None
    names: dict[str, str] = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value: Any = config.get(key)
        if isinstance(value, dict):  # older files spell the token out with its flags
            value = value.get("content")
        if value is not None and not isinstance(value, str):
            path = epath.Path(directory) / "tokenizer_config.json"
            raise UserError(f"{path}: {key} is {value!r}, but a token's text or null is expected")
        if value is not None:
            names[key] = value
    return names
