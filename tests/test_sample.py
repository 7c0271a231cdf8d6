"""The sample command as a stranger types it: what it prints, and one line for every wrong input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen35_jax.config import ASSETS

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "moe"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "qwen35_jax.sample", *arguments]


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), input=stdin, capture_output=True, text=True, timeout=400, cwd=ROOT)


def run_all(cases: list[list[str]], cwd: Path) -> list[subprocess.CompletedProcess]:
    """Like `run` for each case, but with one start of Python."""
    program = [sys.executable, "-W", "ignore", "-m", "tests.forked_sample"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(program, input=json.dumps(cases), capture_output=True, text=True, timeout=400, cwd=cwd, env=env)
    assert done.returncode == 0, done.stderr
    results = zip(cases, json.loads(done.stdout), strict=True)
    return [subprocess.CompletedProcess(case, *result) for case, result in results]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The small golden checkpoint with the packaged tokenizer's vocabulary left out: ids only."""
    directory = tmp_path_factory.mktemp("checkpoint")
    shutil.copytree(GOLDEN, directory, dirs_exist_ok=True)
    return directory


def test_the_main_job_on_eight_devices():
    done = run("--mesh", "8x1", "--stats")
    assert (done.returncode, done.stdout) == (0, "37 + 58 = 95\n"), done.stderr
    assert "random weights" not in done.stderr
    for line in ("load:", "compile:", "prefill:", "decode:", "ops:", "weights per device:", "state per device:"):
        assert line in done.stderr
    assert "gated_delta_rule=xla" in done.stderr


def test_json_batches_presets_and_prompt_files(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "Hi"}]
    prompts.write_text(json.dumps({"prompt": "Second"}) + "\n\n" + json.dumps({"messages": chat}) + "\n")
    common = ("--random_weights", "--max_new_tokens", "4", "--preset", "instruct", "--seed", "3", "--json", "--nothink")
    done = run("--prompt", "First", "--prompts_file", str(prompts), "--system", "Be brief.", *common)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["prompt"][-1]["content"] for r in records] == ["First", "Second", "Hi"]
    assert records[0]["prompt"][0] == {"role": "system", "content": "Be brief."}
    assert all(len(r["token_ids"]) <= 4 and r["finish_reason"] in ("stop", "length") for r in records)


def test_chat_remembers_resets_and_ends():
    lines = "Hello\n/reset\nAgain\n/exit\n"
    done = run("--chat", "--random_weights", "--max_new_tokens", "3", stdin=lines)
    assert done.returncode == 0 and "random weights" in done.stderr, done.stderr
    assert done.stdout.count("> ") == 4


def test_control_c_ends_in_one_line():
    process = subprocess.Popen(
        command("--random_weights", "--max_new_tokens", "4000", "--temperature", "1", "--prompt", "x"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    process.stderr.readline()  # the note about random weights: loading is over
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors and "Traceback" not in errors


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
    (["stray"], "unexpected argument"),
    (["--checkpoint", "tiny"], "no such directory: ./tiny"),
    (["--checkpoint", "absent", "--prompt", "-h"], "no such directory: absent"),
    (["--checkpoint", "0.8b"], "0.8b holds no weights"),
    (["--checkpoint", "0.8b", "--revision", "abc"], "a revision belongs to a hub id"),
    (["--checkpoint", ""], "--checkpoint is empty"),
    (["--prompts_file", ""], "--prompts_file is empty"),
    (["--profile", ""], "--profile is empty"),
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
]


@pytest.fixture(scope="module")
def refusals(tmp_path_factory) -> dict[str, subprocess.CompletedProcess]:
    cwd = tmp_path_factory.mktemp("wrong")
    (cwd / "0.8b").mkdir()
    shutil.copy(GOLDEN / "config.json", cwd / "0.8b")
    (cwd / "half.jsonl").write_text('{"prompt": "a"}\n{"prompt": "\\ud800"}\n')
    (cwd / "long.jsonl").write_text(json.dumps({"prompt": "1 " * 9000}))
    (cwd / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}')
    cases = [arguments for arguments, _ in WRONG]
    return {" ".join(done.args): done for done in run_all(cases, cwd)}


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(a).encode("ascii", "replace").decode() for a, _ in WRONG])
def test_wrong_input_is_one_line_and_a_status(refusals, arguments, message):
    one_line(refusals[" ".join(arguments)], message)


def one_line(done: subprocess.CompletedProcess, message: str) -> None:
    errors = [line for line in done.stderr.splitlines() if not line.startswith("note:")]
    assert done.returncode not in (0, None)
    assert len(errors) == 1 and errors[0].startswith("error: "), done.stderr
    assert message in errors[0]


def test_broken_checkpoints(checkpoint, tmp_path):
    (weights,) = checkpoint.glob("*.safetensors")

    def broken(change) -> subprocess.CompletedProcess:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(checkpoint, copy)
        change(copy)
        return run("--checkpoint", str(copy), "--raw", "--prompt", "x")

    def edit_config(copy: Path, old: str, new: str) -> None:
        config = copy / "config.json"
        assert old in config.read_text()
        config.write_text(config.read_text().replace(old, new))

    one_line(broken(lambda c: (c / weights.name).unlink()), "safetensors")
    one_line(broken(lambda c: (c / weights.name).write_bytes(weights.read_bytes()[:5000])), weights.name)
    one_line(broken(lambda c: (c / "config.json").write_text("{")), "config.json")
    one_line(broken(lambda c: edit_config(c, "qwen3_5_moe_text", "llama")), "llama")
    one_line(broken(lambda c: edit_config(c, '"hidden_size": ', '"hidden_size": 1')), "shape")


def test_a_template_that_tries_to_escape(tmp_path, checkpoint):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    shutil.copy(ASSETS / "tiny" / "tokenizer.json", tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    one_line(run("--checkpoint", str(tmp_path), "--prompt", "x"), "sandbox")


def test_help_names_every_flag_and_exits_well():
    done = run("--help")
    assert done.returncode == 0
    for flag in ("--mesh", "--checkpoint", "--prompt", "--[no]think", "--[no]stats", "--profile"):
        assert flag in done.stdout


def test_streams_that_are_closed_or_no_utf8():
    program = " ".join(command("--random_weights", "--max_new_tokens", "1"))

    def shell(line: str, **options) -> subprocess.CompletedProcess:
        return subprocess.run(line, shell=True, capture_output=True, timeout=400, cwd=ROOT, **options)

    done = shell(f"{program} --chat <&-")
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    done = shell(f"{program} --help >&-")
    assert (done.returncode, done.stderr) == (1, b"error: the output is closed: send it to a file, or to /dev/null\n")
    done = shell(f"{program} --help > /dev/full")
    assert (done.returncode, done.stderr) == (1, b"error: No space left on device\n")
    done = shell(f"{program} --json --prompt \u00e9", env=os.environ | {"PYTHONIOENCODING": "ascii"})
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
