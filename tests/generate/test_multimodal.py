"""Pictures through the Python door: every way to give them, what they become in the prompt, and what is wrong with them."""

from __future__ import annotations

import base64
import io
import time

import numpy as np
import pytest
from PIL import Image

import qwen35_jax
from qwen35_jax import UserError
from qwen35_jax.generate.multimodal import content_with_pictures
from qwen35_jax.model import FrameQueue, vision_positions
from qwen35_jax.vision_io import Picture, Visual, collect_pictures, expand, messages
from tests.vision_checkpoint import IMAGE, VIDEO, picture, write_checkpoint

GREEDY = {"temperature": 0.0, "ignore_eos": True, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory) -> qwen35_jax.LanguageModel:
    return qwen35_jax.load(write_checkpoint(tmp_path_factory.mktemp("seeing") / "model"), dtype="float32")


@pytest.fixture(scope="module")
def blind(tmp_path_factory) -> qwen35_jax.LanguageModel:
    directory = tmp_path_factory.mktemp("blind") / "model"
    return qwen35_jax.load(write_checkpoint(directory, layers=2, vision=False), dtype="float32")


def user(*parts) -> list[dict]:
    return [{"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}]


def image(source) -> dict:
    return {"type": "image", "image": source}


def test_positions(seeing):
    """Text, an image of 2 x 3 tokens, text, a video of two frames of 1 x 2 behind one token each, text."""
    tokens = np.array([5, 6, *[IMAGE] * 6, 7, *[VIDEO] * 2, 8, *[VIDEO] * 2, 9])
    queue = FrameQueue(["video", "image"], [(2, 2, 4), (1, 4, 6)], 2)
    positions, offset, spans = vision_positions(tokens, queue, seeing.config)
    queue.finish()
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 6, 8, 9, 9, 11],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 6, 8, 9, 9, 11],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
    ]
    assert offset == 12 - 15
    assert [(s.start, s.count, s.visual, s.row) for s in spans] == [(2, 6, 1, 0), (9, 2, 0, 0), (12, 2, 0, 2)]


def test_images_side_by_side(seeing):
    tokens = np.array([IMAGE] * 4 + [IMAGE] * 2)
    positions, _, spans = vision_positions(tokens, FrameQueue(["image"] * 2, [(1, 4, 4), (1, 2, 4)], 2), seeing.config)
    assert positions[0].tolist() == [0] * 4 + [2] * 2 and [s.visual for s in spans] == [0, 1]


def test_what_a_prompt_says():
    """A video's triple becomes one for each temporal patch, behind its time; an image's pad is repeated."""
    shown = Visual("video", np.zeros((8, 1), np.uint8), (2, 2, 2), 2, (0.375, 1.625))
    still = Visual("image", np.zeros((16, 1), np.uint8), (1, 4, 4), 2)
    start, end = "<|vision_start|>", "<|vision_end|>"
    text = f"a{start}<|video_pad|>{end}b{start}<|image_pad|>{end}c"
    frame = f"{start}<|video_pad|>{end}"
    expected = f"a<0.4 seconds>{frame}<1.6 seconds>{frame}b{start}{'<|image_pad|>' * 4}{end}c"
    assert expand(text, [still, shown]) == expected


def test_sources_say_the_same(seeing, tmp_path):
    pixels, file = picture(), io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    (tmp_path / "a.png").write_bytes(file.getvalue())
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    prompts = [user(image(x), "What?") for x in (pixels, Image.fromarray(pixels), str(tmp_path / "a.png"), file.getvalue(), url)]
    prompts.append(user({"type": "image_url", "image_url": {"url": url}}, "What?"))
    prompts.append(user({"type": "image_url", "image_url": url}, "What?"))
    prompts.append(user(image(seeing.prepare(prompts[0]).visuals[0]), "What?"))
    ready = [seeing.prepare(p) for p in prompts]
    assert ready[0].token_ids.count(IMAGE) == 6
    for other in ready[1:]:
        assert other.token_ids == ready[0].token_ids
        np.testing.assert_array_equal(other.visuals[0].patches, ready[0].visuals[0].patches)


