"""Conversion both ways: nothing changes, nothing half-made looks whole, whatever interrupts it."""

from __future__ import annotations

import filecmp
import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy
from orbax.checkpoint import v1 as ocp

from qwen35_jax.checkpoint import conversion, open_source, orbax_writer, staging
from qwen35_jax.checkpoint.canonical import canonical_name
from qwen35_jax.checkpoint.conversion import convert
from qwen35_jax.errors import UserError
from tests.checkpoint.bucket import Bucket
from tests.checkpoint.synthetic import canonical_tensors, hf_config, per_expert, renamed, write

ROOT = Path(__file__).parents[2]
INTERRUPTED = Path(__file__).parent / "interrupted.py"


def _same(a: Path, b: Path) -> bool:
    names = sorted(p.name for p in a.iterdir())
    return names == sorted(p.name for p in b.iterdir()) and filecmp.cmpfiles(a, b, names, shallow=False)[0] == names


LAYOUTS = [
    # moe, fp8, per expert (names that contain), prefixes, shards
    (False, False, None, "published", 1),
    (False, True, None, "text", 2),
    (True, False, "mtp.", "published", 3),
    (True, True, "", "old", 4),
]


@pytest.mark.parametrize("moe,fp8,experts,style,shards", LAYOUTS)
def test_there_and_back(tmp_path, monkeypatch, moe, fp8, experts, style, shards):
    monkeypatch.setattr(orbax_writer, "CHUNK_BYTES", 20_000)  # many chunks, and pieces that end inside them
    monkeypatch.setattr(conversion, "PIECE_BYTES", 30_000)
    config = hf_config(moe=moe, tied=style == "text", hidden=160, ffn=200)
    tensors = canonical_tensors(config, fp8=fp8)
    tensors["mtp.norm.weight"][:] = 0  # an array of zeros is stored too
    stored = tensors if experts is None else per_expert(tensors, experts)
    original = write(tmp_path / "hf", config, renamed(stored, style), shards)
    convert(str(original), str(tmp_path / "orbax"), progress=False)
    convert(str(tmp_path / "orbax"), str(tmp_path / "back"), "hf", progress=False)
    assert _same(original, tmp_path / "back")
    source = open_source(str(tmp_path / "orbax"))
    assert {canonical_name(n) for n in source.tensors} == tensors.keys()
    for name, want in tensors.items():
        got = source.read(name)
        assert (got.dtype, got.shape, got.tobytes()) == (want.dtype, want.shape, want.tobytes()), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "hf", "orbax"]


def test_the_directory_is_an_orbax_checkpoint(tmp_path):
    config = hf_config(moe=True)
    tensors = canonical_tensors(config, fp8=True)
    original = write(tmp_path / "hf", config, per_expert(tensors))
    convert(str(original), str(tmp_path / "orbax"), progress=False)
    loaded = ocp.load(tmp_path / "orbax")
    assert loaded.keys() == tensors.keys()
    assert all(np.asarray(loaded[n]).tobytes() == x.tobytes() for n, x in tensors.items())
    record = json.loads((tmp_path / "orbax" / "source.json").read_text())
    assert record["tensors"]["mtp.layers.0.mlp.experts.down_proj"] == {
        "dtype": "F8_E4M3",
        "shape": [4, 48, 72],
        "fused": True,
    }
    for file in ("config.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
        assert (tmp_path / "orbax" / file).read_bytes() == (original / file).read_bytes()


def test_what_cannot_be_converted(tmp_path, monkeypatch):
    config = hf_config()
    tensors = canonical_tensors(config)
    original, out = write(tmp_path / "hf", config, tensors), str(tmp_path / "orbax")
    convert(str(original), out, progress=False)

    def refused(message, *args):
        with pytest.raises(UserError, match=message) as error:
            convert(*args, progress=False)
        assert "\n" not in str(error.value)

    refused("exists already", str(original), out)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("downloaded"))
    refused("exists already", "org/name", out)
    refused("is a Hugging Face checkpoint already; convert it --to orbax", str(original), str(tmp_path / "x"), "hf")
    refused("is a converted checkpoint already; convert it --to hf", out, str(tmp_path / "x"))
    refused("cannot convert to 'gguf'", out, str(tmp_path / "x"), "gguf")
    refused("no such directory", str(tmp_path / "none"), str(tmp_path / "x"))
    refused("is a file; name a new directory", str(original), str(original / "config.json"))
    refused("is a file; give the directory that holds", str(original / "config.json"), str(tmp_path / "x"))
    (tmp_path / "z.partial").write_text("mine")
    refused("z.partial is in the way: it is a file", str(original), str(tmp_path / "z"))
    (tmp_path / "orbax" / "source.json").write_text("{")
    refused("source.json is not valid JSON .*; convert the checkpoint again", out, str(tmp_path / "x"), "hf")
    del tensors["model.language_model.norm.weight"]
    broken = write(tmp_path / "broken", config, tensors)
    refused("1 missing: model.language_model.norm.weight", str(broken), str(tmp_path / "x"))
    assert not list(tmp_path.glob("x*"))
    (tmp_path / "empty").mkdir()
    convert(str(original), str(tmp_path / "empty"), progress=False)


