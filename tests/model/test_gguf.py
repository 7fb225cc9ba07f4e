"""The GGUF reader against the gguf package, and against files that lie."""

from __future__ import annotations

import contextlib
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalith.base.errors import ModelFormatError, ModelNotFound
from megalith.model.gguf import GgufFile
from tests.model.packaged import NAMES, opened, package_reader

# Generous: machines that run tests are busy. A reader that is linear in the file needs milliseconds.
_SOON_S = 10.0


def _small(path: Path, alignment: int | None = None) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("a.float", 0.1)
    writer.add_bool("a.flag", True)
    writer.add_int64("a.long", -(2**40))
    writer.add_string("a.text", "grüße")
    writer.add_array("a.words", ["a", "bc", "", "déf"])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_array("a.flags", [True, False])
    writer.add_tensor("w", np.arange(64, dtype=np.float32).reshape(2, 32))
    writer.add_tensor("h", np.arange(6, dtype=np.float16))
    quantised = gguf.quants.quantize(np.ones((4, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("q", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _small(tmp_path_factory.mktemp("gguf") / "small.gguf")


@pytest.mark.parametrize("alignment", [None, 64, 256])
def test_values_and_tensors_come_back(tmp_path: Path, alignment: int | None) -> None:
    file = GgufFile(_small(tmp_path / "x.gguf", alignment))
    data = file.metadata
    assert data["general.architecture"] == "llama"
    assert (data["llama.block_count"], data["a.flag"], data["a.long"]) == (2, True, -(2**40))
    assert data["a.float"] == np.float32(0.1)
    assert data["a.text"] == "grüße"
    assert data["a.words"] == ["a", "bc", "", "déf"]
    assert data["a.numbers"].tolist() == [1, 2, 3]
    assert data["a.flags"].tolist() == [True, False]
    assert file.tensors["w"].shape == (2, 32)
    assert file.raw("w").view(np.float32).tolist() == list(range(64))
    assert file.raw("h").view(np.float16).tolist() == list(range(6))
    assert (file.tensors["q"].type, file.tensors["q"].shape, file.raw("q").size) == ("Q8_0", (4, 64), 4 * 68)


@pytest.mark.parametrize("name", NAMES)
def test_a_real_header_equals_the_gguf_packages_reading(name: str) -> None:
    path = opened(name).files.path
    ours, theirs = GgufFile(path), package_reader(name)
    assert {t.name for t in theirs.tensors} == set(ours.tensors)
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert (mine.type, mine.offset, mine.num_bytes) == (tensor.tensor_type.name, tensor.data_offset, tensor.n_bytes)
        assert mine.shape == tuple(int(n) for n in reversed(tensor.shape.tolist()))
    keys = [key for key in theirs.fields if not key.startswith("GGUF.")]
    assert keys == list(ours.metadata)
    for key in keys:
        field = theirs.fields[key]
        if len(field.data) > 1000:  # contents() of a token list takes seconds: sample it
            picks = range(0, len(field.data), 997)
            assert len(ours.metadata[key]) == len(field.data)
            assert [ours.metadata[key][i] for i in picks] == [field.contents(i) for i in picks], key
        else:
            value = ours.metadata[key]
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents(), key


def test_the_header_of_smollm2_is_read_within_its_time() -> None:
    path = opened("smollm2").files.path
    times = []
    for _ in range(5):
        start = time.process_time()
        GgufFile(path)
        times.append(time.process_time() - start)
    assert min(times) < 0.3, times


def test_every_truncation_is_refused_or_leaves_what_was_read_whole(small: Path, tmp_path: Path) -> None:
    data = small.read_bytes()
    cut = tmp_path / "cut.gguf"
    start = time.monotonic()
    # The last tensor ends before the padding at the end of the file.
    end = max(t.offset + t.num_bytes for t in GgufFile(small).tensors.values())
    for size in [*range(0, end - 300, 7), *range(end - 300, end)]:
        cut.write_bytes(data[:size])
        with pytest.raises(ModelFormatError, match=r"\d"):
            GgufFile(cut)
    assert time.monotonic() - start < 12 * _SOON_S


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 900), st.integers(1, 255)), min_size=1, max_size=8))
def test_flipped_bytes_end_in_an_error_or_a_sound_file(small: Path, flips: list[tuple[int, int]]) -> None:
    data = bytearray(small.read_bytes())
    for at, mask in flips:
        data[at % len(data)] ^= mask
    path = small.with_name("flipped.gguf")
    path.write_bytes(data)
    start = time.monotonic()
    with contextlib.suppress(ModelFormatError):
        file = GgufFile(path)
        for name, tensor in file.tensors.items():
            assert tensor.offset + tensor.num_bytes <= len(data)
            assert file.raw(name).size == tensor.num_bytes
    assert time.monotonic() - start < _SOON_S


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=400), version=st.sampled_from([2, 3]))
def test_garbage_after_a_good_beginning_never_hangs(small: Path, data: bytes, version: int) -> None:
    path = small.with_name("garbage.gguf")
    path.write_bytes(b"GGUF" + struct.pack("<I", version) + data)
    start = time.monotonic()
    with contextlib.suppress(ModelFormatError):
        GgufFile(path)
    assert time.monotonic() - start < _SOON_S


