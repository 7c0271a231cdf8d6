"""Decoding piece by piece, and stop strings."""

import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen35_jax.errors import UserError
from qwen35_jax.text import StopStrings, StreamDecoder, Tokenizer
from qwen35_jax.text.streaming import byte_alphabet

TINY = Tokenizer.from_directory(Path(__file__).parents[2] / "qwen35_jax" / "assets" / "tiny")


def decoded(ids, skip=True, tokenizer=TINY):
    stream = StreamDecoder(tokenizer, skip_special_tokens=skip)
    return [stream.push(i) for i in ids], stream.finish()


@given(st.lists(st.one_of(st.integers(0, 4099), st.integers(0, 255), st.integers(4063, 4095)), max_size=40), st.booleans())
@settings(max_examples=300)
@example([0xE2, 4065, 0x80], True)
def test_pieces_make_up_the_whole(ids, skip):
    """Any ids at all, single bytes that are no UTF-8 among them."""
    pieces, rest = decoded(ids, skip)
    assert "".join(pieces) + rest == TINY.decode(ids, skip_special_tokens=skip)


@given(st.text())
@settings(max_examples=200)
def test_real_text_never_flickers(text):
    ids = TINY.encode(text)
    pieces, rest = decoded(ids, skip=False)
    assert rest == ""
    shown = ""
    for piece in pieces:
        shown += piece
        assert shown == TINY.decode(ids, skip_special_tokens=False)[: len(shown)]
    assert ("\ufffd" in shown) == ("\ufffd" in text)


def test_characters_of_several_tokens_are_held_back():
    ids = TINY.encode("🎉a")
    assert len(ids) == 5
    assert decoded(ids) == (["", "", "", "🎉", "a"], "")
    assert decoded(ids[:3]) == (["", "", ""], "\ufffd")
    assert decoded([*ids[:2], ids[4]])[0] == ["", "", "\ufffda"], "an ended character is not waited for"


def test_special_tokens():
    ids = TINY.encode("a<|im_end|><think>b")
    assert decoded(ids)[0] == ["a", "", "<think>", "b"]
    assert decoded(ids, skip=False)[0] == ["a", "<|im_end|>", "<think>", "b"]


def test_added_tokens_outside_the_byte_alphabet():
    backend = tokenizers.Tokenizer.from_str(TINY._backend.to_str())
    backend.add_tokens(["two words", "日本"])
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode("a two words 日本 é")
    pieces, rest = decoded(ids, tokenizer=tokenizer)
    assert "".join(pieces) + rest == tokenizer.decode(ids) == "a two words 日本 é"


def test_a_decoder_can_be_used_again():
    stream = StreamDecoder(TINY)
    first = TINY.encode("🎉")[0]
    assert (stream.push(first), stream.finish(), stream.finish()) == ("", "\ufffd", "")
    assert "".join(map(stream.push, TINY.encode("Hello"))) == "Hello"


def test_byte_alphabet():
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert set(alphabet) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert (alphabet["Ġ"], alphabet["Ċ"], alphabet["a"]) == (0x20, 0x0A, 0x61)


def test_cost_does_not_grow_with_the_text():
    stream, ids = StreamDecoder(TINY), TINY.encode("The cat sat. ")

    def seconds(count):
        begin = time.perf_counter()
        for i in range(count):
            stream.push(ids[i % len(ids)])
        return time.perf_counter() - begin

    seconds(1000)
    early = min(seconds(1000) for _ in range(5))
    seconds(50_000)
    assert min(seconds(1000) for _ in range(5)) < 5 * early


def expected_cut(text, stops):
    """(text before the stop string, stop string): the first to be complete, the longest of those."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stops if text[:end].endswith(s)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


letters = st.text(alphabet="ab\n", max_size=12)


@given(st.lists(letters, max_size=8), st.lists(letters.filter(bool), max_size=4))
@settings(max_examples=500)
@example(["abc", "abcx"], ["abcde", "bc"])
@example(["aa", "ab"], ["aab", "ab"])
@example(["a", "b", "a"], ["bb", "aba"])
def test_stop_strings(chunks, stops):
    matcher, emitted = StopStrings(stops), ""
    text = "".join(chunks)
    before, match = expected_cut(text, stops)
    seen = ""
    for chunk in chunks:
        seen += chunk
        emitted += matcher.push(chunk)
        assert before.startswith(emitted), "nothing of a stop string gets out"
        if matcher.matched is None:
            held = seen[len(emitted) :]
            assert held == "" or any(s.startswith(held) for s in stops), "nothing is held back without reason"
    emitted += matcher.finish()
    assert (emitted, matcher.matched) == (before, match)
    if match:
        assert matcher.push("more") + matcher.finish() == "", "nothing comes after a match"


def test_stop_strings_over_pieces():
    matcher = StopStrings(["\n\nUser:", "END"])
    assert [matcher.push(piece) for piece in ("Hi", "\n", "\nU", "x E", "N", "D", "!")] == [
        "Hi",
        "",
        "",
        "\n\nUx ",
        "",
        "",
        "",
    ]
    assert matcher.matched == "END" and matcher.finish() == ""


def test_one_stop_string_and_none():
    matcher = StopStrings("xy")
    assert (matcher.push("ax"), matcher.finish(), matcher.matched) == ("a", "x", None)
    assert StopStrings().push("anything") == "anything"


@pytest.mark.parametrize("stop", ["", [""], ["a", 3], [None], [b"a"]])
def test_wrong_stop_strings(stop):
    with pytest.raises(UserError, match="stop string"):
        StopStrings(stop)
