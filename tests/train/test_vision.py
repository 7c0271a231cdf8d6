"""Training on pictures: one curve on every mesh and in parts, frozen and new towers, resuming, export, wrong configurations."""

from __future__ import annotations

import itertools
import json

import jax
import numpy as np
import pytest

import qwen35_jax
from qwen35_jax.checkpoint import open_source
from qwen35_jax.config import ModelConfig
from qwen35_jax.errors import UserError
from qwen35_jax.train.config import check_config
from qwen35_jax.train.data import make_data
from qwen35_jax.train.loop import train
from qwen35_jax.train.partition import flatten
from qwen35_jax.train.run import Run, find_origin, initial_state, make_run
from tests.train.picture_data import LENGTH, PATCH_ROWS, PATCHES, ROWS, image, picture_config, text
from tests.vision_checkpoint import picture, write_checkpoint

STEPS = 3
TOLERANCE = 1e-4  # one mesh against another, fp32: sums in other orders, through the updates
TOWER = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 48, "in_channels": 3,
    "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2, "num_position_embeddings": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    picture_config(folder)
    write_checkpoint(folder / "text", layers=2, vision=False)
    return folder


def make(folder, **changes) -> Run:
    config = picture_config(folder, **changes)
    check_config(config)
    return make_run(config, find_origin(config))


def batches(run: Run, count: int, parts: int = 1) -> list[dict]:
    data = make_data(run.config.data, run.tokenizer(), run.template(), reader=run.pictures(parts))
    found = list(itertools.islice(data, count))
    data.close()
    return found


COMPILED: dict = {}


def compiled(run: Run):
    """The compiled step; one for all runs of a configuration."""
    key = run.config.to_json()
    if key not in COMPILED:
        COMPILED[key] = run.train_step().compile()
    return COMPILED[key]


def steps(run: Run, found: list[dict], state: dict | None = None) -> tuple[list[list[float]], dict]:
    """(loss, loss of the next but one token, norm of the gradient) of each step, and the state after them."""
    step, state, numbers = compiled(run), state or initial_state(run), []
    like = run.batch(run.config.accumulate)
    for batch in found:
        placed = {name: jax.device_put(batch[name].reshape(x.shape), x.sharding) for name, x in like.items()}
        state, metrics = step(state, placed)
        numbers.append([float(metrics.get(name, 0.0)) for name in ("loss", "mtp_loss", "gradient_norm")])
    return numbers, state


@pytest.fixture(scope="module")
def expected(folder):
    run = make(folder)
    found = batches(run, STEPS)
    assert any((batch["vision_rows"] >= 0).any() for batch in found)
    return found, steps(run, found)[0]


SLOW = (pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("8x1", "1x8", "2x2x2"))


@pytest.mark.parametrize("mesh", ["4x2", *SLOW])
def test_every_mesh_gives_one_curve(folder, expected, mesh):
    """Tower cut over `model` or not, its rows over the data axes or over all devices, beside text rows of other devices."""
    run = make(folder, mesh=mesh, remat="full")
    assert (run.tower.layout.rows == "I") == (mesh == "1x8")
    np.testing.assert_allclose(steps(run, expected[0])[0], expected[1], rtol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["2x1", "4x2"])
def test_pictures_in_sequences_that_are_cut(folder, expected, mesh):
    """The tower's rows lie over all data shards, of which each holds a part of every sequence."""
    run = make(folder, mesh=mesh, context_parallel=True)
    assert run.tower.sharding.size(run.tower.layout.rows) == int(mesh[0])
    np.testing.assert_allclose(steps(run, expected[0])[0], expected[1], rtol=TOLERANCE)


