"""Videos from files, folders and arrays: which frames are looked at, when they are, how large; and bad input."""

from __future__ import annotations

import base64
import json
import os
import struct

import numpy as np
import pytest
from etils import epath
from PIL import Image

from qwen35_jax.config import ModelConfig
from qwen35_jax.errors import UserError
from qwen35_jax.vision_io import (
    Picture,
    VisionSettings,
    check_source,
    image_size,
    image_visual,
    patch_seconds,
    read_image,
    read_video,
    sample_frames,
    video_size,
    video_visual,
)
from qwen35_jax.vision_io import images as images_module
from qwen35_jax.vision_io import video as video_module
from tests.vision_checkpoint import write_frames, write_video

av = pytest.importorskip("av", reason="reading video files needs PyAV (av)")

SETTINGS = VisionSettings()


def grey(count: int, size: tuple[int, int] = (64, 96)) -> np.ndarray:
    return np.broadcast_to((10 * np.arange(count, dtype=np.uint8))[:, None, None, None], (count, *size, 3))


def test_file(tmp_path):
    """20 frames at 8 a second are looked at twice a second."""
    write_video(tmp_path / "a.mp4", 20)
    frames, seconds = read_video(tmp_path / "a.mp4", SETTINGS)
    assert frames.shape == (5, 64, 96, 3) and seconds == pytest.approx((0.3125, 1.5, 2.375))
    assert np.abs(frames[:, 0, 0, 0].astype(int) - [0, 50, 100, 140, 190]).max() <= 3  # lossy


def test_data_url(tmp_path):
    write_video(tmp_path / "a.mp4", 20)
    url = "data:video/mp4;base64," + base64.b64encode((tmp_path / "a.mp4").read_bytes()).decode()
    (frames, seconds), (expected, times) = (read_video(source, SETTINGS) for source in (url, tmp_path / "a.mp4"))
    np.testing.assert_array_equal(frames, expected)
    assert seconds == times


def test_array_folder_and_list_say_the_same(tmp_path):
    frames = grey(12)
    for i, frame in enumerate(frames):
        Image.fromarray(np.ascontiguousarray(frame)).save(tmp_path / f"frame{i}.png")  # frame10 comes after frame9
    expected, seconds = read_video(frames, SETTINGS, fps=4)
    assert expected[:, 0, 0, 0].tolist() == [0, 20, 40, 70, 90, 110] and seconds == (0.25, 1.375, 2.5)
    for source in (tmp_path, [*frames], sorted(tmp_path.iterdir(), key=lambda p: int(p.stem[5:]))):
        got, same = read_video(source, SETTINGS, fps=4)
        np.testing.assert_array_equal(got, expected)
        assert same == seconds


@pytest.mark.parametrize(
    ("count", "fps", "expected"),
    [(9, 4, [0, 3, 5, 8]), (2, 24, [0, 1]), (1, 24, [0]), (3, 1, [0, 1, 2]), (100, 25, [0, 14, 28, 42, 57, 71, 85, 99])],
)
def test_which_frames(count, fps, expected):
    assert sample_frames(count, fps, SETTINGS) == expected


def test_settings_change_which_frames():
    assert len(sample_frames(100, 10, SETTINGS.changed(fps=5))) == 50
    assert len(sample_frames(100, 10, SETTINGS.changed(fps=5, max_frames=6))) == 6
    assert len(sample_frames(10_000, 1, SETTINGS)) == 768


def test_seconds():
    """Of nine frames at four a second: <0.4 seconds>, <1.6 seconds>; an odd number repeats the last."""
    assert patch_seconds([0, 3, 5, 8], 4, 2) == (0.375, 1.625)
    assert patch_seconds([0, 2, 4], 2, 2) == (0.5, 2.0)


@pytest.mark.parametrize(
    ("frames", "height", "width", "expected"),
    [
        (4, 480, 640, (480, 640)),
        (768, 1080, 1920, (128, 224)),  # the budget of all frames together
        (5, 16, 40, (32, 64)),  # brought to one tile first; 80 / 32 is rounded to the even 2
        (1, 480, 640, (480, 640)),  # one frame is repeated
    ],
)
def test_sizes(frames, height, width, expected):
    assert video_size(frames, height, width, SETTINGS) == expected