def test_generate_is_the_argmax_of_logits(seeing):
    """Images, a video and text; a text-only neighbour; whole and in chunks that cut through the image."""
    clip = np.stack([picture(16, 16, seed) for seed in range(3)])
    chat = user(
        "Compare ", image(picture(56, 64)), " with ", {"type": "video", "video": clip, "fps": 2}, image(picture(16, 16, 9)), "?"
    )
    answers = seeing.generate([chat, "Once upon a time"], **GREEDY)
    ids = answers[0].prompt_token_ids + answers[0].token_ids
    assert (ids.count(IMAGE), ids.count(VIDEO)) == (56 + 2 * 2, 2 * 4)
    logits = np.asarray(seeing.logits([ids], images=[picture(56, 64), picture(16, 16, 9)], videos=[(clip, 2)]))[0]
    start = len(answers[0].prompt_token_ids) - 1
    assert logits[start:-1, : seeing.vocabulary].argmax(-1).tolist() == answers[0].token_ids
    chunked = seeing.generate([chat, "Once upon a time"], prefill_chunk=64, **GREEDY)
    assert [a.token_ids for a in chunked] == [a.token_ids for a in answers]
    assert seeing.generate("Once upon a time", **GREEDY)[0].token_ids == answers[1].token_ids
    other = np.asarray(seeing.logits([ids], images=[picture(56, 64, 1), picture(16, 16, 9)], videos=[(clip, 2)]))[0]
    assert np.abs(other - logits)[-1].max() > 1e-3  # it does look


def test_settings_of_a_call(seeing):
    chat = user(image(picture(64, 64)))
    assert seeing.prepare(chat).visuals[0].tokens == 64
    assert seeing.prepare(chat, max_pixels=1024).visuals[0].tokens == 16
    clip = user({"type": "video", "video": np.zeros((40, 8, 8, 3), np.uint8), "fps": 10})
    assert seeing.prepare(clip).visuals[0].grid[0] == 4
    assert seeing.prepare(clip, fps=5).visuals[0].grid[0] == 10
    assert seeing.prepare(clip, fps=5, max_frames=4).visuals[0].grid[0] == 2


def test_remote_media_that_are_allowed(seeing, monkeypatch):
    """By the option of a call, in every form that takes it; without it nothing is fetched."""
    file, asked, url = io.BytesIO(), [], "https://example.com/a.png"
    Image.fromarray(picture()).save(file, "PNG")
    monkeypatch.setattr(messages, "fetch", lambda url, limit: asked.append(url) or file.getvalue())
    chat, allowed = user(image(url), "What?"), {"allow_remote_media": True}
    (expected,) = seeing.generate([user(image(picture()), "What?")], **GREEDY)
    assert seeing.generate([chat], **allowed, **GREEDY) == [expected]
    assert sum((p.token_ids for p in seeing.stream([chat], **allowed, **GREEDY)), []) == expected.token_ids
    assert seeing.encode(chat, **allowed) == expected.prompt_token_ids
    assert seeing.logits([expected.prompt_token_ids], images=[url], **allowed).shape[0] == 1
    assert asked == [url] * 4
    for options in ({}, {"allow_remote_media": False}):
        _wrong(chat, "remote URLs are not fetched unless allow_remote_media is set", seeing, **options)
    assert len(asked) == 4


def test_what_a_part_says_about_its_picture(seeing):
    """Its limits hold beside those of the call, whichever is smaller."""

    def tokens(part: dict, **options) -> int:
        return seeing.prepare(user(part), **options).visuals[0].tokens

    still = image(picture(64, 64))
    assert tokens(still | {"max_pixels": 1024}) == tokens(still | {"max_pixels": 2048}, max_pixels=1024) == 16
    assert tokens(still | {"max_pixels": 1024}, max_pixels=2048) == 16
    assert tokens(image(picture(8, 8)) | {"min_pixels": 1024}) == 16
    clip = {"type": "video", "video": np.zeros((40, 8, 8, 3), np.uint8), "fps": 10}
    assert tokens(clip | {"max_frames": 4}) == tokens(clip | {"max_frames": 6}, max_frames=4) == 2
    assert tokens(clip | {"min_pixels": 256}) == 4 * tokens(clip)