def _header(tensors: int = 0, keys: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest + bytes(64)


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def _tensor(name: str = "w", dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return _text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def _key(name: str, kind: int, payload: bytes) -> bytes:
    return _text(name) + struct.pack("<I", kind) + payload


_HOSTILE = {
    "magic": (b"GGML" + bytes(60), "not a GGUF"),
    "too short": (b"GGUF", "4 bytes"),
    "version 1": (_header(version=1), "version 1"),
    "version 4": (_header(version=4), "version 4"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(60), "big-endian"),
    "2**63 keys": (_header(keys=2**63), "9223372036854775808 keys"),
    "2**60 tensors": (_header(tensors=2**60), "1152921504606846976 tensors"),
    "string past the end": (_header(keys=1, rest=struct.pack("<Q", 2**62)), "ends at byte"),
    "array of 2**50 strings": (_header(keys=1, rest=_key("k", 9, struct.pack("<IQ", 8, 2**50))), "1125899906842624"),
    "array of 2**61 numbers": (_header(keys=1, rest=_key("k", 9, struct.pack("<IQ", 4, 2**61))), "2305843009213693952"),
    "value type 99": (_header(keys=1, rest=_key("k", 99, b"")), "type 99"),
    "element type 99": (_header(keys=1, rest=_key("k", 9, struct.pack("<IQ", 99, 1))), "type 99"),
    "nested arrays": (_header(keys=1, rest=_key("k", 9, struct.pack("<IQ", 9, 1) * 40)), "deep"),
    "key twice": (_header(keys=2, rest=_key("k", 0, b"\1") * 2), "twice"),
    "tensor twice": (_header(tensors=2, rest=_tensor(dims=(2,)) * 2), "twice"),
    "five dimensions": (_header(tensors=1, rest=_tensor(dims=(1, 1, 1, 1, 1))), "5 dimensions"),
    "no dimension": (_header(tensors=1, rest=_tensor(dims=())), "0 dimensions"),
    "empty shape": (_header(tensors=1, rest=_tensor(dims=(0, 4))), "shape"),
    "2**252 elements": (_header(tensors=1, rest=_tensor(dims=(2**63, 2**63, 2**63, 2**63))), "truncated or damaged"),
    "offset past the end": (_header(tensors=1, rest=_tensor(offset=2**40)), "1099511627968"),
    "offset not aligned": (_header(tensors=1, rest=_tensor(dims=(2,), offset=3)), "offset 3"),
    "row of 33 in Q8_0": (_header(tensors=1, rest=_tensor(dims=(33,), kind=8)), "Q8_0"),
    "format IQ2_XS": (_header(tensors=1, rest=_tensor(dims=(256,), kind=17)), "IQ2_XS"),
    "format 77": (_header(tensors=1, rest=_tensor(kind=77)), "number 77"),
    "alignment 0": (_header(keys=1, rest=_key("general.alignment", 4, struct.pack("<I", 0))), "alignment"),
    "alignment 24": (_header(keys=1, rest=_key("general.alignment", 4, struct.pack("<I", 24))), "alignment"),
}


@pytest.mark.parametrize("name", _HOSTILE)
def test_hostile_headers_are_refused_with_numbers(name: str, tmp_path: Path) -> None:
    data, message = _HOSTILE[name]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    start = time.monotonic()
    with pytest.raises(ModelFormatError, match=message):
        GgufFile(path)
    assert time.monotonic() - start < _SOON_S


def test_a_huge_claim_in_a_huge_file_is_refused_too(tmp_path: Path) -> None:
    """A sparse file of 64 GiB would have room for the array that it claims; memory would not."""
    path = tmp_path / "sparse.gguf"
    with path.open("wb") as out:
        out.write(_header(keys=1, rest=_key("k", 9, struct.pack("<IQ", 8, 2**31))))
        out.truncate(64 << 30)
    start = time.monotonic()
    with pytest.raises(ModelFormatError, match="2147483648 strings"):
        GgufFile(path)
    assert time.monotonic() - start < _SOON_S


def test_invalid_utf8_in_a_token_does_not_stop_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(_header(keys=1, rest=_key("k", 8, struct.pack("<Q", 2) + b"\xff\xfe")))
    assert GgufFile(path).metadata["k"] == "\ufffd\ufffd"


def test_missing_file_and_unknown_tensor(tmp_path: Path, small: Path) -> None:
    with pytest.raises(ModelNotFound, match="not a file"):
        GgufFile(tmp_path / "absent.gguf")
    with pytest.raises(ModelNotFound, match="not a file"):
        GgufFile(tmp_path)
    with pytest.raises(ModelFormatError, match="no tensor named nope"):
        GgufFile(small).raw("nope")


def _part(path: Path, name: str, value: float, count: int) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.count", count)
    writer.add_tensor(name, np.full((2, 4), value, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_split_model_is_read_through_its_first_part(tmp_path: Path) -> None:
    first = tmp_path / "m-00001-of-00002.gguf"
    _part(first, "a", 1.0, 2)
    with pytest.raises(ModelNotFound, match="00002-of-00002"):
        GgufFile(first)
    _part(tmp_path / "m-00002-of-00002.gguf", "b", 2.0, 2)
    file = GgufFile(first)
    assert {n: file.raw(n).view(np.float32)[0] for n in file.tensors} == {"a": 1.0, "b": 2.0}
    alone = tmp_path / "renamed.gguf"
    alone.write_bytes(first.read_bytes())
    with pytest.raises(ModelFormatError, match="one of 2 files"):
        GgufFile(alone)
