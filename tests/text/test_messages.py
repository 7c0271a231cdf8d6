"""Checks and the common form of chat messages."""

import copy

import numpy as np
import pytest

from qwen35_jax.errors import UserError
from qwen35_jax.text import ChatTemplate, normalise_messages, normalise_tools
from tests.text.conversations import assistant, call, user

ARGUMENT_FORMS = ({"city": "Paris", "n": [1]}, '{"city": "Paris", "n": [1]}')


def test_arguments_as_a_json_string_render_like_a_mapping():
    chats = [
        [user("Hi"), assistant(None, tool_calls=[{"function": {"name": "f", "arguments": arguments}}])]
        for arguments in ARGUMENT_FORMS
    ]
    before = copy.deepcopy(chats)
    first, second = (ChatTemplate.built_in(True).render(chat) for chat in chats)
    assert first == second and "<parameter=city>\nParis\n</parameter>" in first
    assert chats == before, "the caller's messages stay as they were"


@pytest.mark.parametrize("arguments", ["", " ", "{}", {}, None])
def test_calls_without_arguments(arguments):
    [message] = normalise_messages([assistant(None, tool_calls=[{"name": "f", "arguments": arguments}])])
    assert message == {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_names_of_reasoning(name):
    [_, message] = normalise_messages([user("Hi"), assistant("Yes", **{name: "Hmm"})])
    assert message["reasoning_content"] == "Hmm"


def test_values_become_plain():
    class Name(str):
        def dangerous(self):
            return "no"

    message = {"role": Name("user"), "content": ({"type": "image", "image": np.zeros(3), "size": np.int64(3)},)}
    [plain] = normalise_messages([message])
    assert plain == {"role": "user", "content": [{"type": "image", "image": "<ndarray>", "size": 3}]}
    assert type(plain["role"]) is str and type(plain["content"][0]["size"]) is int
    assert normalise_tools(({"a": (1, np.float32(0.5), np.bool_(False))},)) == [{"a": [1, 0.5, False]}]


@pytest.mark.parametrize(
    "messages, complaint",
    [
        ("Hello", "a chat is a list of messages"),
        ({"role": "user"}, "a chat is a list of messages"),
        (None, "a chat is a list of messages"),
        ([], "at least one message"),
        (["Hello"], r"messages\[0\] must be an object"),
        ([{}], r"messages\[0\]: role None"),
        ([user("x"), {"role": "robot", "content": "x"}], r"messages\[1\]: role 'robot' is not one of system,"),
        ([{"role": "user"}], "a user message needs content"),
        ([{"role": "tool", "content": None}], "a tool message needs content"),
        ([user(3)], r"messages\[0\].content must be a string or a list of parts, not a int"),
        ([user({"type": "text"})], "not a dict"),
        ([user(["x"])], r"content\[0\] must be an object"),
        ([user([{"type": "text"}])], "a text part needs a string under 'text', not nothing"),
        ([assistant("x", reasoning_content=3)], "reasoning_content must be a string"),
        ([assistant("x", tool_calls={"name": "f"})], r"messages\[0\].tool_calls must be a list"),
        ([assistant("x", tool_calls=["f"])], r"tool_calls\[0\] must be an object"),
        ([assistant("x", tool_calls=[{"name": 3}])], "a string under 'name'"),
        ([assistant("x", tool_calls=[{"function": "f"}])], r"tool_calls\[0\].function must be an object"),
        ([assistant("x", tool_calls=[{"name": "f", "arguments": "{"}])], "arguments is a string that is not JSON"),
        ([assistant("x", tool_calls=[{"name": "f", "arguments": "[1]"}])], "arguments must be an object"),
        ([assistant("x", tool_calls=[call("f"), {"name": "f", "arguments": 3}])], r"tool_calls\[1\].arguments must"),
    ],
)
def test_malformed_messages(messages, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        ChatTemplate.built_in(True).render(messages)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tools", ["f", {"name": "f"}, 3, ["f"]])
def test_malformed_tools(tools):
    with pytest.raises(UserError, match="tools"):
        ChatTemplate.built_in(True).render([user("x")], tools=tools)


def test_no_tools():
    assert normalise_tools(None) is None and normalise_tools([]) is None