def test_the_tower_is_loaded_when_a_picture_comes(tmp_path):
    """And so are the files about its pictures, which need not be right for a prompt of text."""
    processor = write_checkpoint(tmp_path / "model") / "preprocessor_config.json"
    right = processor.read_text()
    processor.write_text('{"size": 448}')
    lm = qwen35_jax.load(tmp_path / "model", dtype="float32")
    lm.generate("Hello", **GREEDY)
    assert lm.vision.encoder.params is None
    with pytest.raises(UserError, match="preprocessor_config.json: size is 448"):
        lm.prepare(user(image(picture())))
    processor.write_text(right)
    before = lm.stats()["weight_bytes_per_device"]
    ready = lm.prepare(user(image(picture())))
    loaded, begin = lm.stats()["load_seconds"], time.perf_counter()
    assert lm.generate(ready, **GREEDY)[0].prompt_token_ids == ready.token_ids
    stats, passed = lm.stats(), time.perf_counter() - begin
    assert stats["weight_bytes_per_device"] > before and stats["load_seconds"] > loaded
    assert 0 < stats["vision_seconds"] < passed - lm.vision.encoder.compile_seconds
    lm.generate("Hello", **GREEDY)
    assert lm.stats()["vision_seconds"] == 0


def test_a_picture_goes_through_the_tower_once(seeing, monkeypatch):
    """Within a batch, and from one turn of a chat to the next; the rows are those of the picture, not of its place."""
    encode, seen = seeing.vision.encoder.encode, []
    monkeypatch.setattr(seeing.vision.encoder, "encode", lambda visuals: seen.append(len(visuals)) or encode(visuals))
    a, b = picture(64, 96, seed=31), picture(64, 96, seed=32)
    turn = user(image(a), "and ", image(b), "and ", image(a))
    (first, other) = seeing.generate([turn, user(image(b))], **GREEDY)
    answered = [*turn, {"role": "assistant", "content": "yes"}, *user(image(picture(32, 32, seed=33)), "?")]
    (later,) = seeing.generate([answered], **GREEDY)
    assert seen == [2, 1]
    assert seeing.generate(["Hello"], **GREEDY) and seeing.generate([answered], **GREEDY) == [later]
    assert seen == [2, 1, 0, 0] and seeing.stats()["vision_seconds"] == 0
    seeing.vision.seen.clear()
    assert seeing.generate([answered], **GREEDY) == [later]
    assert seeing.generate([turn, user(image(b))], **GREEDY) == [first, other]
    wide, high = np.full((64, 96, 3), 7, np.uint8), np.full((96, 64, 3), 7, np.uint8)  # alike but for their shapes
    seeing.generate([user(image(wide), image(high), image(wide))], **GREEDY)
    assert seen[4:] == [3, 0, 2]


def _wrong(prompt, message: str, lm, **options):
    with pytest.raises(UserError, match=message) as error:
        lm.generate([prompt], **GREEDY, **options)
    assert "\n" not in str(error.value)


