"""Decoding against the gguf package's own, bit for bit."""

from __future__ import annotations

import time

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import ModelFormatError
from megalith.model.formats import FORMATS, dequantize, row_bytes
from megalith.model.gguf import GgufFile
from tests.model.packaged import NAMES, opened, package_reader

PUBLISHED = [name for name in FORMATS if not name.startswith("BIPOLAR")]
"""Those of the gguf package; our own are in test_bipolar."""


def _same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    theirs = np.asarray(theirs, np.float32).reshape(ours.shape)
    numbers = ~np.isnan(theirs)
    # A NaN may carry another payload; everything else is the same 32 bits.
    assert np.array_equal(np.isnan(ours), ~numbers)
    assert np.array_equal(ours.view(np.uint32)[numbers], theirs.view(np.uint32)[numbers])


@pytest.mark.parametrize("name", PUBLISHED)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 5), blocks=st.integers(1, 6))
def test_random_blocks_decode_to_the_same_bits(name: str, seed: int, rows: int, blocks: int) -> None:
    elements, size = FORMATS[name]
    raw = np.random.default_rng(seed).integers(0, 256, (rows, blocks * size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(raw, gguf.GGMLQuantizationType[name])
    _same_bits(dequantize(raw, name, (rows, blocks * elements)), expected)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_table_is_the_gguf_packages(name: str) -> None:
    assert tuple(FORMATS[name]) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]


@pytest.mark.parametrize("name", NAMES)
def test_both_real_models_decode_to_the_same_bits(name: str) -> None:
    path = opened(name).files.path
    ours = GgufFile(path)
    formats = set()
    for tensor in package_reader(name).tensors:
        entry = ours.tensors[tensor.name]
        rows = slice(0, 4096)  # of the embedding; all of every other tensor
        shape = (min(4096, entry.shape[0]), *entry.shape[1:])
        raw = ours.raw(tensor.name)[: shape[0] * (entry.num_bytes // entry.shape[0])]
        values = dequantize(raw, entry.type, shape)
        _same_bits(values, gguf.dequantize(tensor.data[rows], tensor.tensor_type))
        formats.add(entry.type)
    assert formats == {"smollm2": {"Q4_1", "Q8_0", "F32"}, "gemma3-270m": {"Q5_0", "Q4_K", "Q8_0", "Q6_K", "F32"}}[name]


def test_chunks_do_not_show() -> None:
    """More blocks than are decoded at a time."""
    raw = np.random.default_rng(0).integers(0, 100, (70_000, 34), dtype=np.uint8)
    whole = dequantize(raw, "Q8_0", (70_000, 32))
    for start in (0, 32_767, 32_768, 69_999):
        assert np.array_equal(whole[start], dequantize(raw[start], "Q8_0", (32,)))


def test_the_result_is_writable_and_does_not_share_the_file() -> None:
    raw = np.zeros(16, np.uint8)
    raw.flags.writeable = False
    values = dequantize(raw, "F32", (2, 2))
    values += 1
    assert values.sum() == 4
    assert raw.sum() == 0


def test_smollm2_decodes_fast_enough_to_start_with() -> None:
    file = GgufFile(opened("smollm2").files.path)
    start = time.process_time()
    for name, tensor in file.tensors.items():
        dequantize(file.raw(name), tensor.type, tensor.shape)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("size", "name", "shape", "message"),
    [
        (34, "Q3_K", (32,), "Q3_K is not supported"),
        (34, "Q8_0", (31,), "31 weights cannot be Q8_0"),
        (33, "Q8_0", (32,), "take 34 bytes, but there are 33"),
        (8, "F32", (3,), "take 12 bytes"),
    ],
)
def test_what_does_not_fit_is_refused(size: int, name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ModelFormatError, match=message):
        dequantize(np.zeros(size, np.uint8), name, shape)


def test_row_bytes() -> None:
    assert [row_bytes(name, 512) for name in ("F32", "BF16", "Q4_1", "Q6_K")] == [2048, 1024, 320, 420]
