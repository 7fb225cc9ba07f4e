"""Bipolar integers: the decomposition is exact, blocks take n bits a weight, files say what they hold or fail."""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import ConfigError, ModelFormatError
from megalith.model import bipolar
from megalith.model.encode import encode
from megalith.model.formats import FORMATS, dequantize, row_bytes
from megalith.model.gguf import ACTIVATION_BITS_KEY, OWN_FORMATS_KEY, GgufFile
from megalith.model.gguf_write import pair
from megalith.model.open import open_model
from megalith.model.quantize import Recipe, quantize
from megalith.model.source import resolve
from tests.engine.tiny import write_tiny_llama


@settings(max_examples=60, deadline=None)
@given(
    w_bits=st.sampled_from(bipolar.WIDTHS), a_bits=st.sampled_from(bipolar.WIDTHS), size=st.integers(1, 70),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_planes_recover_the_product(w_bits: int, a_bits: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    w = rng.integers(0, 2**w_bits, (3, size), dtype=np.uint8)
    a = rng.integers(0, 2**a_bits, (2, size), dtype=np.uint8)
    whole = bipolar.product(a, a_bits, w, w_bits)
    np.testing.assert_array_equal(bipolar.product_by_planes(a, a_bits, w, w_bits), whole)
    # A level is the sum of its bits' values, as the definition has it.
    by_bits = sum((2 * plane.astype(int) - 1) << i for i, plane in enumerate(bipolar.planes_of(w, w_bits)))
    np.testing.assert_array_equal(bipolar.levels(w, w_bits), by_bits)


@pytest.mark.parametrize("bits", bipolar.WIDTHS)
def test_levels_are_odd_and_symmetric(bits: int) -> None:
    levels = bipolar.levels(np.arange(2**bits, dtype=np.uint8), bits)
    assert (levels % 2 == 1).all()
    np.testing.assert_array_equal(levels, -levels[::-1])
    assert levels[-1] == 2**bits - 1


@pytest.mark.parametrize("bits", bipolar.WIDTHS)
def test_a_block_takes_n_bits_a_weight_and_a_scale(bits: int) -> None:
    kind = bipolar.format_name(bits)
    assert 8 * FORMATS[kind].block_bytes == 64 * bits + 16
    raw = encode(np.ones((3, 192), np.float32), kind)
    assert raw.shape == (3, 3 * (8 * bits + 2))


@settings(max_examples=40, deadline=None)
@given(bits=st.sampled_from(bipolar.WIDTHS), seed=st.integers(0, 2**32 - 1))
def test_what_a_block_can_say_comes_back(bits: int, seed: int) -> None:
    """Both ends of the levels in every block, so that the plain scale is exact."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (5, 64), dtype=np.uint8)
    codes[:, 3], codes[:, 40] = 0, 2**bits - 1
    x = (bipolar.levels(codes, bits) * 0.25).astype(np.float32)
    raw = encode(x, bipolar.format_name(bits))
    np.testing.assert_array_equal(bipolar.unpacked(raw, bits)[0], codes)
    np.testing.assert_array_equal(dequantize(raw, bipolar.format_name(bits), x.shape), x)


def test_more_bits_are_nearer_and_no_weight_has_a_nearer_level() -> None:
    x = np.random.default_rng(2).standard_normal((50, 128)).astype(np.float32)
    errors = []
    for bits in bipolar.WIDTHS:
        raw = encode(x, bipolar.format_name(bits))
        codes, scales = bipolar.unpacked(raw.reshape(-1, bipolar.block_bytes(bits)), bits)
        blocks = x.reshape(-1, 64)
        every = bipolar.levels(np.arange(2**bits, dtype=np.uint8), bits) * scales[:, None]
        least = np.abs(every[:, None] - blocks[:, :, None]).min(2)
        got = np.abs(bipolar.levels(codes, bits) * scales[:, None] - blocks)
        np.testing.assert_allclose(got, least, atol=1e-5)
        errors.append(float(np.sqrt((got**2).mean())))
    # Uniform levels of least error for normal values leave 0.60, 0.345, 0.19, ... of the spread; blocks do no worse.
    assert all(later < 0.6 * before for before, later in pairwise(errors))
    assert errors[0] < 0.61
    assert errors[3] < 0.1


def test_zeros_damage_and_odd_rows() -> None:
    for bits in bipolar.WIDTHS:
        kind = bipolar.format_name(bits)
        assert not dequantize(encode(np.zeros((1, 64), np.float32), kind), kind, (1, 64)).any()
        with pytest.raises(ModelFormatError, match="not a finite"):
            encode(np.full((1, 64), np.nan, np.float32), kind)
        with pytest.raises(ModelFormatError, match="blocks hold 64"):
            row_bytes(kind, 96)
        with pytest.raises(ModelFormatError, match="take"):
            dequantize(np.zeros(8 * bits + 1, np.uint8), kind, (1, 64))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "source")


def test_a_file_holds_each_matrix_in_its_own_width(source: Path, tmp_path: Path) -> None:
    recipe = Recipe.of("bipolar4a6", {"v": "BIPOLAR7", "layers.1.q": "Q8_0"})
    quantize(resolve(str(source)), recipe, tmp_path / "b.gguf")
    ours, theirs = open_model(str(tmp_path / "b.gguf")).checkpoint, open_model(str(source)).checkpoint
    kinds = {name: ours.stored_format(name) for name in ours.names()}
    assert ours.activation_bits == 6
    assert kinds["embed.weight"] == kinds["head.weight"] == kinds["layers.1.q.weight"] == "Q8_0"
    assert (kinds["layers.0.q.weight"], kinds["layers.0.v.weight"]) == ("BIPOLAR4", "BIPOLAR7")
    assert kinds["layers.0.down.weight"] == "F16"  # 96 inputs are no blocks of 64
    for name in ("layers.0.q.weight", "layers.0.v.weight", "layers.1.up.weight"):
        want = encode(theirs.tensor(name).float32(), kinds[name])
        np.testing.assert_array_equal(ours.tensor(name).raw, want)
    # Written again in a published format, nothing of ours is left in it.
    quantize(resolve(str(tmp_path / "b.gguf")), Recipe("Q8_0"), tmp_path / "q.gguf")
    assert not [key for key in GgufFile(tmp_path / "q.gguf").metadata if key.startswith("megalith.")]
    assert open_model(str(tmp_path / "q.gguf")).checkpoint.activation_bits is None


def test_recipes_with_widths_that_do_not_exist_are_refused() -> None:
    for text in ("bipolar9", "bipolar0", "bipolar4a9", "bipolar4a0", "bipolar", "bipolar4b8"):
        with pytest.raises(ConfigError, match="cannot be written"):
            Recipe.of(text, {})
    assert Recipe.of("BiPolar3", {}) == Recipe("BIPOLAR3")


def _changed(path: Path, key: str, old: bytes, new: bytes, to: Path) -> Path:
    """A copy in which the first `old` after `key` is `new`, of the same length."""
    data = path.read_bytes()
    at = data.index(old, data.index(key.encode()))
    assert len(old) == len(new)
    to.write_bytes(data[:at] + new + data[at + len(old) :])
    return to


def test_damaged_descriptions_are_refused(source: Path, tmp_path: Path) -> None:
    good = tmp_path / "b.gguf"
    quantize(resolve(str(source)), Recipe.of("bipolar4a8", {}), good)
    bad = _changed(good, OWN_FORMATS_KEY, b"=BIPOLAR4", b"=BIPOLAR9", tmp_path / "unknown.gguf")
    with pytest.raises(ModelFormatError, match=r"BIPOLAR9.*not known"):
        GgufFile(bad)
    bad = _changed(good, OWN_FORMATS_KEY, b"=BIPOLAR4", b"=BIPOLAR5", tmp_path / "width.gguf")
    with pytest.raises(ModelFormatError, match="is BIPOLAR5, but stores it as I8 with rows of 34"):
        GgufFile(bad)
    bad = _changed(good, OWN_FORMATS_KEY, b"blk.0.attn_q.weight=", b"blk.0.attn_x.weight=", tmp_path / "name.gguf")
    with pytest.raises(ModelFormatError, match="weight format I8, which is not supported"):
        GgufFile(bad)
    bits = struct.pack("<I", 8)
    bad = _changed(good, ACTIVATION_BITS_KEY, bits, struct.pack("<I", 77), tmp_path / "bits.gguf")
    # The first 8 after the key's name is the value: the type (4, uint32) comes before it.
    with pytest.raises(ModelFormatError, match=r"activation_bits 77"):
        open_model(str(bad))
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(good.read_bytes()[:-200])
    with pytest.raises(ModelFormatError, match="truncated"):
        GgufFile(cut)
    assert pair(ACTIVATION_BITS_KEY, 8) in good.read_bytes()