def test_wrong_prompts(seeing, blind):
    pad = "<|vision_start|><|image_pad|><|vision_end|>"
    _wrong(user(image(picture()), "What?"), "no vision tower: it cannot be given images", blind)
    _wrong(user(pad, image(picture())), "has 2 marks for images .* but of images 1 are given", seeing)
    _wrong("And " + pad, "has 1 marks for images .* but of images 0 are given", seeing)
    _wrong(user({"type": "image"}), r"messages\[0\].content\[0\] holds no image", seeing)
    _wrong(user({"type": "image_url", "image_url": {}}), "holds no image", seeing)
    _wrong(user({"type": "video_url", "video_url": {"url": "https://example.com/a.mp4"}}), "remote URLs are not fetched", seeing)
    shown = seeing.prepare(user(image(picture()))).visuals[0]
    _wrong(user({"type": "video", "video": shown}), "what is given as video was read as image", seeing)
    _wrong(user(image(shown) | {"max_pixels": 4096}), "max_pixels is given beside what was read before: say it", seeing)
    film = seeing.prepare(user({"type": "video", "video": np.zeros((4, 8, 8, 3), np.uint8)})).visuals[0]
    for name in ("fps", "max_frames", "min_pixels"):
        _wrong(user({"type": "video", "video": film, name: 4096}), f"{name} is given beside what was read before", seeing)
    _wrong(user(image("https://example.com/a.png")), "remote URLs are not fetched", seeing)
    _wrong(user(image(b"text")), "is no image that can be read", seeing)
    _wrong(user({"type": "video", "video": np.zeros((0, 8, 8, 3), np.uint8)}), "it has no frames", seeing)
    clip = {"type": "video", "video": "a.mp4"}
    _wrong(user(clip | {"nframes": 4}), r"messages\[0\].content\[0\]: nframes is not done for videos; there are min_", seeing)
    _wrong(user(image(picture()) | {"resized_height": 64}), "resized_height is not done for images", seeing)
    _wrong(user(image(picture()) | {"fps": 2}), "fps is not done for images; there are min_pixels, max_pixels", seeing)
    _wrong(user(clip | {"max_pixels": 1.5}), r"content\[0\]: max_pixels is 1.5; expected a whole number", seeing)
    _wrong(user(clip | {"max_pixels": 9, "min_pixels": 10}), "min_pixels is 10, more than max_pixels, 9", seeing)
    _wrong(user(clip | {"max_pixels": 3}), "video a.mp4: max_pixels is 3; it must be at least 64", seeing)
    _wrong([{"role": "system", "content": [image(picture())]}, *user("Hi")], "cannot contain images", seeing)
    _wrong(user(image(picture())), "max_pixels is 3", seeing, max_pixels=3)
    _wrong("Hello", "max_pixels is for chats", seeing, max_pixels=4096)
    _wrong(user(*[image(picture(64, 64))] * 20), "smaller pictures", seeing)


def test_wrong_placeholders(seeing):
    ids = seeing.prepare(user(image(picture()), "What?")).token_ids
    with pytest.raises(UserError, match="too few image placeholders"):
        seeing.logits([ids], images=[picture(), picture()])
    with pytest.raises(UserError, match="more image placeholders in the tokens than the 0 images"):
        seeing.logits([ids], videos=[np.zeros((2, 8, 8, 3), np.uint8)])
    with pytest.raises(UserError, match=r"image frames need 12 placeholders in a row \(4 x 3\); there are 6"):
        seeing.logits([ids], images=[picture(32, 24)])
    with pytest.raises(UserError, match="not the model's image_token_id"):
        qwen35_jax.LanguageModel.prepare(_with_tokens(seeing, 7), user(image(picture())))


def _with_tokens(lm, token: int) -> qwen35_jax.LanguageModel:
    """The model as another tokenizer's ids would have it."""
    other = object.__new__(qwen35_jax.LanguageModel)
    other.__dict__ = lm.__dict__ | {"config": lm.config.replace(image_token_id=token)}
    return other


def test_marks_in_a_prompt():
    first, second, clip = Picture("image", "a"), Picture("image", "b"), Picture("video", "c")
    a, b, c = ({"type": p.kind, p.kind: p.source} for p in (first, second, clip))
    assert content_with_pictures("x <image>", []) == "x <image>"
    assert content_with_pictures("x", [first, clip]) == [a, c, {"type": "text", "text": "x"}]
    marked = content_with_pictures("<image>x<image> <video>", [first, second, clip])
    assert marked == [a, {"type": "text", "text": "x"}, b, {"type": "text", "text": " "}, c]
    assert content_with_pictures("x<video>", [first, clip]) == [a, {"type": "text", "text": "x"}, c]
    for text in ("<image>", "<image><image><image>"):
        with pytest.raises(UserError, match="<image> marks for 2 images"):
            content_with_pictures(text, [first, second])


def test_collecting_leaves_text_alone():
    plain = user("Hello")
    assert collect_pictures(plain) == (plain, []) and collect_pictures(plain)[0] is plain
    chat = user("x", {"video": "a.mp4", "fps": 3, "max_pixels": 4096})
    bare, pictures = collect_pictures(chat)
    assert bare[0]["content"][1] == {"type": "video"} and pictures == [Picture("video", "a.mp4", 3, max_pixels=4096)]
    assert bare[0]["content"][0] == chat[0]["content"][0] and bare[0]["role"] == "user"
    assert chat[0]["content"][1]["video"] == "a.mp4"  # the caller's own is as it was
