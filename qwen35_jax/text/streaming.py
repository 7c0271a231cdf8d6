"""Text that comes token by token: incremental decoding and stop strings."""

import codecs
from collections.abc import Sequence

from qwen35_jax.errors import UserError
from qwen35_jax.text.tokenizer import Tokenizer


def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's table), as character -> byte.

    Printable Latin-1 characters stand for themselves, the other 68 bytes for the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class StreamDecoder:
    """Decodes one sequence of ids piece by piece.

    The pieces of `push` and the last one of `finish`, put together, equal `tokenizer.decode` of all ids. Bytes of an
    unfinished character are held back until the character is whole (or can no longer become one), so that no U+FFFD
    shows up and vanishes again. A token costs what its own bytes cost, however long the text is.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._alphabet = byte_alphabet()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Take one id; return the text that is now certain (often "")."""
        token = self._tokenizer.token(int(token_id))
        if token is None or (self._skip_special_tokens and self._tokenizer.is_special(token)):
            return ""
        return self._utf8.decode(self._bytes_of(token))

    def finish(self) -> str:
        """Return what is held back (an unfinished character becomes U+FFFD) and start afresh."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest

    def _bytes_of(self, token: str) -> bytes:
        values = [self._alphabet.get(character) for character in token]
        if None in values:  # an added token with characters outside the alphabet is plain text
            return token.encode("utf-8")
        return bytes(values)


class StopStrings:
    """Cuts a stream of text at the first stop string, and never emits the beginning of one.

    The first is the one that is complete first; of two that end at the same character, the longer. What comes out does
    not depend on how the text is cut into pieces. Without stop strings everything passes through.
    """

    def __init__(self, stop: str | Sequence[str] = ()):
        """Raises UserError for an empty stop string or one that is no string."""
        self._stops = (stop,) if isinstance(stop, str) else tuple(stop)
        for string in self._stops:
            if not isinstance(string, str) or not string:
                raise UserError(f"a stop string must be a non-empty string, not {string!r}")
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Take more text; return what is certain to stand before any stop string. "" once `matched` is set."""
        if self.matched is not None:
            return ""
        pending = self._held + text
        found = [(start + len(s), start, s) for s in self._stops if (start := pending.find(s)) >= 0]
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return pending[:start]
        keep = self._beginning_at_end_of(pending)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep]

    def finish(self) -> str:
        """The text has ended: return what was held back ("" after a match)."""
        rest, self._held = self._held, ""
        return rest

    def _beginning_at_end_of(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[len(text) - length :]
            if any(string.startswith(tail) for string in self._stops):
                return length
        return 0