def test_a_frame_has_a_budget():
    assert video_size(4, 480, 640, SETTINGS.changed(max_pixels=64 * 64)) == (32, 64)
    for count in (1, 2, 3, 5, 9, 13):  # of which the published rule counts two more or fewer, at times
        limited = SETTINGS.changed(max_pixels=16384)
        assert video_size(count, 128, 160, limited) == (96, 128)
        assert video_size(count, 128, 128, limited) == (128, 128)
    # Nor is a frame made larger than that to fill the smallest budget of all frames.
    assert video_size(2, 40, 60, SETTINGS.changed(max_pixels=1024)) == (32, 32)


def test_a_frame_has_a_least_size():
    settings = SETTINGS.changed(min_pixels=160 * 160)
    assert video_size(4, 64, 64, settings) == (160, 160) and image_size(64, 64, settings) == (160, 160)
    assert image_size(64, 64, SETTINGS) == (256, 256)
    assert video_size(4, 480, 640, settings) == (480, 640)
    assert video_size(4, 64, 64, settings.changed(max_pixels=96 * 96)) == (96, 96)


def test_one_frame_and_an_image_are_cut_alike():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    image, video = image_visual(pixels, SETTINGS), video_visual(pixels[None], (0.0,), SETTINGS)
    np.testing.assert_array_equal(image.patches, video.patches)
    assert image.grid == video.grid == (1, 4, 6) and image.tokens == 6


def test_settings_of_a_checkpoint(tmp_path):
    vision = ModelConfig.preset("0.8b").vision
    assert VisionSettings.from_directory(tmp_path, vision) == SETTINGS
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 4096, "longest_edge": 8192}}))
    (tmp_path / "video_preprocessor_config.json").write_text(
        json.dumps({"fps": 1.0, "max_frames": 8, "size": {"longest_edge": 99999}})
    )
    read = VisionSettings.from_directory(tmp_path, vision)
    assert (read.image_min_pixels, read.image_max_pixels, read.video_max_pixels, read.fps, read.max_frames) == (
        4096,
        8192,
        99999,
        1.0,
        8,
    )


def test_both_processors_in_one_file(tmp_path):
    """As transformers writes them; they go before files that lie beside."""
    image = {"size": {"shortest_edge": 4096, "longest_edge": 8192}, "do_resize": True, "resample": 3, "rescale_factor": 1 / 255}
    video = {"size": {"shortest_edge": 5000, "longest_edge": 9000}, "fps": 0.5, "num_frames": None, "do_sample_frames": True}
    both = {"image_processor": image, "video_processor": video, "processor_class": "Qwen3VLProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(both))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"longest_edge": 99999}}))
    vision = ModelConfig.preset("0.8b").vision
    expected = VisionSettings(image_min_pixels=4096, image_max_pixels=8192, video_min_pixels=5000, video_max_pixels=9000, fps=0.5)
    assert VisionSettings.from_directory(tmp_path, vision) == expected
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen3VLProcessor"}))
    assert VisionSettings.from_directory(tmp_path, vision) == VisionSettings(image_max_pixels=99999)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": 3}))
    with pytest.raises(UserError, match="processor_config.json: image_processor is 3; expected an object"):
        VisionSettings.from_directory(tmp_path, vision)


def test_the_older_names_of_areas(tmp_path):
    raw = {"min_pixels": 3136, "max_pixels": 12845056, "size": {"shortest_edge": 9, "longest_edge": None}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(raw))
    read = VisionSettings.from_directory(tmp_path, ModelConfig.preset("0.8b").vision)
    assert read == VisionSettings(image_min_pixels=3136, image_max_pixels=12845056)


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("preprocessor_config.json", {"patch_size": 14}, "patch_size is 14; supported: 16"),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize is False; supported: True"),
        ("preprocessor_config.json", {"rescale_factor": 1.0}, "rescale_factor is 1.0; supported: 0.0039"),
        ("preprocessor_config.json", {"image_mean": [0.48, 0.46, 0.41]}, "image_mean is .*; supported: .0.5, 0.5, 0.5"),
        ("preprocessor_config.json", {"resample": 2}, "resample is 2; supported: 3"),
        ("preprocessor_config.json", {"size": 448}, "size is 448; expected the areas shortest_edge and longest_edge"),
        ("preprocessor_config.json", {"size": {"height": 448, "width": 448}}, "size is .*; expected the areas"),
        ("preprocessor_config.json", {"max_pixels": 0.5}, "max_pixels is 0.5; expected a whole number"),
        ("video_preprocessor_config.json", {"num_frames": 16}, "num_frames is 16; supported: None"),
        ("video_preprocessor_config.json", {"do_sample_frames": False}, "do_sample_frames is False"),
        ("video_preprocessor_config.json", {"cap_pixels_per_frame": True}, "cap_pixels_per_frame is True"),
        ("video_preprocessor_config.json", {"fps": 0}, "fps is 0; it must be above 0"),
        ("video_preprocessor_config.json", {"fps": "2"}, "fps is '2'; it must be above 0"),
    ],
)
def test_settings_that_are_not_done_here(tmp_path, name, raw, message):
    (tmp_path / name).write_text(json.dumps(raw))
    with pytest.raises(UserError, match=f"{name}: {message}"):
        VisionSettings.from_directory(tmp_path, ModelConfig.preset("0.8b").vision)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_pixels": 1000}, "max_pixels is 1000"),
        ({"max_pixels": "1000"}, "max_pixels is '1000'; expected a whole number"),
        ({"max_pixels": 4096.5}, "max_pixels is 4096.5; expected a whole number"),
        ({"min_pixels": 0}, "min_pixels is 0; expected a whole number"),
        ({"fps": 0.0}, "fps is 0.0"),
        ({"fps": "2"}, "fps is '2'"),
        ({"max_frames": 1}, "max_frames is 1"),
    ],
)
def test_settings_that_cannot_be(change, message):
    with pytest.raises(UserError, match=message):
        SETTINGS.changed(**change)


