"""The sample command as a stranger types it: what it prints, and one line for every wrong input."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from qwen35_jax.config import ASSETS, ModelConfig
from qwen35_jax.text import ChatTemplate, Tokenizer
from qwen35_jax.vision_io import Picture, VisionSettings, expand, read_picture
from tests.forked import FAST, run_all
from tests.vision_checkpoint import picture, write_checkpoint, write_video

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "moe"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "qwen35_jax.sample", *arguments]


def run(*arguments: str, stdin: str = "", settings=FAST) -> subprocess.CompletedProcess:
    options = {"capture_output": True, "text": True, "timeout": 400, "cwd": ROOT, "env": os.environ | settings}
    return subprocess.run(command(*arguments), input=stdin, **options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The small golden checkpoint with the packaged tokenizer's vocabulary left out: ids only."""
    directory = tmp_path_factory.mktemp("checkpoint")
    shutil.copytree(GOLDEN, directory, dirs_exist_ok=True)
    return directory


@pytest.fixture(scope="module")
def seeing(tmp_path_factory) -> Path:
    """A small random checkpoint with a vision tower, and pictures beside it."""
    directory = write_checkpoint(tmp_path_factory.mktemp("seeing") / "model")
    for seed in range(2):
        Image.fromarray(picture(16, 24, seed)).save(directory.parent / f"{seed}.png")
    return directory


def test_the_main_job_on_eight_devices():
    done = run("--mesh", "8x1", "--stats", settings={})  # compiled as users do
    assert (done.returncode, done.stdout) == (0, "37 + 58 = 95\n"), done.stderr
    assert "random weights" not in done.stderr and "vision:" not in done.stderr
    for line in ("load:", "compile:", "prefill:", "decode:", "ops:", "weights per device:", "state per device:"):
        assert line in done.stderr
    assert "gated_delta_rule=xla" in done.stderr and "moe=gather" in done.stderr


def test_the_main_job_cut_in_other_ways():
    done = run("--mesh", "4x2", "--moe", "all_to_all", "--fully_sharded", "--stats")
    assert (done.returncode, done.stdout) == (0, "37 + 58 = 95\n"), done.stderr
    assert "moe=all_to_all" in done.stderr


def test_the_main_job_with_the_prompt_cut_over_eight_devices():
    done = run("--mesh", "8x1", "--context_parallel", "--prefill_chunk", "16")
    assert (done.returncode, done.stdout) == (0, "37 + 58 = 95\n"), done.stderr


def test_the_packaged_model_sees():
    """The README's picture."""
    done = run("--image", str(ROOT / "docs" / "stars.png"), "--prompt", "How many stars are there?", "--stats")
    assert (done.returncode, done.stdout) == (0, "There are 4 stars.\n"), done.stderr
    assert re.search(r"^vision: +\d+\.\d{3} s$", done.stderr, re.MULTILINE), done.stderr


def test_json_batches_presets_and_prompt_files(seeing, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "Hi"}]
    prompts.write_text(json.dumps({"prompt": "Second"}) + "\n\n" + json.dumps({"messages": chat}) + "\n")
    common = ("--max_new_tokens", "4", "--preset", "thinking", "--seed", "3", "--json")
    done = run("--checkpoint", str(seeing), "--prompt", "First", "--prompts_file", str(prompts), "--system", "Be brief.", *common)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["prompt"][-1]["content"] for r in records] == ["First", "Second", "Hi"]
    assert records[0]["prompt"][0] == {"role": "system", "content": "Be brief."}
    thinking = ChatTemplate.from_directory(ASSETS / "tiny").render(records[2]["prompt"], enable_thinking=True)
    assert records[2]["prompt_tokens"] == len(Tokenizer.from_directory(ASSETS / "tiny").encode(thinking))
    assert all(len(r["token_ids"]) <= 4 and r["finish_reason"] in ("stop", "length") for r in records)


