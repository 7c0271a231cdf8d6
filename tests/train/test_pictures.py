"""Pictures in training data: where they may lie, what becomes of their tokens, packing of their patches, and bad ones."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from qwen35_jax.config import ModelConfig
from qwen35_jax.errors import UserError
from qwen35_jax.generate.multimodal import place
from qwen35_jax.text import ChatTemplate, Tokenizer
from qwen35_jax.train.data import EncodeOptions, ExampleEncoder, PatchShape, PictureReader, make_data
from qwen35_jax.vision_io import VisionSettings, patch_places, read_picture
from qwen35_jax.vision_io.messages import Picture
from tests.train.picture_data import LENGTH, PATCH_ROWS, PATCHES, ROWS, chat, image, picture_config, png, text
from tests.vision_checkpoint import IMAGE, VIDEO, picture

WIDTH = 3 * 2 * 4 * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    picture_config(folder)
    return folder


@pytest.fixture(scope="module")
def parts(folder):
    """(tokenizer, template, model's configuration, settings) of the checkpoint."""
    model = folder / "model"
    config = ModelConfig.from_hf(model)
    settings = VisionSettings.from_directory(model, config.vision)
    return Tokenizer.from_directory(model), ChatTemplate.from_directory(model), config, settings


def reader(parts, rows: int = PATCH_ROWS, length: int = PATCHES, ways: int = 1) -> PictureReader:
    return PictureReader(*parts[2:], PatchShape(rows, length, WIDTH, 2, ways))


def data(folder, parts, ways: int = 1, **changes):
    config = picture_config(folder, **changes).data
    return make_data(config, *parts[:2], reader=reader(parts, config.patch_rows, config.patches, ways))


def encoder(parts, loss_on: str = "assistant", **options) -> ExampleEncoder:
    return ExampleEncoder(*parts[:2], EncodeOptions(loss_on), reader(parts, **options))


def test_an_example_is_what_generation_sees(folder, parts):
    """Paths from the line's folder, absolute ones, and data URLs; positions, rows and patches as `generate` has them."""
    lines = [json.loads(line) for line in (folder / "chats.jsonl").read_text().splitlines()]
    (record,) = [line for line in lines if "Look: " in str(line)]
    example = encoder(parts)(record, str(folder))
    video = Picture("video", [str(folder / "clip" / f"{i}.png") for i in range(3)], 2)
    visuals = [read_picture(p, parts[3]) for p in (video, Picture("image", str(folder / "pictures" / "1.png")))]
    placed = place(example.tokens, visuals, [], parts[2])
    np.testing.assert_array_equal(example.pictures.positions, placed.positions)
    np.testing.assert_array_equal(example.pictures.patches, np.concatenate([v.patches for v in visuals]))
    wanted = np.full(len(example.tokens), -1)
    for span in placed.spans:
        first = span.row + (visuals[0].tokens if span.visual else 0)
        wanted[span.start : span.start + span.count] = np.arange(first, first + span.count)
    np.testing.assert_array_equal(example.pictures.rows, wanted)
    said = parts[0].decode(example.tokens[example.loss_weights > 0], skip_special_tokens=False)
    assert said == "Yes.<|im_end|>"


def test_no_placeholder_is_trained_on(folder, parts):
    record = chat([image("pictures/0.png"), text("Which?"), {"type": "video", "video": "clip", "fps": 2}], "That.")
    example = encoder(parts, "all")(record, str(folder))
    shown = np.isin(example.tokens, (IMAGE, VIDEO))
    assert shown.any() and not example.loss_weights[shown].any() and example.loss_weights[1:][~shown[1:]].all()


def test_rows_of_a_batch_are_the_documents(folder, parts):
    """Every document's patches are found through its tokens; positions begin anew; text counts on."""
    pairs = []
    for batch in data(folder, parts, data__epochs=1):
        assert batch["patches"].shape == (PATCH_ROWS, PATCHES, WIDTH) and batch["positions"].shape == (ROWS, 3, LENGTH)
        merged = batch["patches"].reshape(-1, 4 * WIDTH)
        frames = batch["frames"].reshape(-1, 4)
        for r, ids in enumerate(batch["segment_ids"]):
            for segment in range(1, ids.max() + 1):
                here = ids == segment
                rows = batch["vision_rows"][r, here]
                tokens = batch["tokens"][r, here]
                np.testing.assert_array_equal(rows >= 0, np.isin(tokens, (IMAGE, VIDEO)))
                assert (frames[rows[rows >= 0]] > 0).all()
                pairs.append((tokens.tolist(), batch["positions"][r][:, here].tolist(), merged[rows[rows >= 0]].tolist()))
    expected = []
    for line in (folder / "chats.jsonl").read_text().splitlines():
        example = encoder(parts)(json.loads(line), str(folder))
        shown = example.pictures
        positions = np.tile(np.arange(len(example.tokens)), (3, 1)) if shown is None else shown.positions
        patches = [] if shown is None else shown.patches.reshape(-1, 4 * WIDTH)[shown.rows[shown.rows >= 0]].tolist()
        expected.append((example.tokens.tolist(), positions.tolist(), patches))
    assert sorted(pairs) == sorted(expected)


def test_places_and_padding(folder, parts):
    batch = next(data(folder, parts))
    for patches, places, frames in zip(batch["patches"], batch["places"], batch["frames"], strict=True):
        used = np.count_nonzero(frames)
        assert not frames[used:].any() and not patches[used:].any() and (places[used:] == 1).all()
        for frame in range(1, frames.max() + 1):
            found = places[frames == frame]
            np.testing.assert_array_equal(found, patch_places(*found[0, 2:], 2))


def test_parts_have_their_own_rows_of_patches(folder, parts):
    for batch in itertools.islice(data(folder, parts, 4), 3):
        assert batch["vision_rows"].max() < PATCH_ROWS // 4 * PATCHES // 4
        for part in range(4):
            rows = batch["vision_rows"].reshape(4, -1)[part]
            frames = batch["frames"].reshape(4, -1, 4)[part]
            assert (frames[rows[rows >= 0]] > 0).all()
            assert np.count_nonzero(frames[:, 0]) == np.count_nonzero(rows >= 0)


def test_resuming_with_documents_that_wait(folder, parts):
    """Two rows of patches for eight of text: chats with pictures wait for the next batch."""
    changes = {"data__patch_rows": 2}
    stream = data(folder, parts, **changes)
    list(itertools.islice(stream, 3))
    state = json.loads(json.dumps(stream.get_state()))
    assert state["waiting"]
    expected = list(itertools.islice(stream, 4))
    resumed = data(folder, parts, **changes)
    resumed.set_state(state)
    for batch, other in zip(itertools.islice(resumed, 4), expected, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def test_a_chat_that_is_cut_off_keeps_the_first_rows(folder, parts):
    example = encoder(parts)(chat([text("So " * 30), image("pictures/0.png")], "It is."), str(folder))
    cut = example.cut(60)
    assert len(cut.pictures.rows) == 60 == cut.pictures.positions.shape[1] and len(cut.pictures.patches) == 24


WRONG = [
    (chat([image("nowhere.png")], "x"), "nowhere.png: there is no such file"),
    (chat([image("bad.png")], "x"), "bad.png is no image that can be read"),
    (chat([image("https://example.com/a.png")], "x"), "nothing is fetched in training"),
    (chat([image("large.png")], "x"), r"a picture has 216 patches, but a row holds data.patches \(64\)"),
    (chat([image("pictures/2.png")] * 20, "x"), "its pictures have 960 patches, more than fit in the 8 rows of 64"),
    (chat([{"type": "video", "video": "pictures"}], "x"), "pixels, the first is"),
    (chat([image("pictures/0.png"), text("<|image_pad|>")], "x"), "has 2 marks for images .* but of images 1 are given"),
    (chat("And <|video_pad|>", "x"), "has 1 marks for videos"),
    (chat([{"type": "image"}], "x"), "holds no image"),
    (chat([{"type": "audio", "audio": "a.wav"}], "x"), "neither text nor an image nor a video|content"),
]


@pytest.mark.parametrize(("record", "message"), WRONG, ids=lambda x: str(x)[:30] if isinstance(x, str) else "")
def test_bad_pictures(folder, parts, record, message):
    (folder / "bad.png").write_text("text")
    (folder / "large.png").write_bytes(png(picture(64, 96)))
    with pytest.raises(UserError, match=message) as error:
        encoder(parts)(record, str(folder))
    assert "\n" not in str(error.value)


def test_bad_pictures_are_bad_lines(folder, parts, tmp_path):
    lines = [chat([image("nowhere.png")], "x"), chat([image(f"{folder}/pictures/0.png")], "y")]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    changes = {"data__train": (str(tmp_path / "chats.jsonl"),), "data__epochs": 1}
    with pytest.raises(UserError, match=r"chats.jsonl:1: image .*nowhere.png: there is no such file; correct the line"):
        next(data(folder, parts, **changes))
    stream = data(folder, parts, data__bad_lines="skip", **changes)
    (batch,) = list(stream)
    assert stream.bad_lines == 1 and batch["segment_ids"].max() == 1


def test_pictures_in_a_run_of_text(folder, parts):
    with pytest.raises(UserError, match="the run is one of text: set data.patches"):
        ExampleEncoder(*parts[:2])(chat([image("pictures/0.png")], "x"), str(folder))
