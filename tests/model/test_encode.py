"""Encoders: what they write decodes to the nearest values, never worse in a block than the gguf package's."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import ModelFormatError
from megalith.model.encode import encode, writable
from megalith.model.formats import FORMATS, dequantize, row_bytes

BLOCKS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


def _errors(raw: np.ndarray, kind: str, x: np.ndarray) -> np.ndarray:
    off = dequantize(raw, kind, x.shape).astype(np.float64) - x
    return (off.reshape(-1, FORMATS[kind].block_elements) ** 2).sum(1)


@pytest.mark.parametrize("kind", BLOCKS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([1e-3, 0.05, 1.0, 300.0]), tail=st.sampled_from([1, 3]))
def test_no_block_is_worse_than_the_gguf_packages(kind: str, seed: int, scale: float, tail: int) -> None:
    x = (np.random.default_rng(seed).standard_normal((3, 128)) ** tail * scale).astype(np.float32)
    theirs = gguf.quantize(x, gguf.GGMLQuantizationType[kind])
    ours = encode(x, kind)
    assert ours.shape == (3, row_bytes(kind, 128))
    assert (_errors(ours, kind, x) <= _errors(theirs, kind, x) * (1 + 1e-4) + 1e-20).all()


def test_the_search_helps_where_bits_are_few() -> None:
    x = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    share = {
        kind: _errors(encode(x, kind), kind, x).sum()
        / _errors(gguf.quantize(x, gguf.GGMLQuantizationType[kind]), kind, x).sum()
        for kind in BLOCKS
    }
    assert share["Q4_0"] < 0.95
    assert share["Q4_1"] < 0.9


@pytest.mark.parametrize("kind", [kind for kind in writable() if not kind.startswith("BIPOLAR")])
def test_values_that_the_format_holds_come_back_bit_for_bit(kind: str) -> None:
    """Blocks that use both ends of their levels: the plain scale is exact, so decode, encode, decode is stable."""
    rng = np.random.default_rng(3)
    if kind in ("F32", "F16", "BF16"):
        x = dequantize(encode(rng.standard_normal((4, 64)).astype(np.float32), kind), kind, (4, 64))
    else:
        low, high = {"Q8_0": (-127, 127), "Q4_0": (-8, 7), "Q5_0": (-16, 15)}.get(kind, (0, 31 if "5" in kind else 15))
        q = rng.integers(low, high + 1, (40, 32)).astype(np.float32)
        q[:, 5], q[:, 9] = low, high
        x = (q - (8 if low == 0 else 0)) * np.float32(0.125)
    again = dequantize(encode(x, kind), kind, x.shape)
    np.testing.assert_array_equal(again, x)


@pytest.mark.parametrize("kind", [kind for kind in writable() if not kind.startswith("BIPOLAR")])
def test_zeros_constants_and_tiny_weights_stay_finite(kind: str) -> None:
    x = np.zeros((4, 32), np.float32)
    x[1], x[2], x[3, 7] = 0.5, 1e-9, 1e-30
    back = dequantize(encode(x, kind), kind, x.shape)
    assert np.isfinite(back).all()
    assert not back[0].any()
    assert abs(back[1] - 0.5).max() < 0.5 / 100
    assert abs(back[2:]).max() < 1e-7


def test_bf16_is_the_gguf_packages_bit_for_bit() -> None:
    x = np.random.default_rng(1).integers(0, 2**31 - 2**24, (8, 64), dtype=np.uint32).view(np.float32)
    np.testing.assert_array_equal(encode(x, "BF16"), gguf.quantize(x, gguf.GGMLQuantizationType.BF16))


def test_what_cannot_be_written_is_refused_with_numbers() -> None:
    x = np.ones((1, 32), np.float32)
    for bad, kind, words in [
        (x * np.nan, "Q8_0", "finite"),
        (x * 1e6, "Q4_1", "65504"),
        (x, "Q4_K", "only read"),
        (x[:, :31], "Q4_0", "31"),
    ]:
        with pytest.raises(ModelFormatError, match=words):
            encode(bad, kind)
