"""The sample command as a stranger types it: what it prints, and one line for every wrong input."""

from __future__ import annotations

import json
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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The small golden checkpoint with the packaged tokenizer's vocabulary left out: ids only."""
    directory = tmp_path_factory.mktemp("checkpoint")
    shutil.copytree(GOLDEN, directory, dirs_exist_ok=True)
    return directory


def test_the_main_job_on_eight_devices():
    done = run("--mesh", "8x1", "--max_new_tokens", "6", "--random_weights", "--stats")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "random weights" in done.stderr
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
    assert done.returncode == 0, done.stderr
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
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(a) for a, _ in WRONG])
def test_wrong_input_is_one_line_and_a_status(arguments, message):
    one_line(run(*arguments), message)


def one_line(done: subprocess.CompletedProcess, message: str) -> None:
    errors = [line for line in done.stderr.splitlines() if not line.startswith("note:")]
    assert done.returncode not in (0, None)
    assert len(errors) == 1 and errors[0].startswith("error: "), done.stderr
    assert message in errors[0]


def test_prompt_longer_than_the_context():
    one_line(run("--random_weights", "--raw", "--prompt", "1 " * 9000), "the context is 8192")


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
