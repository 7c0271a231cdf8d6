"""The safetensors reader: what the format allows is read as the reference does, everything else is a one-line error."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen35_jax.checkpoint import safetensors_file
from qwen35_jax.checkpoint.safetensors_file import DTYPES, SafetensorsFile, make_header, parse_header, write_safetensors
from qwen35_jax.errors import UserError


def _file(path, header: dict | bytes, data: bytes = b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def _entry(dtype="U8", shape=(4,), offsets=(0, 4), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | more


def test_reads_what_the_reference_writes(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.normal(size=(3, 4, 5)).astype(ml_dtypes.bfloat16),
        "b": rng.normal(size=(7,)).astype(np.float32),
        "fp8": rng.normal(size=(2, 3)).astype(ml_dtypes.float8_e4m3fn),
        "scalar": np.array(3, np.int64),
        "bool": np.array([True, False, True]),
        "empty": np.zeros((0, 4), np.float16),
    }
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.header.metadata == {"format": "pt"}
    for name, want in tensors.items():
        got = file.read(name)
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        assert got.tobytes() == want.tobytes()
        file.release(name)
    part = file.read("a", (slice(1, 3), slice(None), slice(2, 4)))
    np.testing.assert_array_equal(part, tensors["a"][1:3, :, 2:4])


def test_reads_ranges_where_files_cannot_be_mapped(tmp_path, monkeypatch):
    x = np.arange(60, dtype=np.int32).reshape(5, 4, 3)
    safetensors.numpy.save_file({"x": x, "s": np.array(2.0)}, tmp_path / "x.safetensors")
    monkeypatch.setattr(safetensors_file, "is_local", lambda path: False)
    file = SafetensorsFile(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(file.read("x", (slice(1, 3), slice(2, 4))), x[1:3, 2:4])
    np.testing.assert_array_equal(file.read("x"), x)
    assert file.read("s") == 2.0


def test_misaligned_data_is_read(tmp_path):
    header = json.dumps({"x": _entry("F32", (2,), (0, 8))}).encode()
    header += b" " * (1 - len(header) % 2)  # any odd length
    _file(tmp_path / "x.safetensors", header, np.array([1.5, 2.5], np.float32).tobytes())
    np.testing.assert_array_equal(SafetensorsFile(tmp_path / "x.safetensors").read("x"), [1.5, 2.5])


def test_writer_makes_what_the_reference_reads(tmp_path):
    tensors = {"x": np.arange(12, dtype=np.float32).reshape(3, 4), "y": np.ones(5, ml_dtypes.bfloat16)}
    header = make_header({n: (x.dtype, x.shape) for n, x in tensors.items()}, {"format": "pt"})
    write_safetensors(tmp_path / "x.safetensors", header, iter([tensors["x"][:1], tensors["x"][1:], tensors["y"]]))
    back = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(back["x"], tensors["x"])
    with pytest.raises(ValueError, match="wrote 4 bytes"):
        write_safetensors(tmp_path / "y.safetensors", header, iter([np.zeros(4, np.uint8)]))
    assert not (tmp_path / "y.safetensors").exists()


BAD_HEADERS = {
    "no JSON": (b"{nonsense", "not valid JSON"),
    "no UTF-8": (b"\xff\xfe{}", "not valid JSON"),
    "deep": (b"[" * 100_000, "not valid JSON"),
    "no object": (b"[]", "no JSON object"),
    "twice": (b'{"x": 1, "x": 2}', "not valid JSON"),
    "entry": ({"x": 5}, "exactly dtype"),
    "more": ({"x": _entry(extra=1)}, "exactly dtype"),
    "dtype": ({"x": _entry("F4")}, "dtype 'F4'"),
    "dtype type": ({"x": _entry(["U8"])}, "dtype"),
    "negative": ({"x": _entry(shape=(-4,), offsets=(0, -4))}, "impossible shape"),
    "float": ({"x": _entry(shape=(4.0,))}, "impossible shape"),
    "true": ({"x": _entry(shape=(True, 4))}, "impossible shape"),
    "huge": ({"x": _entry(shape=(0, 10**30), offsets=(0, 0))}, "impossible shape"),
    "rank": ({"x": _entry(shape=(1,) * 100, offsets=(0, 1))}, "impossible shape"),
    "backwards": ({"x": _entry(offsets=(4, 0))}, "impossible data_offsets"),
    "three": ({"x": _entry(offsets=(0, 2, 4))}, "impossible data_offsets"),
    "size": ({"x": _entry(shape=(5,))}, "needs 5 bytes"),
    "overlap": ({"x": _entry(), "y": _entry(offsets=(2, 6))}, "overlaps"),
    "same": ({"x": _entry(), "y": _entry()}, "overlaps"),
    "hole": ({"x": _entry(), "y": _entry(offsets=(6, 10))}, "hole"),
    "metadata": ({"__metadata__": {"a": 1}}, "__metadata__"),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_lying_header(tmp_path, name):
    header, message = BAD_HEADERS[name]
    path = _file(tmp_path / "x.safetensors", header, bytes(16))
    with pytest.raises(UserError, match=message) as error:
        SafetensorsFile(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 800


def test_lengths_that_lie(tmp_path):
    header = {"x": _entry("U8", (100,), (0, 100))}
    for keep, message in ((50, "truncated: .* promises"), (150, "accounts for")):
        _file(tmp_path / "x.safetensors", header, bytes(keep))
        with pytest.raises(UserError, match=message):
            SafetensorsFile(tmp_path / "x.safetensors")
    for content, message in (
        (b"", "truncated"),
        (b"1234", "truncated"),
        ((10**6).to_bytes(8, "little") + b"{}", "truncated"),
        ((2**63).to_bytes(8, "little") + b"{}", "at most"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ):
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=message):
            SafetensorsFile(tmp_path / "x.safetensors")


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
_numbers = st.lists(st.integers(-2, 9) | st.sampled_from([2**31, 2**63, 10**40]), max_size=3)
_like_entry = st.fixed_dictionaries(
    {"dtype": st.sampled_from([*DTYPES, "F4", ""]), "shape": _numbers | _json, "data_offsets": _numbers | _json}
)


@settings(max_examples=300)
@given(st.binary(max_size=64) | _json | st.dictionaries(st.text(max_size=4), _like_entry | _json, max_size=3))
def test_any_header_is_read_or_refused(value):
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    try:
        header = parse_header(raw, "file")
    except UserError as error:
        assert str(error).startswith("file")
        return
    position = 0
    for info in header.tensors.values():  # accepted: the tensors tile the data
        assert info.start == position
        assert info.stop - info.start == info.dtype.itemsize * int(np.prod(info.shape, dtype=object))
        position = info.stop
    assert header.data_size == position


@settings(max_examples=60)
@given(st.dictionaries(st.text(max_size=6), st.tuples(st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 5)))))
def test_own_headers_are_accepted(tensors):
    tensors = {name: (dtype, tuple(shape[:4])) for name, (dtype, shape) in tensors.items() if name != "__metadata__"}
    header = parse_header(make_header(tensors), "file")
    assert {n: (i.dtype, i.shape) for n, i in header.tensors.items()} == tensors