BAD = {
    "no frames": (np.zeros((0, 64, 64, 3), np.uint8), None, "it has no frames"),
    "no list": ([], None, "it has no frames"),
    "floats": (np.zeros((4, 64, 64, 3)), None, "must be uint8"),
    "an image": (np.zeros((64, 64, 3), np.uint8), None, r"must be uint8 \[T, H, W, 3\]"),
    "fps": (np.zeros((4, 64, 64, 3), np.uint8), 0, "its fps is 0"),
    "strip": (np.zeros((4, 3, 900, 3), np.uint8), None, "one side may be"),
    "sizes": ([np.zeros((64, 64, 3), np.uint8), np.zeros((64, 65, 3), np.uint8)], None, "frame 1 is 65 x 64 pixels"),
    "no file": ("/nowhere/a.mp4", None, "there is no such file"),
    "remote": ("https://example.com/a.mp4", None, "remote URLs are not fetched"),
    "data URL": ("data:video/mp4;base64," + "A" * 5000, None, "video in a data: URL: it cannot be read: Invalid data"),
    "other data URL": ("data:video/mp4," + "A" * 5000, None, "video in a data: URL: the data: URL is not base64"),
    "a number": (3, None, "give a file, a folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_videos(name):
    source, fps, message = BAD[name]
    with pytest.raises(UserError, match=message) as error:
        read_video(source, SETTINGS, fps)
    assert "\n" not in str(error.value)


def test_bad_files(tmp_path):
    whole = tmp_path / "a.mp4"
    write_video(whole, 20)
    text, cut, empty, sound = (tmp_path / name for name in ("text.mp4", "cut.mp4", "empty", "sound.mp4"))
    text.write_text("hello")
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    empty.mkdir()
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, stream.layout = 44100, "mono"
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    whole_avi, strange = tmp_path / "a.avi", tmp_path / "strange.avi"
    write_video(whole_avi, 3)
    strange.write_bytes(whole_avi.read_bytes().replace(b"FMP4", b"ZZZZ"))
    for path, message in (
        (text, "cannot be read"),
        (cut, "cannot be read"),
        (empty, "no frames"),
        (sound, "no video in it"),
        (strange, "of a kind that this FFmpeg has no decoder for"),
    ):
        with pytest.raises(UserError, match=message) as error:
            read_video(path, SETTINGS)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("error", [ValueError("no such\nformat"), MemoryError(), AssertionError("planes")])
def test_whatever_decoding_raises(tmp_path, monkeypatch, error):
    """It is wrong input like any other, which training may skip."""

    def fail(*_):
        raise error

    write_video(tmp_path / "a.mp4", 3)
    monkeypatch.setattr(video_module, "_decoded", fail)
    with pytest.raises(UserError, match=r"video .*a\.mp4 cannot be decoded: ") as found:
        read_video(tmp_path / "a.mp4", SETTINGS)
    assert "\n" not in str(found.value)


def test_digits_that_are_no_numbers(tmp_path):
    for name in ("²1.png", "1²0.png", "٣.png"):
        Image.fromarray(np.ascontiguousarray(grey(1)[0])).save(tmp_path / name)
    assert len(read_video(tmp_path, SETTINGS)[0]) == 3


def test_sizes_that_change(tmp_path, monkeypatch):
    """Of frames between those that are looked at, too: they are decoded. A size beyond the limit is not."""
    sizes, path = ((64, 96), (320, 480), (64, 96)), tmp_path / "a.ts"
    for i, size in enumerate(sizes):
        write_video(tmp_path / f"{i}.ts", 7, size)
    path.write_bytes(b"".join((tmp_path / f"{i}.ts").read_bytes() for i in range(3)))
    first = SETTINGS.changed(max_frames=2)
    with pytest.raises(UserError, match="frame 7 is 480 x 320 pixels, the first 96 x 64"):
        read_video(path, first)
    for module in (images_module, video_module):
        monkeypatch.setattr(module, "MAX_PIXELS", 20_000)
    with pytest.raises(UserError, match="it cannot be decoded: "):
        read_video(path, first)
    with pytest.raises(UserError, match=r"1\.ts: its frames have no size, or more than 20,000 pixels"):
        read_video(tmp_path / "1.ts", first)


def turned(data: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """An MP4 with a matrix in its track's header: a pixel at (x, y), y downwards, is shown at (ax + cy, bx + dy)."""
    a, b, c, d = (n << 16 for n in matrix)
    changed = bytearray(data)
    struct.pack_into(">9i", changed, data.index(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return bytes(changed)


@pytest.mark.parametrize(("matrix", "turns"), [((1, 0, 0, 1), 0), ((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
def test_clips_of_a_camera_that_was_turned(tmp_path, matrix, turns):
    """The first is how a phone notes what it took upright: to be shown a quarter to the right."""
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:32, :32], pixels[32:, 64:] = 250, 120
    write_frames(tmp_path / "a.mp4", [pixels] * 5)
    (tmp_path / "turned.mp4").write_bytes(turned((tmp_path / "a.mp4").read_bytes(), matrix))
    (plain, _), (frames, _) = (read_video(tmp_path / name, SETTINGS) for name in ("a.mp4", "turned.mp4"))
    np.testing.assert_array_equal(frames, np.rot90(plain, turns, axes=(1, 2)))
    small = SETTINGS.changed(max_pixels=4096)
    assert read_video(tmp_path / "turned.mp4", small)[0].shape[1:3] == ((32, 64), (64, 32))[turns % 2]


def test_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(UserError, match=r"a\.mp4: it is no regular file"):
        read_video(tmp_path / "a.mp4", SETTINGS)


def test_fps_beside_a_file(tmp_path):
    """A file knows its own: it is how many frames a second are looked at."""
    write_video(tmp_path / "a.mp4", 20)
    for settings, fps in ((SETTINGS, 4.0), (SETTINGS.changed(fps=1), 4)):
        frames, seconds = read_video(tmp_path / "a.mp4", settings, fps)
        assert len(frames) == 10
        assert seconds == read_video(tmp_path / "a.mp4", SETTINGS.changed(fps=4))[1]
    with pytest.raises(UserError, match="its fps is 'many'"):
        read_video(tmp_path / "a.mp4", SETTINGS, "many")


def cut(data: bytes, first: int, count: int, fps: int = 8) -> bytes:
    """An MP4 whose edit list shows `count` of the frames from `first` on, as what cuts films without encoding them writes it."""
    number = struct.Struct(">I")
    elst, mdhd, mvhd = (data.index(name) + 4 for name in (b"elst", b"mdhd", b"mvhd"))
    (film,), (track,) = number.unpack_from(data, mvhd + 12), number.unpack_from(data, mdhd + 12)
    changed = bytearray(data)
    struct.pack_into(">II", changed, elst + 8, count * film // fps, first * track // fps)
    return bytes(changed)


@pytest.mark.parametrize(("first", "count"), [(1, 19), (5, 14), (5, 6), (14, 3)])
def test_what_an_edit_list_cuts_off(tmp_path, first, count):
    """It is not counted, or the last frames to look at would not be there."""
    write_video(tmp_path / "a.mp4", 20)
    (tmp_path / "cut.mp4").write_bytes(cut((tmp_path / "a.mp4").read_bytes(), first, count))
    frames, seconds = read_video(tmp_path / "cut.mp4", SETTINGS)
    expected, times = read_video(grey(20)[first : first + count], SETTINGS, fps=8)
    assert np.abs(frames[:, 0, 0, 0].astype(int) - expected[:, 0, 0, 0]).max() <= 3
    assert seconds == times


def test_a_file_that_was_cut_short(tmp_path):
    """What is there of a container that can be read so is a video of its own."""
    write_video(tmp_path / "whole.mkv", 20)
    data = (tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "short.mkv").write_bytes(data[: len(data) * 2 // 3])
    frames, _ = read_video(tmp_path / "short.mkv", SETTINGS.changed(fps=8))
    assert 8 < len(frames) < 16
    assert np.abs(frames[:, 0, 0, 0].astype(int) - 10 * np.arange(len(frames))).max() <= 3


def test_fewer_frames_than_packets(tmp_path, monkeypatch):
    """They are counted again, decoded, and chosen among those."""
    write_video(tmp_path / "a.mp4", 20)
    expected = read_video(tmp_path / "a.mp4", SETTINGS)
    monkeypatch.setattr(video_module, "_count", lambda *_: 60)
    frames, seconds = read_video(tmp_path / "a.mp4", SETTINGS)
    np.testing.assert_array_equal(frames, expected[0])
    assert seconds == expected[1]
    monkeypatch.setattr(video_module, "_decoded", lambda *_: (_ for _ in ()).throw(video_module.EndsEarlyError(9)))
    with pytest.raises(UserError, match="it ends after 9 frames: it is damaged"):
        read_video(tmp_path / "a.mp4", SETTINGS)


@pytest.mark.parametrize("error", [ImportError("no gcsfs"), RuntimeError("no credentials"), OSError("no route")])
def test_a_file_system_that_cannot_be_reached(monkeypatch, error):
    def fail(*_):
        raise error

    for name in ("is_dir", "stat", "exists"):
        monkeypatch.setattr(type(epath.Path("gs://bucket")), name, fail)
    for read in (lambda source: read_video(source, SETTINGS), read_image):
        with pytest.raises(UserError, match=f"gs://bucket/a: .*{error}") as found:
            read("gs://bucket/a")
        assert "decoded" not in str(found.value) and "\n" not in str(found.value)
        assert ("install the extra" in str(found.value)) is isinstance(error, ImportError)


def test_without_pyav(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_text("")
    monkeypatch.setattr(video_module.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    for read in (lambda path: read_video(path, SETTINGS), lambda path: check_source(Picture("video", path), False)):
        with pytest.raises(UserError, match=r"a.mp4: reading video files needs PyAV: pip install 'qwen35_jax\[video\]'"):
            read(tmp_path / "a.mp4")


def test_what_is_seen_of_a_source_before_it_is_read(tmp_path):
    """Frames are looked for one by one; what is no file's name is left for later."""
    Image.fromarray(np.ascontiguousarray(grey(1)[0])).save(tmp_path / "0.png")
    frames = [str(tmp_path / "0.png"), str(tmp_path / "1.png")]
    for source in (frames[:1], tmp_path, grey(2), "data:video/mp4;base64,AAAA"):
        check_source(Picture("video", source), False)
    with pytest.raises(UserError, match=r"1\.png: there is no such file"):
        check_source(Picture("video", frames), False)
    remote = Picture("video", "https://example.com/a.mp4")
    check_source(remote, True)
    with pytest.raises(UserError, match=r"video https://example.com/a\.mp4: remote URLs are not fetched"):
        check_source(remote, False)
