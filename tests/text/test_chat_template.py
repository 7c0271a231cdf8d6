"""Our chat template against the official ones, byte for byte, and ChatTemplate's search for a template."""

import functools
import json
import os
from pathlib import Path

import jinja2
import pytest
from hypothesis import given, settings

from qwen35_jax.errors import UserError
from qwen35_jax.text import ChatTemplate, built_in_template
from qwen35_jax.text.sandbox import make_environment
from tests.text.conversations import CHATS, FLAVOURS, OFFICIAL, REFUSED, assistant, chats, options, user
from tests.text.make_golden_chats import GOLDEN

TINY = Path(__file__).parents[2] / "qwen35_jax" / "assets" / "tiny"
needs_official = pytest.mark.skipif(not OFFICIAL.is_dir(), reason="no official templates: there is no ../shared")
LATER = ("Qwen3.6.chat_template.jinja", "Qwen3.8-27B.chat_template.jinja")
HELLO = [user("Hello")]


@functools.cache
def official(name):
    return ChatTemplate((OFFICIAL / name).read_text("utf-8"), source=name)


@functools.cache
def built_in(flavour):
    return ChatTemplate.built_in(flavour)


def outcome(template, messages, kwargs):
    """What a template makes of a chat: its text, or its complaint without the template's name."""
    try:
        return template.render(messages, **kwargs)
    except UserError as error:
        return UserError, str(error).removeprefix(f"chat template {template.source}")


@pytest.mark.parametrize("flavour", [True, False])
@pytest.mark.parametrize("name", CHATS)
def test_golden_chats(name, flavour):
    messages, kwargs = CHATS[name]
    expected = json.loads(GOLDEN.read_text("utf-8"))[name][str(flavour)]
    assert built_in(flavour).render(messages, **kwargs) == expected


def test_golden_file_has_no_other_chats():
    assert list(json.loads(GOLDEN.read_text("utf-8"))) == list(CHATS)


@needs_official
@pytest.mark.parametrize("flavour", [True, False])
def test_golden_chats_are_what_the_official_templates_say(flavour):
    template = official(FLAVOURS[flavour])
    golden = json.loads(GOLDEN.read_text("utf-8"))
    for name, (messages, kwargs) in CHATS.items():
        assert template.render(messages, **kwargs) == golden[name][str(flavour)], name


@needs_official
@pytest.mark.parametrize("flavour", [True, False])
@settings(max_examples=300)
@given(messages=chats, kwargs=options)
def test_any_chat_equals_the_official_template(flavour, messages, kwargs):
    ours, theirs = built_in(flavour), official(FLAVOURS[flavour])
    assert outcome(ours, messages, kwargs) == outcome(theirs, messages, kwargs)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_chats(name):
    messages, complaint = REFUSED[name]
    with pytest.raises(UserError, match=complaint) as caught:
        built_in(True).render(messages)
    assert "\n" not in str(caught.value)
    if OFFICIAL.is_dir():
        for flavour, file in FLAVOURS.items():
            ours = outcome(built_in(flavour), messages, {})
            assert ours == outcome(official(file), messages, {})


@pytest.mark.parametrize(
    "messages, complaint",
    [
        ([], "No messages provided."),
        ([user(3)], "Unexpected content type."),
        ([user({"type": "text", "text": "x"})], "Unexpected content type."),
        ([user(True)], "Unexpected content type."),
        ([user("x"), assistant("x", tool_calls=[{"name": "f", "arguments": None}])], "pairs"),
    ],
)
def test_guards_that_matter_outside_this_package(messages, complaint):
    """Here such messages do not reach a template; in another program that uses ours they do."""
    with pytest.raises((jinja2.exceptions.TemplateError, TypeError), match=complaint):
        make_environment().from_string(built_in_template(True)).render(messages=messages)


def test_our_template_is_our_own_text():
    """It renders the same bytes, but it is no copy: apart from the trained strings no long line is shared."""
    if not OFFICIAL.is_dir():
        pytest.skip("no official templates: there is no ../shared")
    for name in FLAVOURS.values():
        theirs = {line.strip() for line in (OFFICIAL / name).read_text("utf-8").splitlines() if len(line.strip()) > 60}
        assert not theirs & {line.strip() for line in built_in_template(True).splitlines()}