def test_accumulated_parts_are_the_whole_batch(folder):
    """The same rows, as two parts and as one batch, whose rows of the tower count on over both."""
    run = make(folder, accumulate=2)
    found = batches(run, 1, parts=2)
    whole = [dict(batch, vision_rows=batch["vision_rows"].copy()) for batch in found]
    for batch in whole:
        second = batch["vision_rows"][ROWS // 2 :]
        second[second >= 0] += PATCH_ROWS // 2 * PATCHES // 4
    np.testing.assert_allclose(steps(run, found)[0], steps(make(folder), whole)[0], rtol=TOLERANCE)


def test_what_is_shown_changes_what_is_learned(folder, expected):
    run = make(folder)
    other = [dict(batch, patches=255 - batch["patches"]) for batch in expected[0][:1]]
    assert abs(steps(run, other)[0][0][0] - expected[1][0][0]) > 1e-3


def test_a_frozen_tower_stays(folder, expected):
    run = make(folder, freeze=("^vision",), loss__mtp=0.0)
    state = initial_state(run)
    before = jax.tree.map(np.array, state["frozen"]["vision"])
    assert "vision" not in state["params"] and "positions" in before["embed"]
    numbers, state = steps(run, expected[0][:2], state)
    jax.tree.map(np.testing.assert_array_equal, state["frozen"]["vision"], before)
    assert numbers[0][0] == pytest.approx(expected[1][0][0], rel=1e-6)


def test_a_tower_alone_is_trained(folder, expected):
    """Everything of the text model frozen: the tower moves, and the loss falls."""
    run = make(folder, freeze=("^(?!vision)",), loss__mtp=0.0)
    state = initial_state(run)
    before = jax.tree.map(np.array, state["params"])
    assert set(before) == {"vision"}
    step, losses = compiled(run), []
    for _ in range(5):
        state, metrics = step(state, expected[0][0])
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    moved = flatten(jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != b)), state["params"], before))
    # A bias of keys moves all scores of a query alike, so it has no gradient but rounding.
    assert all(value for path, value in moved.items() if not path.endswith("/k/bias")), moved


def test_a_batch_without_pictures(folder, expected):
    """Its rows of patches are padding; nothing of them reaches the loss or the gradient."""
    batch = {name: x.copy() for name, x in expected[0][0].items()}
    shown = (batch["vision_rows"] >= 0).any(axis=1)
    for name in ("tokens", "segment_ids", "loss_weights", "patches", "frames"):
        batch[name][shown if name in ("tokens", "segment_ids", "loss_weights") else ...] = 0
    batch["vision_rows"][:] = -1
    junk = dict(batch, patches=np.full_like(batch["patches"], 77))
    run = make(folder)
    numbers = [steps(run, [b])[0] for b in (batch, junk)]
    assert np.isfinite(numbers).all() and numbers[0] == numbers[1]


@pytest.mark.slow
def test_muon_lora_and_bfloat16(folder, expected):
    """Muon takes the tower's linear layers, LoRA finds them and its loss falls; bfloat16 is near."""
    run = make(folder, optimizer__name="muon", dtype="bfloat16", loss__mtp=0.0)
    numbers, _ = steps(run, expected[0][:1])
    assert numbers[0][0] == pytest.approx(expected[1][0][0], rel=2e-2)
    run = make(folder, lora__rank=2, lora__match=("vision/blocks/(q|proj)/weight", "mixer/q"), loss__mtp=0.0)
    assert sorted(run.state["params"]["vision"]["blocks"]) == ["proj", "q"]
    assert run.state["params"]["vision"]["blocks"]["q"]["weight"]["a"].shape == (1, 24, 2)
    state, losses, step = initial_state(run), [], compiled(run)
    for _ in range(4):
        state, metrics = step(state, expected[0][0])
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]


def test_text_runs_hold_no_tower(folder):
    run = make(folder, data__patches=0)
    assert set(run.batch()) == {"tokens", "segment_ids", "loss_weights"}
    assert "vision" not in run.state["params"] and run.pictures() is None


def test_resuming_and_export(folder, tmp_path):
    """Three steps, or one and then two more: bitwise the same directory, whose tower has moved and is loaded."""
    changes = {"loss__mtp": 0.0, "optimizer__schedule": "constant", "data__eval": (str(folder / "chats.jsonl"),)}
    config, first = (picture_config(folder, steps=n, **changes) for n in (3, 1))
    metrics = train(config, str(tmp_path / "whole"), export_dir=str(tmp_path / "whole_hf"))
    assert np.isfinite(metrics["eval/loss"])
    train(first, str(tmp_path / "cut"))
    train(config, str(tmp_path / "cut"), export_dir=str(tmp_path / "cut_hf"))
    tensors = [open_source(str(tmp_path / name)) for name in ("whole_hf", "cut_hf")]
    before = open_source(str(folder / "model"))
    visual = [name for name in tensors[0].tensors if name.startswith("model.visual.")]
    assert len(visual) == 21 and set(tensors[0].tensors) == set(before.tensors)
    for name in tensors[0].tensors:
        np.testing.assert_array_equal(tensors[0].read(name), tensors[1].read(name))
    name = "model.visual.patch_embed.proj.weight"
    assert np.any(tensors[0].read(name) != before.read(name))
    lm = qwen35_jax.load(str(tmp_path / "cut_hf"), dtype="float32")
    chat = [{"role": "user", "content": [image(picture()), text("Which?")]}]
    assert lm.generate([chat], max_new_tokens=2, temperature=0)[0].token_ids


