"""Files of prompts: what is a line, what is a prompt, and where the wrong one is."""

import json

import pytest

from qwen35_jax.errors import UserError
from qwen35_jax.text import read_prompts

CHAT = [{"role": "user", "content": "Hi"}]


def read(tmp_path, content, name="x.jsonl"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(where.removeprefix(str(path)), prompt) for where, prompt, tools in read_prompts(path) if not tools]


def test_lines_of_text(tmp_path):
    text = "\ufeffone\r\n\n \t\ntwo\u2028still two\x0bhere\nthree"
    expected = [(" line 1", "one"), (" line 4", "two\u2028still two\x0bhere"), (" line 5", "three")]
    assert read(tmp_path, text, "x.txt") == expected


def test_json_lines(tmp_path):
    lines = [{"prompt": "a\u2028b\x85c", "id": 7}, None, {"messages": CHAT}]
    text = "\n".join(json.dumps(line, ensure_ascii=False) if line else "" for line in lines)
    assert read(tmp_path, "\ufeff" + text + "\r\n") == [(" line 1", "a\u2028b\x85c"), (" line 3", CHAT)]


def test_tools_of_a_chat(tmp_path):
    tools = [{"type": "function", "function": {"name": "calculator", "parameters": {}}}]
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"messages": CHAT, "tools": tools}) + "\n" + json.dumps({"messages": CHAT, "tools": None}))
    assert [(each.prompt, each.tools) for each in read_prompts(path)] == [(CHAT, tools), (CHAT, None)]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"prompt": ' + "1" * 5000 + "}", "is not JSON"),
        ("[]", "must be an object with either"),
        ("{}", "must be an object with either"),
        ('{"prompt": "x", "messages": []}', "must be an object with either"),
        ('{"prompt": ["a", "b"]}', '"prompt" is a list, but text is expected'),
        ('{"prompt": null}', '"prompt" is a NoneType'),
        ('{"prompt": " "}', "the prompt is empty"),
        ('{"messages": []}', "at least one message"),
        ('{"messages": [{"role": "user", "content": "Hi"}], "tools": {"name": "f"}}', '"tools" must be a list of objects'),
        ('{"prompt": "x", "tools": [{}]}', '"tools" go with "messages"'),
        ('{"messages": [null]}', r"messages\[0\] must be an object"),
        ('{"messages": [1, 2, 3]}', r"messages\[0\] must be an object"),
        ('{"messages": "Hi"}', "a chat is a list of messages"),
        ('{"messages": [{"role": "user", "content": [' + "[" * 700 + "]" * 700 + "]}]}", "x.jsonl line 3"),
    ],
)
def test_wrong_lines_are_named(tmp_path, line, message):
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, '{"prompt": "fine"}\n\n' + line)
    assert "x.jsonl line 3" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content, message", [(b"a\n\xff", "not UTF-8 text .byte 2."), (b" \n\n", "holds no prompts")])
def test_files_without_prompts(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, content)
