"""Gradients of training on pictures against torch autograd through transformers, in float64: the tower's and the text model's.

Documents are packed here and run one by one there, so that packed equals separate too.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the oracle needs torch")
pytest.importorskip("transformers", minversion="5.23", reason="the oracle needs transformers 5.23 or newer")

import jax  # noqa: E402

from qwen35_jax.checkpoint import CanonicalSource, load_params, load_vision_params, open_source  # noqa: E402
from qwen35_jax.checkpoint.canonical import canonical_name  # noqa: E402
from qwen35_jax.checkpoint.names import tensor_parts  # noqa: E402
from qwen35_jax.config import ModelConfig  # noqa: E402
from qwen35_jax.model import Model, VisionModel  # noqa: E402
from qwen35_jax.sharding import Sharding, make_mesh  # noqa: E402
from qwen35_jax.train.data import PatchShape, PictureReader, Rows  # noqa: E402
from qwen35_jax.train.step import Loss, abstract_batch  # noqa: E402
from qwen35_jax.train.weights import Weights, kept_params  # noqa: E402
from qwen35_jax.vision_io import VisionSettings, Visual  # noqa: E402
from tests.oracle import hf_models  # noqa: E402

torch.set_num_threads(1)  # the models are tiny
# Relative error of a tensor's gradient, |ours - exact| / |exact|: what fp32 leaves, as in test_gradients.
TOLERANCE = 1e-4
# Grids in patches behind runs of text: an image, a video of two temporal patches, both; and text alone.
DOCUMENTS = ((20, (1, 6, 8), 9, (2, 4, 6), 30), (41,), (7, (1, 4, 4), (1, 2, 10), 25), (60,))
LENGTH, ROWS, PATCHES, PATCH_ROWS = 130, 8, 64, 8


@functools.cache
def documents(name: str) -> list[tuple[np.ndarray, list[Visual]]]:
    """(token ids with placeholders, visuals) of each document."""
    case, draw, found = hf_models.CASES[name], np.random.default_rng(3), []
    image, video, start, end = (case.vocab - n for n in (2, 3, 4, 5))
    for parts in DOCUMENTS:
        ids, visuals = [], []
        for part in parts:
            if isinstance(part, int):
                ids += draw.integers(0, case.vocab - 8, part).tolist()
                continue
            kind = "image" if part[0] == 1 else "video"
            visuals.append(Visual(kind, draw.integers(0, 256, (int(np.prod(part)), 3 * 2 * 4 * 4), np.uint8), part, 2))
            for _ in range(part[0]):
                ids += [start, *[image if kind == "image" else video] * visuals[-1].frame_tokens, end]
        found.append((np.array(ids, np.int32), visuals))
    return found


def trained_on(name: str, ids: np.ndarray) -> np.ndarray:
    """Which tokens are targets: all but the first and the placeholders."""
    vocab = hf_models.CASES[name].vocab
    return (np.arange(len(ids)) > 0) & (ids != vocab - 2) & (ids != vocab - 3)


@functools.cache
def theirs(name: str) -> tuple[float, dict[str, np.ndarray], hf_models.Oracle]:
    """The mean loss over all documents' targets, and its gradient by canonical tensor name, in float64."""
    oracle = hf_models.build(hf_models.CASES[name])
    exact = hf_models.to_float64(oracle)
    exact.model.requires_grad_(True)
    total, count = 0.0, sum(trained_on(name, ids).sum() for ids, _ in documents(name))
    with hf_models.double_precision():
        for ids, visuals in documents(name):
            logits = exact.model(**_inputs(exact, ids, visuals), use_cache=False).logits[0, :-1]
            exact.model.model.rope_deltas = None
            labels = torch.tensor(np.where(trained_on(name, ids), ids, -100)[1:].astype(np.int64))
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / count
            loss.backward()
            total += loss.item()
    gradients = {canonical_name(n): p.grad.numpy() for n, p in exact.model.named_parameters() if p.grad is not None}
    return total, gradients, oracle