def test_chat_remembers_resets_and_ends(seeing):
    lines = "Hello\n/reset\nAgain\n/exit\n"
    done = run("--checkpoint", str(seeing), "--chat", "--max_new_tokens", "3", stdin=lines)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("> ") == 4


def test_control_c_ends_in_one_line():
    process = subprocess.Popen(
        command("--random_weights", "--max_new_tokens", "4000", "--temperature", "1", "--prompt", "x"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | FAST,
    )  # fmt: skip
    assert "random weights" in process.stderr.readline()  # loading is over
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors and "Traceback" not in errors


def test_images_and_videos(seeing):
    """Marks say where; a folder of pictures is a video; what is too large shrinks."""
    folder = seeing.parent
    pictures = ("--image", str(folder / "0.png"), "--image", str(folder / "1.png"), "--video", str(folder))
    prompt = ("--prompt", "First <image>, then <image>, then <video>", "--max_pixels", "192")
    done = run("--checkpoint", str(seeing), *pictures, *prompt, "--max_new_tokens", "3", "--json", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    (record,) = [json.loads(line) for line in done.stdout.splitlines()]
    content = record["prompt"][0]["content"]
    assert [part["type"] for part in content] == ["text", "image", "text", "image", "text", "video"]
    # Two images and one temporal patch of two frames, each 8 x 16 pixels: two tokens.
    pads, triple = "<|image_pad|>", "<|vision_start|><|video_pad|><|vision_end|>"
    text = ChatTemplate.from_directory(seeing).render(record["prompt"]).replace(pads, 2 * pads)
    text = text.replace(triple, "<0.0 seconds>" + triple.replace("<|video_pad|>", 2 * "<|video_pad|>"))
    assert record["prompt_tokens"] == len(Tokenizer.from_directory(seeing).encode(text))
    assert len(record["token_ids"]) <= 3


def test_pictures_without_a_prompt(seeing, tmp_path):
    """What is seen is asked for; without marks the pictures are in the order of the flags. The trace is where it should be."""
    first, second, folder = (str(seeing.parent / name) for name in ("0.png", "1.png", ""))
    pictures = ("--image", first, "--video", folder, "--image", second)
    more = ("--max_new_tokens", "1", "--json", "--profile", str(tmp_path / "trace"))
    done = run("--checkpoint", str(seeing), *pictures, *more)
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)["prompt"][0]["content"]
    assert content[-1] == {"type": "text", "text": "What do you see?"}
    assert [part.get("image") or part["video"] for part in content[:-1]] == [first, folder, second]
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


def test_how_videos_are_looked_at(seeing, tmp_path):
    """A file by --fps and --max_frames; a folder of frames by the rate that is said to be theirs."""
    film, folder = tmp_path / "a.mp4", tmp_path / "frames"
    write_video(film, 20)  # 8 a second
    folder.mkdir()
    for i in range(12):
        Image.fromarray(picture(16, 24, i)).save(folder / f"{i}.png")
    common = ["--checkpoint", str(seeing), "--max_new_tokens", "1", "--json"]
    cases = [["--video", str(film), "--fps", "4"], ["--video", str(film), "--fps", "4", "--max_frames", "6"]]
    cases.append(["--video", str(folder), "--frame_rate", "4"])
    settings = VisionSettings.from_directory(seeing, ModelConfig.from_hf(seeing).vision)
    read = [
        read_picture(Picture("video", str(film)), settings.changed(fps=4)),
        read_picture(Picture("video", str(film)), settings.changed(fps=4, max_frames=6)),
        read_picture(Picture("video", str(folder), 4), settings),
    ]
    assert [visual.grid[0] for visual in read] == [5, 3, 3] and read[2].seconds == (0.25, 1.375, 2.5)
    done = run_all("qwen35_jax.sample", [common + case for case in cases], tmp_path, **FAST)
    for case, visual in zip(done, read, strict=True):
        assert case.returncode == 0, case.stderr
        record = json.loads(case.stdout)
        text = expand(ChatTemplate.from_directory(seeing).render(record["prompt"]), [visual])
        assert record["prompt_tokens"] == len(Tokenizer.from_directory(seeing).encode(text))


# The command where https://example.com is a folder of this machine, the last argument.
FETCHING = """
import sys
from qwen35_jax import command, sample
from qwen35_jax.vision_io import messages

folder = sys.argv.pop()

def fetch(url, limit):
    print("fetched", url, file=sys.stderr)
    with open(url.replace("https://example.com", folder), "rb") as file:
        return file.read(limit)

messages.fetch = fetch
command.run(sample.main, sample.USAGE)
"""


def test_remote_media_that_are_allowed(seeing):
    url = "https://example.com/0.png"
    flags = ("--checkpoint", str(seeing), "--image", url, "--allow_remote_media", "--max_new_tokens", "1", "--json")
    program = [sys.executable, "-c", FETCHING, *flags, str(seeing.parent)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=400, cwd=ROOT, env=os.environ | FAST)
    assert done.returncode == 0 and done.stderr.count(f"fetched {url}") == 1, done.stderr
    assert json.loads(done.stdout)["prompt"][0]["content"][0] == {"type": "image", "image": url}


def test_images_in_a_chat(seeing):
    """What is wrong with a picture is said when it is shown; the next message is about those that are right."""
    lines = f"/image {seeing.parent / '0.png'}\n/image /nowhere.png\n/image\nWhat is it?\n/exit\n"
    done = run("--checkpoint", str(seeing), "--chat", "--max_new_tokens", "2", stdin=lines)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("> ") == 5
    assert "error: image /nowhere.png: there is no such file" in done.stderr and "error: /image needs a file" in done.stderr


def test_what_is_typed_in_a_chat(seeing, tmp_path):
    """Paths as in a shell or as they are; what was shown outlives an error; commands that there are not; a path is a message."""
    Image.fromarray(picture()).save(tmp_path / "my cat's.png")
    whole = f"{tmp_path}/my cat's.png"
    paths = (whole, f'"{whole}"', whole.replace(" ", "\\ ").replace("'", "\\'"), "~/my cat's.png", '"~/my cat\'s.png"')
    lines = [f"/image {path}" for path in paths] + [
        "Is <image> it?",
        "Or <image>?",
        "/imgae x",
        "/exit now",
        "/etc/hosts is what?",
    ]
    home = FAST | {"HOME": str(tmp_path)}
    done = run("--checkpoint", str(seeing), "--chat", "--max_new_tokens", "1", stdin="\n".join(lines), settings=home)
    assert done.returncode == 0, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    marks = "error: the prompt has 1 <image> marks for 5 images: write as many, or none"
    commands = "is no command; there are /image FILE, /video FILE, /reset and /exit"
    assert errors == [marks, marks, f"error: /imgae x {commands}", f"error: /exit now {commands}"]


def test_a_picture_in_a_chat_is_read_once(seeing, tmp_path):
    """The file may go while it is talked about."""
    shutil.copy(seeing.parent / "0.png", tmp_path / "0.png")
    process = subprocess.Popen(
        command("--checkpoint", str(seeing), "--chat", "--max_new_tokens", "1"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | FAST,
    )  # fmt: skip
    process.stdin.write(f"/image {tmp_path / '0.png'}\n")
    process.stdin.flush()
    assert process.stdout.read(4) == "> > "  # it has been shown
    (tmp_path / "0.png").unlink()
    _, errors = process.communicate("What is it?\nAnd now?\n/exit\n", timeout=400)
    assert process.returncode == 0 and "error" not in errors, errors


WRONG = [
    (["--frobnicate"], "frobnicate"),
    (["--model", "7b"], "0.8b"),
    (["--mesh", "8"], "is not a mesh"),
    (["--mesh", "0x1"], "is not a mesh"),
    (["--mesh", "1x3"], "num_attention_heads"),
    (["--mesh", "7x1"], "num_experts"),
    (["--checkpoint", "/no/such/directory"], "/no/such/directory"),
    (["--checkpoint", "."], "config.json"),
    (["--prompt", " "], "a prompt is empty"),
    (["--prompts_file", "/no/such/file"], "/no/such/file"),
    (["--checkpoint", "x", "--model", "tiny"], "give one of them"),
    (["--raw", "--system", "x"], "--system"),
    (["--raw", "--think"], "--think"),
    (["--temperature", "-1"], "temperature"),
    (["--top_p", "2", "--random_weights"], "top_p is 2.0"),
    (["--max_new_tokens", "0"], "max_new_tokens"),
    (["--kernels", "magic"], "kernels"),
    (["--moe", "magic"], "moe"),
    (["--fully_sharded", "--mesh", "1x2"], "mesh 1x2 has none"),
    (["--moe", "gather", "--model", "0.8b"], "this model has no experts"),
    (["stray"], "unexpected argument"),
    (["--checkpoint", "tiny"], "no such directory: ./tiny"),
    (["--checkpoint", "absent", "--prompt", "-h"], "no such directory: absent"),
    (["--checkpoint", "0.8b"], "0.8b holds no weights"),
    (["--checkpoint", "0.8b", "--revision", "abc"], "a revision belongs to a hub id"),
    (["--checkpoint", ""], "--checkpoint is empty"),
    (["--prompts_file", ""], "--prompts_file is empty"),
    (["--profile", ""], "--profile is empty"),
    (["--profile", "s3://bucket/trace"], "could not write s3://bucket/trace: "),
    (["--profile", "0.8b/config.json"], "--profile 0.8b/config.json cannot be written to"),
    (["--profile", "0.8b/config.json/x"], "--profile 0.8b/config.json/x cannot be written to"),
    (["--seed", "99999999999999999999999", "--random_weights"], "seed"),
    (["--top_k", "99999999999"], "top_k is 99999999999; it must be 0 (off) to 2147483647"),
    (["--mesh", "100000x1"], "at most 1024 virtual CPU devices"),
    (["--mesh", "99999999999999999999x1"], "is not a mesh"),
    (["--prompt", "a\udcff", "--random_weights"], "U+DCFF behind '<|im_start|>user\\na'"),
    (["--random_weights", "--prompts_file", "half.jsonl"], "half.jsonl line 2: the text holds U+D800"),
    (
        ["--random_weights", "--prompts_file", "long.jsonl", "--raw"],
        "long.jsonl line 1: a prompt has 18000 tokens, but the context is 8192",
    ),
    (["--prompts_file", "chat.jsonl", "--raw"], "chat.jsonl line 1 has messages, but --raw takes text"),
    (["--checkpoint", "empty"], "empty is empty: expected config.json"),
    (["--hosts", "2"], "--hosts and --host belong to --coordinator"),
    (["--host_timeout", "20"], "--host_timeout belongs to --coordinator"),
    (["--coordinator", "auto"], "nothing here says where the hosts are"),
    (["--chat", "--coordinator", "auto"], "it does not go with --coordinator"),
    (["--image", "absent.png"], "image absent.png: there is no such file"),
    (["--image", "a.png", "--raw"], "do not go with --raw"),
    (["--video", "a.mp4", "--chat"], "type /image FILE"),
    (["--image", "a.png", "--prompts_file", "chat.jsonl"], "pictures are parts of messages"),
    (["--image", "a.png", "--prompt", "a", "--prompt", "b"], "go with one --prompt"),
    (["--image", "a.png", "--prompt", "<image> and <image>"], "2 <image> marks for 1 images"),
    (["--max_pixels", "4096"], "are for pictures, and there are none"),
    (["--max_pixels", "4096", "--prompts_file", "chat.jsonl"], "are for pictures, and there are none"),
    (["--frame_rate", "4", "--prompt", "a"], "are for pictures, and there are none"),
    (["--fps", "1", "--image", "a.png"], "--fps and --max_frames are for videos, and there is none"),
    (["--max_frames", "8", "--prompts_file", "shown.jsonl"], "--fps and --max_frames are for videos, and there is none"),
    (["--frame_rate", "4", "--image", "a.png"], "--frame_rate is that of a folder of frames"),
    (["--frame_rate", "0", "--video", "empty"], "frame_rate"),
    # What follows is said before the model is looked for.
    (["--checkpoint", "absent", "--image", "absent.png"], "image absent.png: there is no such file"),
    (["--checkpoint", "absent", "--image", "empty"], "image empty: that is a directory"),
    (["--checkpoint", "absent", "--image", "https://example.com/a.png"], "remote URLs are not fetched"),
    (["--checkpoint", "absent", "--video", "absent.mp4"], "video absent.mp4: there is no such file"),
    (["--checkpoint", "absent", "--prompts_file", "lost.jsonl"], "lost.jsonl line 1: image lost.png: there is no such file"),
    (["--checkpoint", "absent", "--video", "empty", "--fps", "-1"], "fps is -1.0"),
    (["--checkpoint", "absent", "--video", "empty", "--max_frames", "1"], "max_frames is 1"),
    (["--model", "0.8b", "--image", "a.png", "--max_pixels", "1000"], "max_pixels is 1000; it must be at least 1024"),
]


@pytest.fixture(scope="module")
def refusals(tmp_path_factory) -> dict[str, subprocess.CompletedProcess]:
    cwd = tmp_path_factory.mktemp("wrong")
    (cwd / "0.8b").mkdir()
    (cwd / "empty").mkdir()
    shutil.copy(GOLDEN / "config.json", cwd / "0.8b")
    (cwd / "half.jsonl").write_text('{"prompt": "a"}\n{"prompt": "\\ud800"}\n')
    (cwd / "long.jsonl").write_text(json.dumps({"prompt": "1 " * 9000}))
    (cwd / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}')
    Image.fromarray(picture()).save(cwd / "a.png")
    for name in ("a", "lost"):
        parts = [{"type": "image", "image": f"{name}.png"}]
        (cwd / f"{'shown' if name == 'a' else name}.jsonl").write_text(
            json.dumps({"messages": [{"role": "user", "content": parts}]})
        )
    cases = [arguments for arguments, _ in WRONG]
    return {" ".join(done.args): done for done in run_all("qwen35_jax.sample", cases, cwd)}


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(a).encode("ascii", "replace").decode() for a, _ in WRONG])
def test_wrong_input_is_one_line_and_a_status(refusals, arguments, message):
    one_line(refusals[" ".join(arguments)], message)


