"""From lines to examples: loss masks by hand, lines by random access, lines that are no record."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen35_jax.errors import UserError
from qwen35_jax.text import ChatTemplate, Tokenizer
from qwen35_jax.train.data import EncodeOptions, JsonLines, encode_example, lines, parse_line
from tests.text.conversations import CHATS, OFFICIAL

TINY = Path(__file__).parents[2] / "qwen35_jax" / "assets" / "tiny"
TOKENIZER = Tokenizer.from_directory(TINY)
TEMPLATE = ChatTemplate.from_directory(TINY)
OFFICIAL_TEMPLATES = [ChatTemplate(p.read_text("utf-8"), source=str(p)) for p in sorted(OFFICIAL.glob("*.jinja"))]
END, PAD = "<|im_end|>", "<|endoftext|>"
USER = {"role": "user", "content": "Hi"}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def said(content, **extra):
    return {"role": "assistant", "content": content, **extra}


def encode(record, **options):
    return encode_example(record, TOKENIZER, TEMPLATE, EncodeOptions(**options))


def trained(example):
    """The texts of the runs of tokens that are trained on."""
    runs = itertools.groupby(zip(example.tokens, example.loss_weights, strict=True), key=lambda pair: pair[1])
    assert set(example.loss_weights) <= {0, 1}
    return [TOKENIZER.decode([t for t, _ in run], skip_special_tokens=False) for weight, run in runs if weight]


def whole(example):
    return TOKENIZER.decode(example.tokens, skip_special_tokens=False)


# --- text -----------------------------------------------------------------------------------------------------------


def test_a_text_is_trained_on_in_full_and_ends():
    example = encode({"text": "Once upon a time", "source": "ignored"})
    assert whole(example) == "Once upon a time" + PAD
    assert example.loss_weights.tolist() == [0] + [1] * (len(example.tokens) - 1)
    assert example.tokens[-1] == TOKENIZER.pad_token_id and example.splittable
    assert (example.tokens.dtype, example.loss_weights.dtype) == (np.int32, np.float32)


# --- loss masks of chats --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("thinking", "expected"),
    [
        (True, ["I ponder\n</think>\n\nHello" + END]),
        # Without thinking the prompt holds an empty thought, which is no prefix of this turn.
        (False, ["<think>\nI ponder\n</think>\n\nHello" + END]),
        (None, ["<think>\nI ponder\n</think>\n\nHello" + END]),  # tiny does not think by default
    ],
)
def test_a_turn_with_thinking(thinking, expected):
    example = encode({"messages": [USER, said("Hello", reasoning_content="I ponder")]}, enable_thinking=thinking)
    assert trained(example) == expected
    assert whole(example) == f"<|im_start|>user\nHi{END}\n<|im_start|>assistant\n<think>\nI ponder\n</think>\n\nHello{END}\n"
    assert not example.splittable


@pytest.mark.parametrize(("thinking", "expected"), [(True, ["\n</think>\n\nHello" + END]), (False, ["Hello" + END])])
def test_a_turn_without_thinking(thinking, expected):
    assert trained(encode({"messages": [USER, said("Hello")]}, enable_thinking=thinking)) == expected


def test_earlier_turns_lose_their_thinking_and_are_trained_on():
    messages = [
        {"role": "system", "content": "Be kind."},
        USER,
        said("One", thinking="secret"),
        USER,
        said("Two", thinking="plan"),
    ]
    example = encode({"messages": messages}, enable_thinking=True)
    assert trained(example) == ["One" + END, "plan\n</think>\n\nTwo" + END]
    assert "secret" not in whole(example)


def test_tool_calls_are_trained_on_and_their_results_are_not():
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [USER, said("", thinking="look", tool_calls=[call]), {"role": "tool", "content": "sunny"}, said("It is sunny.")]
    example = encode({"messages": messages, "tools": [WEATHER]}, enable_thinking=True)
    assert trained(example) == [
        "look\n</think>\n\n<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>"
        + END,
        "\n</think>\n\nIt is sunny." + END,
    ]
    assert "<tool_response>\nsunny\n</tool_response>" in whole(example) and '"name": "weather"' in whole(example)


def test_the_untrained_part_in_front_is_the_prompt_of_generation():
    messages = [USER, said("Yes\n\nno"), USER, said("Hello", thinking="so")]
    example = encode({"messages": messages}, enable_thinking=True)
    prompt = TOKENIZER.encode(TEMPLATE.render(messages[:3], enable_thinking=True))
    assert example.tokens[: len(prompt)].tolist() == prompt
    assert example.loss_weights[len(prompt) - 1 :].tolist() == [0] + [1] * (len(example.tokens) - len(prompt) - 1) + [0]


@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize(
    "template", [TEMPLATE, *OFFICIAL_TEMPLATES], ids=lambda t: Path(t.source).parent.name + Path(t.source).name
)
def test_every_assistant_turn_of_every_template_is_one_run(template, thinking):
    options = EncodeOptions(enable_thinking=thinking)
    count = 0
    for messages, extra in CHATS.values():
        record = {"messages": messages, "tools": extra.get("tools")}
        try:
            example = encode_example(record, TOKENIZER, template, options)
        except UserError:
            continue  # pictures, and chats without an assistant
        text = template.render(messages, tools=record["tools"], enable_thinking=thinking, add_generation_prompt=False)
        assert whole(example) == text
        runs = trained(example)
        assert len(runs) == sum(message["role"] == "assistant" for message in messages)
        assert all(run.endswith(END) and run.count(END) == 1 and "<|im_start|>" not in run for run in runs)
        count += 1
    assert count > 10


def test_all_tokens_of_a_chat():
    record = {"messages": [USER, said("Hello", thinking="so")]}
    example = encode(record, loss_on="all")
    assert example.loss_weights.tolist() == [0] + [1] * (len(example.tokens) - 1)
    assert whole(example) == whole(encode(record))
    assert encode({"messages": [USER]}, loss_on="all").loss_weights.any()


def test_a_message_of_weight_zero_is_left_out():
    messages = [USER, said("No", weight=0), USER, said("Yes", weight=1)]
    assert trained(encode({"messages": messages})) == ["Yes" + END]


BAD_RECORDS = {
    "neither": ({"prompt": "a", "completion": "b"}, "expected either 'text' or 'messages', but there is 'prompt', 'completion'"),
    "both": ({"text": "a", "messages": [USER]}, "expected either"),
    "nothing": ({}, "there is nothing"),
    "text is a number": ({"text": 5}, "'text' must be a string, not a int"),
    "empty text": ({"text": ""}, "'text' is empty"),
    "half a character": ({"text": "a\ud800"}, "U+D800"),
    "half a character in a chat": ({"messages": [USER, said("\udfff")]}, "U+DFFF"),
    "messages are a string": ({"messages": "Hi"}, "list of messages"),
    "no messages": ({"messages": []}, "at least one message"),
    "unknown role": ({"messages": [{"role": "robot", "content": "x"}]}, "role 'robot'"),
    "the template refuses": ({"messages": [said("Hello")]}, "No user query"),
    "tools are a string": ({"messages": [USER, said("Hello")], "tools": "weather"}, "tools must be a list"),
    "no assistant": ({"messages": [USER]}, "no token to train on"),
    "weight": ({"messages": [USER, said("Hello", weight=0.5)]}, "weight of a message must be 0 or 1"),
    "all left out": ({"messages": [USER, said("Hello", weight=0)]}, "no token to train on"),
    "an end of turn in a message": ({"messages": [USER, said(f"Hello{END}there")]}, "contains <|im_end|>"),
    "a turn in a message": (
        {"messages": [{"role": "user", "content": "<|im_start|>assistant\nHa"}, said("Hello")]},
        "<|im_start|>",
    ),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}, said("Hello")]}, "messages[0]"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_bad_records(name):
    record, reason = BAD_RECORDS[name]
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        encode(record)
    assert "\n" not in str(caught.value)


def test_a_template_whose_turns_differ_in_number():
    text = (TINY / "chat_template.jinja").read_text("utf-8")
    doubled = text + "{%- if messages | length > 1 %}{{- '<|im_start|>assistant\nmore<|im_end|>' }}{%- endif %}"
    with pytest.raises(UserError, match="1 assistant messages, but the template made 2 turns"):
        encode_example({"messages": [USER, said("Hello")]}, TOKENIZER, ChatTemplate(doubled, source="doubled"))


def test_a_template_of_another_format():
    template = ChatTemplate("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}", source="brackets")
    with pytest.raises(UserError, match="brackets does not open .* set loss_on to 'all'"):
        encode_example({"text": "a"}, TOKENIZER, template)
    assert whole(encode_example({"messages": [USER]}, TOKENIZER, template, EncodeOptions("all"))) == "[user] Hi"


def test_an_unknown_choice():
    with pytest.raises(UserError, match="accepted are assistant, all"):
        EncodeOptions("user")


# --- lines ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["local", "remote"])
def place(request, monkeypatch):
    """Local files, and the same ones taken for remote: read whole through epath."""
    if request.param == "remote":
        monkeypatch.setattr(lines, "is_local", lambda path: False)


@settings(max_examples=150)
@given(content=st.lists(st.sampled_from([b"\n", b"\n", b" ", b"\r", b"\t", b"a", b"{}", b"\0", b"\xff"])).map(b"".join))
def test_lines_are_those_of_a_plain_split(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(content)
    expected = [(f"{path}:{n}", line.strip()) for n, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "SCAN_BYTES", 3)
        if not expected:
            with pytest.raises(UserError, match="there is no line"):
                JsonLines([str(path)])
            return
        found = JsonLines([str(path)])
    assert [(line.where, line.text.strip()) for line in (found[i] for i in range(len(found)))] == expected


def test_files_and_globs_in_order(tmp_path, place):
    for name in ("b.jsonl", "a.jsonl", "c.txt", "[1].jsonl"):
        (tmp_path / name).write_text(f'{{"text": "{name}"}}\n\n{{"text": "again"}}', "utf-8")
    found = JsonLines([f"{tmp_path}/c.txt", f"{tmp_path}/?.jsonl", f"{tmp_path}/[1].jsonl"])
    places = [found[i].where.removeprefix(f"{tmp_path}/") for i in range(len(found))]
    assert places == ["c.txt:1", "c.txt:3", "a.jsonl:1", "a.jsonl:3", "b.jsonl:1", "b.jsonl:3", "[1].jsonl:1", "[1].jsonl:3"]
    assert parse_line(found[2]) == {"text": "a.jsonl"}
    assert found.size == sum(path.stat().st_size for path in tmp_path.iterdir())


@pytest.mark.parametrize("pattern", ["none.jsonl", "*.nothing"])
def test_no_such_file(tmp_path, place, pattern):
    with pytest.raises(UserError, match="no file matches .*" + re.escape(pattern)):
        JsonLines([str(tmp_path / pattern)])


def test_a_directory_and_nothing(tmp_path):
    with pytest.raises(UserError, match="is a directory; name its files"):
        JsonLines([str(tmp_path)])
    with pytest.raises(UserError, match="no files are named"):
        JsonLines([])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"\x80\x03binary", "not UTF-8 text"),
        (b'{"text": "cut off', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"text": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b'["text"]', "holds a JSON list"),
        (b"\0\0\0\0", "not valid JSON"),
    ],
)
def test_lines_that_are_no_record(text, reason):
    with pytest.raises(UserError, match=reason) as caught:
        parse_line(lines.Line("here:1", text))
    assert len(str(caught.value)) < 300


def test_a_huge_line_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 20)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "%s"}\n{"text": "short"}\n' % ("x" * 100), "utf-8")
    found = JsonLines([str(path)])
    assert len(found[0].text) == 21
    with pytest.raises(UserError, match="longer than"):
        parse_line(found[0])
    assert parse_line(found[1]) == {"text": "short"}


@pytest.mark.parametrize("blank", [b" ", b"\v", b"\f\v", b" \r"])
def test_blank_lines_are_no_part_of_the_line_before(tmp_path, blank):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + blank + b'\n{"text": "b"}\n' + blank)
    found = JsonLines([str(path)])
    assert [found[i].text for i in range(len(found))] == [b'{"text": "a"}', b'{"text": "b"}']
    assert found[1].where == f"{path}:3"


def test_a_byte_order_mark_and_dos_line_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
    found = JsonLines([str(path)])
    assert [parse_line(found[i])["text"] for i in range(len(found))] == ["a", "b"]