@pytest.mark.parametrize("name", ["thesis.txt", "lock", "checkpoint", "checkpoint-500", "checkpoint.partial_save"])
@pytest.mark.parametrize("ours", [False, True])
def test_files_of_others_are_left_alone(tmp_path, name, ours):
    """Beside our lock a conversion may have left what has its names; without it nothing there is ours."""
    partial = tmp_path / "out.partial"
    (partial / name).mkdir(parents=True)
    (partial / name / "weights").write_text("mine")
    if ours:
        (partial / staging.LOCK).touch()
    if ours and name in ("checkpoint", "checkpoint.partial_save"):
        with staging.staging(tmp_path / "out") as work:
            work.mkdir()
        return
    with pytest.raises(UserError, match=f"holds {name}, which no conversion put there"), staging.staging(tmp_path / "out"):
        pass
    assert (partial / name / "weights").read_text() == "mine" and not (tmp_path / "out").exists()


def test_links_lead_to_what_they_name(tmp_path):
    (tmp_path / "empty").mkdir()
    for link, target in (("a", "empty"), ("b", "absent")):
        (tmp_path / link).symlink_to(target)
        with staging.staging(tmp_path / link) as work:
            work.mkdir()
            (work / "x").touch()
        assert (tmp_path / link).is_symlink() and (tmp_path / target / "x").exists()


def test_no_space(tmp_path, monkeypatch):
    original = write(tmp_path / "hf", hf_config(), canonical_tensors(hf_config()))
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: type("", (), {"free": 1000}))
    with pytest.raises(UserError, match="has 1.00kB free, but [0-9.]+kB are to be written"):
        convert(str(original), str(tmp_path / "out"), progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_two_at_once(tmp_path):
    with staging.staging(tmp_path / "out") as work:
        work.mkdir()
        with pytest.raises(UserError, match="another conversion is writing"), staging.staging(tmp_path / "out"):
            pass
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_object_stores(tmp_path, monkeypatch):
    """Without renames: the lock beside the directory says that it is not complete, until it is."""
    original = write(tmp_path / "hf", hf_config(), canonical_tensors(hf_config()), shards=2)
    for module in ("staging", "opening", "safetensors_file", "conversion"):
        monkeypatch.setattr(f"qwen35_jax.checkpoint.{module}.is_local", lambda path: False)
    write_bytes = conversion.write_orbax

    def fail(*args):
        write_bytes(*args)
        raise OSError("the network is gone")

    out = str(tmp_path / "out")
    monkeypatch.setattr(conversion, "write_orbax", fail)
    with pytest.raises(UserError, match="the network is gone"):
        convert(str(original), out, progress=False)
    with pytest.raises(UserError, match="unfinished conversion"):
        open_source(out)
    monkeypatch.setattr(conversion, "write_orbax", write_bytes)
    convert(str(original), out, progress=False)
    convert(out, str(tmp_path / "back"), "hf", progress=False)
    assert _same(original, tmp_path / "back")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "hf", "out"]


@pytest.mark.parametrize("nested", [False, True])
def test_two_at_once_in_a_bucket(bucket, nested):
    """What two wrote is never complete, whichever of them ends first; a run alone clears it."""
    first, second = (staging.staging(bucket / "out") for _ in range(2))
    for run in (first, second):
        (run.__enter__() / "config.json").write_text("{}")
    if nested:
        second.__exit__(None, None, None)
    for run in (first,) if nested else (first, second):
        with pytest.raises(UserError, match="another run wrote gs://bucket/out at the same time: end it"):
            run.__exit__(None, None, None)
        with pytest.raises(UserError, match="unfinished conversion"):
            open_source(str(bucket / "out"))
    with staging.staging(bucket / "out") as work:
        assert not work.exists()
        (work / "model.bin").write_text("whole")
    assert [path.name for path in bucket.iterdir()] == ["out"]