def one_line(done: subprocess.CompletedProcess, message: str) -> None:
    errors = [line for line in done.stderr.splitlines() if not line.startswith("note:")]
    assert done.returncode not in (0, None)
    assert len(errors) == 1 and errors[0].startswith("error: "), done.stderr
    assert message in errors[0]


def _edit_config(old: str, new: str):
    def change(directory: Path) -> None:
        config = directory / "config.json"
        assert old in config.read_text()
        config.write_text(config.read_text().replace(old, new))

    return change


def _edit_tensors(change):
    def edit(directory: Path) -> None:
        (path,) = directory.glob("*.safetensors")
        tensors = load_file(path)
        path.unlink()
        change(tensors, directory)

    return edit


def _without_one(tensors: dict, directory: Path) -> None:
    del tensors[sorted(tensors)[0]]
    save_file(tensors, directory / "model.safetensors")


def _a_shard_is_missing(tensors: dict, directory: Path) -> None:
    names = sorted(tensors)
    shards = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    save_file({name: tensors[name] for name in names[::2]}, directory / shards[names[0]])


BROKEN = {
    "no weights": (lambda d: next(d.glob("*.safetensors")).unlink(), "safetensors"),
    "truncated": (lambda d: os.truncate(next(d.glob("*.safetensors")), 5000), "safetensors"),
    "tensor missing": (_edit_tensors(_without_one), "missing"),
    "shard missing": (_edit_tensors(_a_shard_is_missing), "model-00002-of-00002.safetensors"),
    "no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json"),
    "another model": (_edit_config("qwen3_5_moe_text", "llama"), "llama"),
    "another shape": (_edit_config('"hidden_size": ', '"hidden_size": 1'), "shape"),
}


