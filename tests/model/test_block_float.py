"""Block floating point: bounds, exactness, bytes; and what options say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.base.errors import ConfigError, EngineError
from megalith.cost.memory import kv_bytes_per_token
from megalith.model.block_float import decode, encode, steps_of
from megalith.specs import catalog
from megalith.specs.kv_format import BlockFloat, KvFormat, parse_kv_format

FORMS = [BlockFloat(bits, block) for bits in range(2, 9) for block in (8, 32, 64)]


@pytest.mark.parametrize("form", FORMS)
def test_bounds_and_bytes(form: BlockFloat) -> None:
    rng = np.random.default_rng(form.bits)
    values = (rng.standard_normal((50, 3, 128)) * np.exp(rng.uniform(-60, 60, (50, 3, 1)))).astype(np.float32)
    raw = encode(values, form)
    assert raw.shape == (50, 3, form.row_bytes(128))
    assert form.row_bytes(128) * 8 == 128 // form.block * (8 + form.block * form.bits)
    steps = steps_of(raw.reshape(50, 3, -1, form.block_bytes), form)[..., None]
    blocks, found = (x.reshape(50, 3, -1, form.block) for x in (values, decode(raw, form)))
    half = 2 ** (form.bits - 1)
    error = np.abs(found - blocks) / steps
    assert (error <= np.where(blocks / steps > half - 1, 1.0, 0.5)).all()
    # The exponent is the smallest that holds the largest: one bit less and it would not fit.
    peak = np.abs(blocks).max(-1, keepdims=True) / steps
    assert ((peak >= half / 2) & (peak < half)).all()


@given(st.integers(2, 8), st.integers(-100, 100), st.integers(0, 2**32))
def test_what_fits_is_exact(bits: int, exponent: int, seed: int) -> None:
    """Mantissas times a power of two come back to the bit, and encoding again changes nothing."""
    form, half = BlockFloat(bits, 16), 2 ** (bits - 1)
    mantissas = np.random.default_rng(seed).integers(-half + 1, half, (4, 16))
    mantissas[:, 0] = half - 1  # So that the step is this one.
    values = np.ldexp(mantissas.astype(np.float32), exponent)
    raw = encode(values, form)
    assert (decode(raw, form) == values).all()
    assert (encode(decode(raw, form), form) == raw).all()


def test_zeros_and_what_is_too_small() -> None:
    form = BlockFloat(3)
    values = np.array([[0.0] * 32, [1e-40] * 32], np.float32)
    assert (decode(encode(values, form), form) == 0).all()
    assert (decode(np.zeros((1, form.block_bytes), np.uint8), form) == 0).all()
    for bad in (np.nan, np.inf, -(2.0**127)):
        values[1, 5] = bad
        with pytest.raises(EngineError, match="not finite"):
            encode(values, form)


def test_a_block_of_one_outlier_loses_its_small_ones() -> None:
    """What the order of channels is there for."""
    form = BlockFloat(4, 8)
    values = np.array([100.0] + [1.0] * 7 + [1.0] * 8, np.float32)
    found = decode(encode(values, form), form)
    assert (found[1:8] == 0).all()
    assert (found[8:] == 1).all()


def test_options() -> None:
    assert parse_kv_format("") is None
    assert parse_kv_format("bfp4") == KvFormat(BlockFloat(4, 32), BlockFloat(4, 32))
    assert parse_kv_format("BFP3:block=16,values=8,reorder") == KvFormat(BlockFloat(3, 16), BlockFloat(8, 16), True)
    for text, words in (
        ("q4", "kv_format is 'q4'"),
        ("bfp4:", "'' says nothing"),
        ("bfp4:block", "'block' says nothing"),
        ("bfp9", "mantissas of 9 bits"),
        ("bfp4:values=1", "mantissas of 1 bits"),
        ("bfp4:block=12", "multiples of 8"),
        ("bfp4:block=0", "multiples of 8"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse_kv_format(text)


def test_the_planner_counts_the_same_bytes() -> None:
    spec = catalog.model("smollm2-135m")
    heads = spec.num_layers * spec.num_kv_heads
    assert kv_bytes_per_token(spec, "bfp4") == heads * 2 * (64 // 32) * (1 + 16)
    assert kv_bytes_per_token(spec, "bfp3:block=16,values=8") == heads * 4 * (7 + 17)
    with pytest.raises(ConfigError, match="do not divide the heads") as error:
        kv_bytes_per_token(spec, "bfp4:block=48")
    assert "block=" in (error.value.hint or "")
