"""Packing: every token of every document, once and in order, in rows that keep the batch's contract."""

import json
from collections import defaultdict

import grain
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen35_jax.train.data import Document, Example, Rows, TrainData
from qwen35_jax.train.data.batches import WAITING

SCALE = 1000  # token = SCALE * (document + 1) + position


class Lines(list):
    """Stands for JsonLines where the stream holds examples already."""

    size = 0


@st.composite
def example_lists(draw):
    lengths = draw(st.lists(st.integers(2, 40), min_size=1, max_size=40))
    examples = []
    for i, length in enumerate(lengths):
        weights = np.array(draw(st.lists(st.integers(0, 1), min_size=length, max_size=length)), np.float32)
        weights[0], weights[1] = 0, 1  # what the encoder promises, and something to train on in front
        tokens = SCALE * (i + 1) + np.arange(length, dtype=np.int32)
        examples.append(Example(tokens, weights, splittable=draw(st.booleans())))
    return examples


def make_stream(examples, rows, length):
    stream = grain.MapDataset.source(examples)
    return TrainData(Lines(examples), stream, (rows, length), skip=False, seed=None)


def segments_of(batch):
    """The segments of a batch as (tokens, weights), after a check of the row's form."""
    for tokens, ids, weights in zip(batch["tokens"], batch["segment_ids"], batch["loss_weights"], strict=True):
        count = ids.max()
        used = np.count_nonzero(ids)
        assert not ids[used:].any() and not tokens[used:].any() and not weights[used:].any()
        assert list(np.unique(ids[:used])) == list(range(1, count + 1))
        assert (np.diff(ids[:used]) >= 0).all()
        for segment in range(1, count + 1):
            yield tokens[ids == segment], weights[ids == segment]


@settings(max_examples=60)
@given(example_lists(), st.integers(1, 4), st.integers(4, 48))
def test_every_token_once_and_in_order(examples, rows, length):
    data = make_stream(examples, rows, length)
    pieces = defaultdict(list)
    for batch in data:
        assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == {
            "tokens": ((rows, length), "int32"),
            "segment_ids": ((rows, length), "int32"),
            "loss_weights": ((rows, length), "float32"),
        }
        for tokens, weights in segments_of(batch):
            pieces[int(tokens[0]) // SCALE - 1].append((tokens, weights))
    assert sorted(pieces) == list(range(len(examples)))
    for i, example in enumerate(examples):
        end = len(example.tokens) if example.splittable else length
        parts = sorted(pieces[i], key=lambda part: part[0][0])
        np.testing.assert_array_equal(np.concatenate([tokens for tokens, _ in parts]), example.tokens[:end])
        expected = example.loss_weights[:end].copy()
        expected[::length] = 0  # nothing predicts the first token of a piece
        np.testing.assert_array_equal(np.concatenate([weights for _, weights in parts]), expected)
    assert data.truncated == sum(not e.splittable and len(e.tokens) > length for e in examples)


@settings(max_examples=25)
@given(example_lists(), st.integers(1, 3), st.integers(4, 24), st.integers(0, 8))
def test_resuming_from_any_batch(examples, rows, length, stop):
    data = make_stream(examples, rows, length)
    for _, _ in zip(range(stop), data, strict=False):
        pass
    state = json.loads(json.dumps(data.get_state()))
    resumed = make_stream(examples, rows, length)
    resumed.set_state(state)
    for expected, batch in zip(data, resumed, strict=True):
        for name in expected:
            np.testing.assert_array_equal(batch[name], expected[name])
    assert resumed.get_state() == data.get_state()


def filled(length, splittable=False):
    return Example(np.ones(length, np.int32), np.r_[0, np.ones(length - 1)].astype(np.float32), splittable)


def test_a_document_without_room_waits_and_shorter_ones_go_first():
    data = make_stream([filled(6), filled(7), filled(2), filled(2), filled(1 + 2)], rows=1, length=10)
    ids = [batch["segment_ids"][0].tolist() for batch in data]
    assert ids == [[1] * 6 + [2] * 2 + [3] * 2, [1] * 7 + [2] * 3]


def test_the_number_of_waiting_documents_is_bounded():
    data = make_stream([filled(6)] * 100, rows=1, length=10)
    next(data)
    assert len(data.get_state()["waiting"]) == WAITING
    assert sum(1 for _ in data) == 99


def test_a_long_document_is_one_entry_of_the_state():
    data = make_stream([filled(1000, splittable=True)], rows=2, length=10)
    next(data)
    assert data.get_state()["waiting"] == [[0, 20]]
    assert sum(1 for _ in data) == 49


def test_rows_at_their_limits():
    rows = Rows(2, 4)
    assert rows.add(np.ones(4, np.int32), np.ones(4, np.float32)) and not rows.full
    assert not rows.add(np.ones(5, np.int32), np.ones(5, np.float32))
    document = Document(0, filled(9, splittable=True))
    assert not document.place(rows) and document.offset == 4 and rows.full and rows.used == 8