def test_reads_and_writes_a_bucket(tmp_path, bucket):
    """Byte ranges of a remote Hugging Face directory give what the local files do; an export goes back."""
    config = hf_config(moe=True)
    original = write(tmp_path / "hf", config, canonical_tensors(config), shards=2)
    for file in original.iterdir():
        (bucket / "model" / file.name).write_bytes(file.read_bytes())
    local, remote = open_source(str(original)), open_source(str(bucket / "model"))
    assert remote.config == local.config and set(remote.tensors) == set(local.tensors)
    for name, info in local.tensors.items():
        index = tuple(slice(n // 3, n - n // 4) for n in info.shape)
        np.testing.assert_array_equal(remote.read(name, index), local.read(name, index))
    convert(str(bucket / "model"), str(tmp_path / "orbax"), progress=False)
    convert(str(tmp_path / "orbax"), str(bucket / "back"), "hf", progress=False)
    assert sorted(p.name for p in (bucket / "back").iterdir()) == sorted(p.name for p in original.iterdir())
    for file in original.iterdir():
        assert (bucket / "back" / file.name).read_bytes() == file.read_bytes(), file.name


class HttpError(Exception):
    """As gcsfs has one: neither an OSError nor a RuntimeError."""


def _failing(*args, **kwargs):
    raise HttpError("Invalid Credentials, 401\nsee there")


@pytest.mark.parametrize("method", ["info", "ls", "_open"])
def test_a_bucket_that_fails_is_said_in_a_line(tmp_path, bucket, monkeypatch, method):
    original = write(tmp_path / "hf", hf_config(), canonical_tensors(hf_config()))
    convert(str(original), str(tmp_path / "orbax"), progress=False)
    for file in original.iterdir():
        (bucket / "model" / file.name).write_bytes(file.read_bytes())
    opened = open_source(str(bucket / "model"))
    monkeypatch.setattr(Bucket, method, _failing)
    with pytest.raises(UserError, match=r"^cannot read gs://bucket/model: Invalid Credentials, 401$"):
        open_source(str(bucket / "model"))
    if method == "_open":
        with pytest.raises(UserError, match=r"^cannot read gs://bucket/model/model.safetensors: Invalid Credentials, 401$"):
            opened.read("lm_head.weight")
    if method != "ls":  # nothing is listed there
        with pytest.raises(UserError, match="^(could not write|cannot read) gs://bucket/back: Invalid Credentials, 401.*$"):
            convert(str(tmp_path / "orbax"), str(bucket / "back"), "hf", progress=False)


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_interrupted(tmp_path, to):
    config = hf_config(moe=True)
    original = write(tmp_path / "in" / "hf", config, per_expert(canonical_tensors(config)), shards=3)
    src, dst = original, tmp_path / "out" / "dst"
    dst.parent.mkdir()
    if to == "hf":
        src = tmp_path / "in" / "orbax"
        convert(str(original), str(src), progress=False)
    command = [sys.executable, "-W", "ignore", str(INTERRUPTED), str(src), str(dst), to]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, timeout=300)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr[-2000:]
    *trials, leftovers, again = [line for line in lines if not line.startswith("error: ")]
    assert len(trials) == (11 if to == "orbax" else 9), done.stdout
    for line in trials:
        name, result = line.split(": ")
        status = {"Ctrl-C": "130", "full disk": "1"}.get(name, "-9")
        late = "status 0, dst True" if name in ("kill in the middle", "kill later") else None
        there = name == "kill after the rename"
        assert result in (f"status {status}, dst {there}", late), line
    assert leftovers == "partial False"  # after a failed run; killed ones leave a directory that the next one clears
    assert again == "again: status 0, dst True"
    for i, complete in enumerate(dst.parent.iterdir()):
        if to == "orbax":
            convert(str(complete), str(tmp_path / f"back{i}"), "hf", progress=False)
            complete = tmp_path / f"back{i}"
        assert _same(original, complete)


def test_command_line(tmp_path):
    original = write(tmp_path / "hf", hf_config(), canonical_tensors(hf_config()))
    commands = {
        ("--nonsense", "a", "b"): "error: Unknown command line flag 'nonsense'",
        ("only",): "error: expected SRC and DST",
        ("", "b"): "error: SRC is empty",
        (original.name, "orbax"): "",
    }
    run = [sys.executable, "-m", "qwen35_jax.convert"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    place = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    processes = {args: subprocess.Popen([*run, *args], **pipes, **place) for args in commands}
    for args, process in processes.items():
        out, err = process.communicate(timeout=120)
        message = commands[args]
        assert (process.returncode != 0) == bool(message), (args, err)
        if message:
            assert err.startswith(message) and err.count("\n") == 1 and not out, (args, err)
    assert not err, "no bar where there is no terminal"
    assert subprocess.run([*run, "orbax", "back", "--to", "hf"], timeout=120, **place).returncode == 0
    assert _same(original, tmp_path / "back")


def test_the_export_is_what_the_reference_reads(tmp_path):
    config = hf_config()
    tensors = canonical_tensors(config)
    original = write(tmp_path / "hf", config, tensors)
    convert(str(original), str(tmp_path / "orbax"), progress=False)
    convert(str(tmp_path / "orbax"), str(tmp_path / "back"), "hf", progress=False)
    back = safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys()
    assert all(back[n].tobytes() == x.tobytes() for n, x in tensors.items())
