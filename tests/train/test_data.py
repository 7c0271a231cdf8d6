"""The data pipeline: loss masks by hand, lines by random access, bad lines, and streams that resume, shuffle and shard."""

import itertools
import json
import logging
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from qwen35_jax.errors import UserError
from qwen35_jax.text import ChatTemplate, Tokenizer
from qwen35_jax.train.data import EncodeOptions, JsonLines, encode_example, lines, make_data, parse_line
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


@settings(max_examples=150, deadline=None)
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


def test_a_byte_order_mark_and_dos_line_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
    found = JsonLines([str(path)])
    assert [parse_line(found[i])["text"] for i in range(len(found))] == ["a", "b"]


# --- the stream -----------------------------------------------------------------------------------------------------

COUNT = 30


def write(path, records):
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records), "utf-8")
    return str(path)


@pytest.fixture
def config(tmp_path):
    """Texts and chats of many lengths in two files; each names itself."""
    records = []
    for i in range(COUNT):
        text = f"number {i} " + "and so on " * (i * 7 % 11)
        records.append({"text": text} if i % 2 else {"messages": [USER, said(text)]})
    data = {"sequence_length": 48, "batch_size": 4, "loss_on": "assistant", "enable_thinking": None}
    data |= {"bad_lines": "stop", "shuffle_seed": 3, "epochs": 1, "eval": ()}
    data["train"] = (write(tmp_path / "a.jsonl", records[:10]), write(tmp_path / "b.jsonl", records[10:]))
    return ConfigDict(data)


def make(config, **kwargs):
    return make_data(config, TOKENIZER, TEMPLATE, **kwargs)


def documents_in(batches):
    """The numbers of the documents whose beginning is in the batches, in the order of the rows."""
    rows = [row for batch in batches for row in batch["tokens"]]
    return [int(n) for row in rows for n in re.findall(r"number (\d+)", TOKENIZER.decode(row, skip_special_tokens=False))]


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def test_an_epoch_holds_every_document_once(config):
    batches = list(make(config))
    assert sorted(documents_in(batches)) == list(range(COUNT))
    assert documents_in(batches) != list(range(COUNT))
    assert {b["tokens"].shape for b in batches} == {(4, 48)}


def test_the_stream_depends_on_its_seed_alone(config):
    batches = list(make(config))
    assert_same(list(make(config)), batches)
    config.shuffle_seed = 4
    assert documents_in(make(config)) != documents_in(batches)


