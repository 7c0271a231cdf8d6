"""Streams of packed batches: shuffled, sharded, resumed; and what bad lines do to them."""

import itertools
import json
import logging
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from qwen35_jax.errors import UserError
from qwen35_jax.text import ChatTemplate, Tokenizer
from qwen35_jax.train.data import BadLines, encode_example, make_data

TINY = Path(__file__).parents[2] / "qwen35_jax" / "assets" / "tiny"
TOKENIZER = Tokenizer.from_directory(TINY)
TEMPLATE = ChatTemplate.from_directory(TINY)
USER = {"role": "user", "content": "Hi"}
COUNT = 30  # documents


def said(content):
    return {"role": "assistant", "content": content}


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


def test_resuming_with_other_rows(config):
    """The position is one of documents, so what is left comes exactly once whatever the batches are."""
    config.batch_size = 2
    data = make(config)
    seen = documents_in(itertools.islice(data, 3))
    config.batch_size = 6
    resumed = make(config)
    resumed.set_state(data.get_state())
    assert sorted(seen + documents_in(resumed)) == list(range(COUNT))


def test_other_data_is_refused(config, tmp_path):
    state = make(config).get_state()
    config.shuffle_seed = 9
    with pytest.raises(UserError, match="shuffle_seed was 3 and is 9"):
        make(config).set_state(state)
    write(tmp_path / "a.jsonl", [{"text": "other"}])
    with pytest.raises(UserError, match="lines was 30 and is 21"):
        make(config).set_state(state)


def test_corrected_lines_are_gone_on_with(config, tmp_path, caplog):
    """A bad line stops a run, so one that is mended may follow; that the bytes are others is said."""
    data = make(config)
    next(data)
    state, expected = data.get_state(), next(data)
    path = tmp_path / "a.jsonl"
    path.write_text(path.read_text() + " ")  # blank: no line
    resumed = make(config)
    resumed.set_state(state)
    assert_same([next(resumed)], [expected])
    assert "the data has been changed since the checkpoint" in caplog.text


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
    text, chat, _ = (encode_example(record, TOKENIZER, TEMPLATE) for record in records)
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
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert documents_in(make(damaged, train=False, quiet=True)) == [0, 1, 2]
    assert not caplog.text


def test_all_bad_lines_are_named_in_a_file_once(damaged, tmp_path, caplog):
    """Over two epochs, and in a run that goes on."""
    damaged.bad_lines, damaged.epochs = "skip", 2
    for _ in range(2):
        named = BadLines(tmp_path / "run")
        with caplog.at_level(logging.WARNING):
            assert len(list(make(damaged, named=named))) > 0
        named.close()
    assert "(further ones are in bad_lines.txt)" in caplog.text
    names = (tmp_path / "run" / "bad_lines.txt").read_text().splitlines()
    places = [re.match(r"\S+damaged.jsonl:(\d+): .", name)[1] for name in names]
    assert len(places) == len(set(places)) == 8


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


def test_a_seed_out_of_range(config):
    config.shuffle_seed = -1
    with pytest.raises(UserError, match="shuffle_seed is -1"):
        make(config)