def transformers_render(template_text, messages, kwargs):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    kwargs = {"add_generation_prompt": True, **kwargs}
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    return utils.render_jinja_template(conversations=[messages], chat_template=template_text, **kwargs)[0][0]


@needs_official
@pytest.mark.parametrize("name", [*FLAVOURS.values(), *LATER])
def test_official_templates_load_from_a_directory_and_equal_transformers(name, tmp_path):
    pytest.importorskip("transformers")
    text = (OFFICIAL / name).read_text("utf-8")
    (tmp_path / "chat_template.jinja").write_text(text, "utf-8")
    template = ChatTemplate.from_directory(tmp_path)
    for chat, (messages, kwargs) in CHATS.items():
        for extra in ({}, {"preserve_thinking": True}, {"reasoning_effort": "low"}):
            options = {**kwargs, **extra}
            expected = transformers_render(text, messages, {"tools": None, **options})
            assert template.render(messages, **options) == expected, (chat, extra)


@needs_official
@pytest.mark.parametrize("name", LATER)
def test_later_official_templates_load_from_a_directory(name, tmp_path):
    text = (OFFICIAL / name).read_text("utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": text}), "utf-8")
    template = ChatTemplate.from_directory(tmp_path)
    for messages, kwargs in CHATS.values():
        assert "<|im_start|>" in template.render(messages, **kwargs)
    history = [user("One"), assistant("1", reasoning_content="Hmm."), user("Two")]
    assert "Hmm." in template.render(history, preserve_thinking=True)
    assert "Hmm." not in template.render(history, preserve_thinking=False)


def test_order_of_the_places_for_a_template(tmp_path):
    def write(name, text):
        (tmp_path / name).write_text(text, "utf-8")

    def rendered():
        return ChatTemplate.from_directory(tmp_path, thinking_by_default=False).render(HELLO)

    assert rendered() == ChatTemplate.built_in(False).render(HELLO)
    write("tokenizer_config.json", json.dumps({"eos_token": "<|im_end|>", "pad_token": {"content": "<pad>"}}))
    assert rendered() == ChatTemplate.built_in(False).render(HELLO)
    write("tokenizer_config.json", json.dumps({"chat_template": "config", "eos_token": "<|im_end|>"}))
    assert rendered() == "config"
    write("chat_template.json", json.dumps({"chat_template": "json"}))
    assert rendered() == "json"
    write("chat_template.jinja", "file {{ eos_token }}")
    assert rendered() == "file <|im_end|>"


def test_named_templates(tmp_path):
    entries = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }} tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": entries}), "utf-8")
    template = ChatTemplate.from_directory(tmp_path)
    assert template.render(HELLO) == "plain"
    assert template.render(HELLO, tools=[{"name": "f"}]) == "1 tools"


@pytest.mark.parametrize(
    "file, content, complaint",
    [
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", "[" * 100_000, "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", '["x"]', "object is expected"),
        ("tokenizer_config.json", '{"eos_token": 3}', "eos_token is 3"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template must be"),
        ("tokenizer_config.json", '{"chat_template": []}', "named 'default'"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "rag", "template": "x"}]}', "there are: rag"),
        (
            "tokenizer_config.json",
            '{"chat_template": "{% if %}"}',
            "tokenizer_config.json has a syntax error in line 1",
        ),
        ("chat_template.jinja", "a\n{% for x in %}", "chat_template.jinja has a syntax error in line 2"),
        ("chat_template.jinja", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_broken_files(file, content, complaint, tmp_path):
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=complaint) as caught:
        ChatTemplate.from_directory(tmp_path)
    assert file in str(caught.value) and "\n" not in str(caught.value)


def test_tiny_has_our_template():
    assert (TINY / "chat_template.jinja").read_text("utf-8") == built_in_template(thinking_by_default=False)
    template = ChatTemplate.from_directory(os.fspath(TINY))
    assert template.render(HELLO).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert template.render(HELLO, enable_thinking=True).endswith("<|im_start|>assistant\n<think>\n")