def test_epochs_are_shuffled_anew_and_lose_nothing(config):
    config.epochs = 3
    numbers = documents_in(make(config))
    assert Counter(numbers) == {i: 3 for i in range(COUNT)}
    config.batch_size, config.sequence_length = 1, 8192  # all in one row: the order is that of the stream
    order = documents_in(make(config))
    epochs = [order[i : i + COUNT] for i in range(0, 3 * COUNT, COUNT)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_without_an_end(config):
    config.epochs = 0
    data = make(config)
    numbers = Counter(documents_in(itertools.islice(data, 40)))
    assert min(numbers.values()) >= 2 and data.documents > 2 * COUNT
    data.close()


@pytest.mark.parametrize("steps", [0, 1, 3, 9, 14])
@pytest.mark.parametrize("epochs", [2, 0])
def test_resuming(config, steps, epochs):
    config.epochs = epochs
    data = make(config)
    list(itertools.islice(data, steps))
    state = json.loads(json.dumps(data.get_state()))
    expected = list(itertools.islice(data, 8))
    resumed = make(config)
    next(resumed)  # restoring replaces whatever position there was
    resumed.set_state(state)
    assert_same(list(itertools.islice(resumed, 8)), expected)
    assert resumed.get_state() == data.get_state()


def test_resuming_at_the_end_and_going_on_for_another_epoch(config):
    data = make(config)
    batches = list(data)
    state = data.get_state()
    resumed = make(config)
    resumed.set_state(state)
    with pytest.raises(StopIteration):
        next(resumed)
    config.epochs = 2
    further = make(config)
    further.set_state(state)
    assert sorted(documents_in(further)) == list(range(COUNT))
    assert documents_in(batches)


def test_resuming_with_other_rows_and_processes(config):
    """The position is one of documents, so what is left comes exactly once whatever the batches are."""
    config.batch_size = 2
    data = make(config)
    seen = documents_in(itertools.islice(data, 3))
    config.batch_size = 6
    parts = [make(config, process_index=p, process_count=3) for p in range(3)]
    for part in parts:
        part.set_state(data.get_state())
    assert sorted(seen + [n for part in parts for n in documents_in(part)]) == list(range(COUNT))


def test_other_data_is_refused(config, tmp_path):
    state = make(config).get_state()
    config.shuffle_seed = 9
    with pytest.raises(UserError, match="shuffle_seed was 3 and is 9"):
        make(config).set_state(state)
    write(tmp_path / "a.jsonl", [{"text": "other"}])
    with pytest.raises(UserError, match="lines was 30 and is 21"):
        make(config).set_state(state)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_out_the_documents(config, count):
    everything = list(make(config))
    parts = [list(make(config, process_index=p, process_count=count)) for p in range(count)]
    assert {len(part) for part in parts} == {len(everything)}  # no process ends before another
    joined = [{n: np.concatenate([b[n] for b in batches]) for n in batches[0]} for batches in zip(*parts, strict=True)]
    assert_same(joined, everything)
    numbers = [documents_in(part) for part in parts]
    assert sorted(sum(numbers, [])) == list(range(COUNT))
    assert all(numbers)


def test_evaluation_is_one_pass_in_order(config):
    config.eval, config.epochs, config.sequence_length = config.train, 0, 1024
    data = make(config, train=False)
    start = data.get_state()
    batches = list(data)
    assert documents_in(batches) == list(range(COUNT))
    data.set_state(start)
    assert_same(list(data), batches)


def test_the_last_batch_ends_with_dead_rows(config, tmp_path):
    config.eval = (write(tmp_path / "eval.jsonl", [{"text": "a single line"}]),)
    (batch,) = make(config, train=False)
    assert (batch["segment_ids"].max(axis=1) == [1, 0, 0, 0]).all()
    assert not batch["tokens"][1:].any() and not batch["loss_weights"][1:].any()


def test_long_chats_are_cut_off_and_long_texts_are_split(config, tmp_path):
    long = "again and again " * 30
    records = [{"text": long}, {"messages": [USER, said(long)]}, {"messages": [{"role": "user", "content": long}, said("No")]}]
    config.eval = (write(tmp_path / "eval.jsonl", records),)
    data = make(config, train=False)
    batches = list(data)
    text, chat, _ = (encode(record) for record in records)
    placed = np.concatenate([batch["tokens"][batch["segment_ids"] > 0] for batch in batches])
    assert len(placed) == len(text.tokens) + 48  # nothing to train on is left of the last chat
    assert any((row == chat.tokens[:48]).all() for batch in batches for row in batch["tokens"])
    assert data.truncated == 2 and data.bad_lines == 0


# --- bad lines ------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(config, tmp_path):
    good = [{"text": f"number {i}"} for i in range(3)]
    bad = ["\n", "not json\n", {"text": 5}, "\n", *[{"other": i} for i in range(6)]]
    config.train = (write(tmp_path / "damaged.jsonl", [good[0], *bad, *good[1:]]),)
    return config


def test_stopping_at_a_bad_line(damaged):
    damaged.eval = damaged.train
    with pytest.raises(
        UserError, match=r"damaged.jsonl:3: the line is not valid JSON: .*; correct the line, or set data.bad_lines"
    ):
        next(make(damaged, train=False))
    with pytest.raises(UserError, match=r"damaged.jsonl:\d+: "):
        next(make(damaged))


def test_skipping_bad_lines(damaged, caplog):
    damaged.bad_lines, damaged.eval = "skip", damaged.train
    data = make(damaged, train=False)
    with caplog.at_level(logging.WARNING):
        assert documents_in(data) == [0, 1, 2]
    assert data.bad_lines == 8
    named = re.findall(r"bad line skipped: \S+damaged.jsonl:(\d+): ", caplog.text)
    assert named == ["3", "4", "6", "7", "8"] and "(further ones are only counted)" in caplog.text
    assert "'text' must be a string" in caplog.text


def test_the_count_of_bad_lines_is_part_of_the_position(damaged):
    damaged.bad_lines, damaged.epochs = "skip", 2
    data = make(damaged)
    list(data)
    assert data.bad_lines == 16 and data.documents == 22
    resumed = make(damaged)
    resumed.set_state(data.get_state())
    assert (resumed.bad_lines, resumed.documents) == (16, 22)


@pytest.mark.parametrize("epochs", [0, 1])
def test_data_without_a_usable_line_is_an_error(config, tmp_path, epochs):
    config.train = (write(tmp_path / "bad.jsonl", [{"other": 1}] * 3),)
    config.bad_lines, config.epochs = "skip", epochs
    with pytest.raises(UserError, match="none of the 3 lines"):
        next(make(config))


def test_one_usable_line_is_enough(config, tmp_path):
    config.train = (write(tmp_path / "bad.jsonl", [{"text": "number 7"}, {"other": 1}, {"other": 2}, {"other": 3}]),)
    config.bad_lines, config.epochs = "skip", 20
    assert documents_in(make(config)) == [7] * 20


def test_a_file_that_vanishes_is_an_error_even_if_bad_lines_are_skipped(config, tmp_path):
    config.bad_lines = "skip"
    data = make(config)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match="a.jsonl cannot be read: No such file"):
        list(data)


def test_extrathat_do_not_go_together(config):
    with pytest.raises(UserError, match="must be a multiple of the number of processes"):
        make(config, process_count=3)
    config.shuffle_seed = -1
    with pytest.raises(UserError, match="shuffle_seed is -1"):
        make(config)
