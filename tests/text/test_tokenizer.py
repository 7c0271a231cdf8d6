"""The tokenizer wrapper, on the packaged tiny tokenizer, which is built like Qwen3.5's."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen35_jax.errors import UserError
from qwen35_jax.text import Tokenizer, read_generation_config

ROOT = Path(__file__).parents[2]
TINY = ROOT / "qwen35_jax" / "assets" / "tiny"
FIRST_ADDED = 4063
# Of Qwen3.5, in its order; True where decode(skip_special_tokens=True) leaves it out.
ADDED = {
    "<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True, "<|object_ref_start|>": True,
    "<|object_ref_end|>": True, "<|box_start|>": True, "<|box_end|>": True, "<|quad_start|>": True,
    "<|quad_end|>": True, "<|vision_start|>": True, "<|vision_end|>": True, "<|vision_pad|>": True,
    "<|image_pad|>": True, "<|video_pad|>": True, "<tool_call>": False, "</tool_call>": False,
    "<|fim_prefix|>": False, "<|fim_middle|>": False, "<|fim_suffix|>": False, "<|fim_pad|>": False,
    "<|repo_name|>": False, "<|file_sep|>": False, "<tool_response>": False, "</tool_response>": False,
    "<think>": False, "</think>": False, "<|audio_start|>": True, "<|audio_end|>": True, "<tts_pad>": True,
    "<tts_text_bos>": True, "<tts_text_eod>": True, "<tts_text_bos_single>": True, "<|audio_pad|>": True,
}  # fmt: skip
SPEC = ROOT.parent / "shared" / "spec"


@pytest.fixture(scope="module")
def tiny():
    return Tokenizer.from_directory(TINY)


def pieces(text):
    """How the pre-tokeniser cuts a text."""
    backend = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    return [text[a:b] for _, (a, b) in backend.pre_tokenizer.pre_tokenize_str(text)]


def test_sizes(tiny):
    assert tiny.vocab_size == 4096 == FIRST_ADDED + len(ADDED)
    assert (tiny.eos_token_id, tiny.pad_token_id) == (FIRST_ADDED + 2, FIRST_ADDED)
    assert (TINY / "tokenizer.json").stat().st_size < 400_000
    config = json.loads((TINY / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == tiny.vocab_size


def test_generation_defaults_of_tiny(tiny):
    config = read_generation_config(TINY)
    assert config.eos_token_ids == (tiny.eos_token_id, tiny.pad_token_id) and config.pad_token_id == tiny.pad_token_id
    assert not config.do_sample


@pytest.mark.parametrize("place, name, special", [(i, n, s) for i, (n, s) in enumerate(ADDED.items())])
def test_added_tokens(tiny, place, name, special):
    token = FIRST_ADDED + place
    assert tiny.encode(f"a{name}b{name}") == [*tiny.encode("a"), token, *tiny.encode("b"), token]
    assert tiny.encode(f"  {name}\n") == [*tiny.encode("  "), token, *tiny.encode("\n")]
    assert tiny.decode([token], skip_special_tokens=False) == name
    assert tiny.decode([token]) == ("" if special else name)
    assert tiny.is_special(name) == special


def test_added_tokens_equal_those_of_the_official_tokenizer():
    path = SPEC / "golden" / "special_tokens.json"
    if not path.exists():
        pytest.skip("no official list of tokens: there is no ../shared")
    flags = ("content", "special", "normalized", "lstrip", "rstrip", "single_word")
    expected = [tuple(entry[f] for f in flags) for entry in json.loads(path.read_text())]
    ours = json.loads((TINY / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    assert [tuple(entry[f] for f in flags) for entry in ours] == expected
    in_config = json.loads((TINY / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert [tuple(entry[f] for f in flags) for entry in in_config.values()] == expected


def test_configuration_equals_the_official_one_but_for_sizes():
    path = SPEC / "qwen3.8-27b" / "tokenizer_config.json"
    if not path.exists():
        pytest.skip("no official tokenizer configuration: there is no ../shared")
    ours, theirs = (json.loads(p.read_text("utf-8")) for p in (TINY / "tokenizer_config.json", path))
    for own in ("added_tokens_decoder", "chat_template", "model_max_length"):
        ours.pop(own, None), theirs.pop(own, None)
    assert ours == theirs


def test_single_bytes_have_the_ids_of_qwen(tiny):
    """Ids of byte tokens in the recorded encodings of the official tokenizer."""
    for character, token in {
        "\n": 198,
        " ": 220,
        "7": 22,
        ".": 13,
        "?": 30,
        "<": 27,
        ">": 29,
        "}": 92,
        "c": 66,
    }.items():
        assert tiny.encode(character) == [token]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("12345", ["1", "2", "3", "4", "5"]),
        ("a 42", ["a", " ", "4", "2"]),
        ("x²½", ["x", "²", "½"]),
        ("Hello world", ["Hello", " world"]),
        ("it's I'LL we'd'x", ["it", "'s", " I", "'LL", " we", "'d", "'x"]),
        ("e\u0301te\u0301", ["e\u0301te\u0301"]),  # \p{M}: a mark stays with its letter
        ("नमस्ते दुनिया", ["नमस्ते", " दुनिया"]),
        (".\u0301a", [".\u0301a"]),
        ("a\n\nb", ["a", "\n\n", "b"]),
        ("a \n \n  b", ["a", " \n \n", " ", " b"]),
        ("a   b", ["a", "  ", " b"]),
        ("a   ", ["a", "   "]),
        ("x = (y);\n\n", ["x", " =", " (", "y", ");\n\n"]),
        ("\tif", ["\tif"]),
        ("a\r\nb", ["a", "\r\n", "b"]),
        ("你好，世界", ["你好", "，世界"]),
    ],
)
def test_pretokenisation(text, expected):
    assert pieces(text) == expected


@given(text=st.text())
@settings(max_examples=200)
def test_round_trip(tiny, text):
    ids = tiny.encode(text)
    normalised = tokenizers.normalizers.NFC().normalize_str(text)
    assert tiny.decode(ids, skip_special_tokens=False) == normalised
    assert all(0 <= i < tiny.vocab_size for i in ids)


def test_equals_transformers(tiny):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(TINY))
    text = "<|im_start|>user\n12 + 34? It's नमस्ते e\u0301 🎉<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n46"
    ids = theirs.encode(text)
    assert tiny.encode(text) == ids
    for skip in (True, False):
        assert tiny.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (tiny.eos_token_id, tiny.pad_token_id, 4096)


def test_ids_without_a_token(tiny):
    assert tiny.decode([tiny.encode("a")[0], 4096, 248_319]) == "a"
    assert tiny.token(4096) is None and tiny.token(-1) is None
    assert tiny.decode([]) == "" and tiny.encode("") == []


@pytest.mark.parametrize("text", [b"a\xff".decode("utf-8", "surrogateescape"), json.loads('"a\\ud800"')])
def test_what_is_no_text(tiny, text):
    with pytest.raises(UserError, match=r"holds U\+D[8C].. behind 'a', which is no character"):
        tiny.encode(text)


def test_no_tokenizer(tmp_path):
    assert Tokenizer.from_directory(tmp_path) is None


def test_names_of_end_and_pad(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((TINY / "tokenizer.json").read_bytes())
    bare = Tokenizer.from_directory(str(tmp_path))
    assert (bare.eos_token_id, bare.pad_token_id) == (FIRST_ADDED + 2, FIRST_ADDED), "Qwen's names are the default"
    config = {"eos_token": {"content": "<|endoftext|>"}, "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    named = Tokenizer.from_directory(tmp_path)
    assert (named.eos_token_id, named.pad_token_id) == (FIRST_ADDED, None)


def test_padding_and_truncation_of_the_file_do_not_count(tmp_path, tiny):
    backend = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    backend.enable_padding(length=50)
    backend.enable_truncation(2)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_directory(tmp_path).encode("one two three") == tiny.encode("one two three")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b"\xff", b'{"model": {"type": "BPE"}}', (TINY / "tokenizer.json").read_bytes()[:50_000]],
)
def test_broken_file(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match="tokenizer.json") as caught:
        Tokenizer.from_directory(tmp_path)
    assert "\n" not in str(caught.value)


def test_other_kinds_of_tokenizer_are_refused(tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="tokenizer.json.*ByteLevel"):
        Tokenizer.from_directory(tmp_path)


def test_the_script_makes_the_packaged_files(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script = importlib.import_module("make_tiny_tokenizer")
    monkeypatch.setattr(sys, "argv", ["make_tiny_tokenizer.py", "--out", str(tmp_path)])
    script.main()
    for made in tmp_path.iterdir():
        # Compared as data: another version of `tokenizers` may spell the same file differently.
        load = json.loads if made.suffix == ".json" else str
        assert load(made.read_text("utf-8")) == load((TINY / made.name).read_text("utf-8")), made.name
    assert len(list(tmp_path.iterdir())) == 4