def _inputs(oracle: hf_models.Oracle, ids: np.ndarray, visuals: list[Visual]) -> dict:
    tokens = torch.tensor(ids[None].astype(np.int64))
    result, vocab = {"input_ids": tokens}, oracle.case.vocab
    for kind, pixels, grids in (("image", "pixel_values", "image_grid_thw"), ("video", "pixel_values_videos", "video_grid_thw")):
        if own := [v for v in visuals if v.kind == kind]:
            result[pixels] = torch.tensor(np.concatenate([v.patches for v in own]) / 127.5 - 1, dtype=torch.float64)
            result[grids] = torch.tensor([v.grid for v in own])
    if visuals:
        result["mm_token_type_ids"] = (tokens == vocab - 2).int() + 2 * (tokens == vocab - 3).int()
    return result


def batch(name: str, config: ModelConfig) -> dict[str, np.ndarray]:
    """The documents packed, rows of patches too."""
    shape = PatchShape(PATCH_ROWS, PATCHES, 3 * 2 * 4 * 4, 2)
    reader, rows = PictureReader(config, VisionSettings(), shape), Rows(ROWS, LENGTH, shape.empty())
    for ids, visuals in documents(name):
        assert rows.add(ids, trained_on(name, ids).astype(np.float32), reader.place(ids, visuals))
    packed = rows.batch()
    assert packed["segment_ids"].max() > 1 and packed["frames"].max() > 1  # documents share rows, and so do frames
    return packed


def check(name: str, directory, mesh: str = "1x1", **options) -> None:
    expected_loss, expected, oracle = theirs(name)
    hf_models.save(oracle, directory)
    source = open_source(str(directory))
    config = ModelConfig.from_hf(source.config).replace(dtype="float32")
    source, sharding = CanonicalSource(source, config), Sharding(make_mesh(mesh))
    model, tower = Model(config, sharding), VisionModel(config, sharding)
    kept = kept_params(model, tower)
    params = load_params(source, config, {n: tree for n, tree in kept.items() if n != "vision"})
    params["vision"] = load_vision_params(source, config, kept["vision"])
    loss = Loss(Weights(model, tower=tower), **options)
    places = abstract_batch(model, ROWS, LENGTH, tower=tower, patches=(PATCH_ROWS, PATCHES))
    packed = jax.device_put(batch(name, config), jax.tree.map(lambda x: x.sharding, places))

    def total(params, batch):
        return loss.total(loss.sums(params, {}, batch), loss.totals(batch))

    value, gradients = jax.jit(jax.value_and_grad(total))(params, packed)
    assert float(value) == pytest.approx(expected_loss, rel=2e-5)
    worst = {}
    for parts in tensor_parts(config, mtp=False, vision=True).values():
        for path, view in parts:
            keys = list(path)
            number = keys.pop(2) if keys[:2] == ["vision", "blocks"] else keys.pop(1) if keys[0] == "units" else None
            leaf = functools.reduce(lambda tree, key: tree[key], keys, gradients)
            got = np.asarray(leaf if number is None else leaf[number], np.float64)
            want = view.take(expected[view.name]).astype(np.float64)
            worst["/".join(map(str, path))] = float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-12))
    name_of_worst = max(worst, key=worst.get)
    print(f"{name} {mesh} {options}: worst relative error {worst[name_of_worst]:.1e} in {name_of_worst}")
    bad = {path: f"{error:.1e}" for path, error in worst.items() if not error < TOLERANCE}
    assert not bad, bad


@pytest.mark.parametrize("name", ("vision", "vision_moe"))
def test_gradients(name, tmp_path):
    check(name, tmp_path / "model")


@pytest.mark.parametrize("mesh", ("4x2", "1x8"))
def test_gradients_on_meshes(mesh, tmp_path):
    """A mesh whose `model` divides the tower's heads, and one that does not: there the tower's rows go over all devices."""
    check("vision", tmp_path / "model", mesh)


@pytest.mark.parametrize("options", ({"remat": "none"}, {"remat": "dots", "stacked": False}))
def test_gradients_of_every_form(options, tmp_path):
    check("vision", tmp_path / "model", **options)