def test_a_new_tower_for_a_model_of_text(folder, tmp_path, capsys):
    """It gets one of random weights; the export describes it, and is loaded."""
    changes = {"model__source": str(folder / "text"), "model__vision": TOWER, "model__tokenizer": str(folder / "model")}
    config = picture_config(folder, **changes, steps=1, loss__mtp=0.0)
    origin = find_origin(config)
    assert (origin.config.image_token_id, origin.config.video_token_id) == (4075, 4076)
    train(config, str(tmp_path / "run"), export_dir=str(tmp_path / "hf"))
    assert "the vision tower starts from random weights" in capsys.readouterr().err
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["vision_config"]["depth"] == 2 and written["image_token_id"] == 4075
    assert ModelConfig.from_hf(written).vision == origin.config.vision
    assert (tmp_path / "hf" / "preprocessor_config.json").exists()
    lm = qwen35_jax.load(str(tmp_path / "hf"), dtype="float32")
    chat = [{"role": "user", "content": [image(picture()), text("Which?")]}]
    assert lm.generate([chat], max_new_tokens=2, temperature=0)[0].token_ids
    text_source, seeing = open_source(str(folder / "text")), open_source(str(tmp_path / "hf"))
    assert set(text_source.tensors) < set(seeing.tensors)


WRONG = [
    ({"data__patches": 66}, "data.patches is 66; it must be a multiple of 4"),
    ({"data__patch_rows": 6, "mesh": "4x1"}, "data.patch_rows .6. must be a multiple of 4"),
    ({"data__patch_rows": 8, "mesh": "2x1", "accumulate": 8, "data__batch_size": 16}, "must be a multiple of 16"),
    ({"data__patch_rows": 3, "accumulate": 2}, "data.patch_rows .3. must be a multiple of accumulate"),
    ({"model__source": "TEXT"}, "the model has no vision tower for pictures"),
    ({"model__vision": TOWER}, "the checkpoint has one: leave it empty"),
    ({"model__source": "TEXT", "model__vision": TOWER | {"out_hidden_size": 64}}, "must be the model's width, 48"),
    ({"model__source": "TEXT", "model__vision": {"depth": 2}}, "config.model.vision.hidden_size: give exactly|in_channels: give"),
    ({"model__source": "TEXT", "model__vision": TOWER | {"hidden_size": 36}}, "hidden_size is 36; it must be a multiple of 4 x"),
    ({"model__source": "TEXT", "model__vision": TOWER | {"num_position_embeddings": 15}}, "is 15; it must be a square"),
    ({"model__source": "TEXT", "model__vision": TOWER | {"in_channels": 1}}, "in_channels is 1; it must be 3"),
    ({"model__source": "TEXT", "model__vision": TOWER | {"num_heads": 0}}, "num_heads is 0; it must be a whole number"),
    ({"model__source": "TEXT", "model__vision": TOWER | {"depth": "4"}}, "depth is '4'; it must be a whole number"),
    ({"model__source": "TEXT", "model__vision": TOWER, "lora__rank": 2}, "train the tower first, with config.lora.rank 0"),
    ({"model__vision": TOWER, "data__patches": 0}, "only pictures train: set config.data.patches"),
    ({"data__patches": 0, "data__fps": 1.0}, "config.data.fps is about pictures"),
    ({"freeze": ("^vision/nothing",)}, "matches no parameter"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_wrong_configurations(folder, changes, message):
    if changes.get("model__source") == "TEXT":
        changes = changes | {"model__source": str(folder / "text")}
    with pytest.raises(UserError, match=message) as error:
        make(folder, **changes)
    assert "\n" not in str(error.value)


def test_several_hosts_skip_no_pictures(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="several hosts cannot skip lines with pictures"):
        train(picture_config(folder, data__bad_lines="skip"), str(tmp_path / "run"))


def test_settings_of_a_run(folder):
    run = make(folder, data__max_pixels=1024, data__max_frames=2)
    assert not run.draws_tower
    assert run.pictures().settings.max_pixels == 1024 and run.pictures().settings.max_frames == 2
    assert run.pictures().shape.length == PATCHES and run.batch()["positions"].shape == (ROWS, 3, LENGTH)