def test_broken_checkpoints(checkpoint, tmp_path):
    for name, (change, _) in BROKEN.items():
        shutil.copytree(checkpoint, tmp_path / name)
        change(tmp_path / name)
    cases = [["--checkpoint", name, "--raw", "--prompt", "x"] for name in BROKEN]
    for done, (_, message) in zip(run_all("qwen35_jax.sample", cases, tmp_path), BROKEN.values(), strict=True):
        one_line(done, message)


def test_a_template_that_tries_to_escape(tmp_path, checkpoint):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    shutil.copy(ASSETS / "tiny" / "tokenizer.json", tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    one_line(run("--checkpoint", str(tmp_path), "--prompt", "x"), "sandbox")


def test_flags_that_the_other_tests_leave_out(tmp_path):
    """Everything that the first answer is without --stop, up to the sign."""
    arguments = ["--checkpoint", str(ASSETS / "tiny"), "--dtype", "float32", "--kernels", "xla", "--raw", "--stop", "="]
    arguments += ["--seed", "5", "--prefill_chunk", "16", "--top_k", "1", "--max_new_tokens", "9"]
    text = "<|im_start|>user\nWhat is 37 + 58?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    (done,) = run_all("qwen35_jax.sample", [[*arguments, "--prompt", text]], tmp_path, **FAST)
    assert (done.returncode, done.stdout) == (0, "37 + 58 \n"), done.stderr


def test_help_names_every_flag_and_exits_well():
    done = run("--help")
    assert done.returncode == 0
    for flag in ("--mesh", "--checkpoint", "--prompt", "--[no]think", "--[no]stats", "--profile"):
        assert flag in done.stdout


def test_streams_that_are_closed_or_no_utf8(seeing):
    program = " ".join(command("--checkpoint", str(seeing), "--max_new_tokens", "1"))

    def shell(line: str, **options) -> subprocess.CompletedProcess:
        options = {"env": os.environ | FAST} | options
        return subprocess.run(line, shell=True, capture_output=True, timeout=400, cwd=ROOT, **options)

    done = shell(f"{program} --chat <&-")
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    done = shell(f"{program} --help >&-")
    assert (done.returncode, done.stderr) == (1, b"error: the output is closed: send it to a file, or to /dev/null\n")
    done = shell(f"{program} --help > /dev/full")
    assert (done.returncode, done.stderr) == (1, b"error: No space left on device\n")
    done = shell(f"{program} --json --prompt \u00e9", env=os.environ | FAST | {"PYTHONIOENCODING": "ascii"})
    assert json.loads(done.stdout)["prompt"][-1]["content"] == "\u00e9"
    done = shell(f"{program} --chat", input=b"\xff\n/exit\n")
    assert done.returncode == 0 and b"error: the text holds U+DCFF" in done.stderr and b"Traceback" not in done.stderr


# The first import that takes long brings a Ctrl-C.
INTERRUPTED_START = """
import os, runpy, signal, sys

class Interrupt:
    def find_spec(name, path=None, target=None):
        if name in ("jax", "numpy", "ml_collections", "etils"):
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt)
runpy.run_module(sys.argv[1], run_name="__main__")
"""


@pytest.mark.parametrize("module", ["sample", "convert", "train"])
def test_control_c_during_the_imports(module):
    program = [sys.executable, "-c", INTERRUPTED_START, f"qwen35_jax.{module}"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")
