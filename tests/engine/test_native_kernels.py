"""The native kernels one by one: packing keeps every value, products are exact in integers, instruction sets agree."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.engine.native import binding, build, single
from megalith.model.formats import dequantize
from tests.engine.native_models import quantized, random_raw

EXACT = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K")
ROUNDED = ("Q6_K", "F32", "F16", "BF16")
pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="no C compiler")


@functools.cache
def everything() -> binding.Library:
    """A library that also has the AVX-512 code with its dot products done lane by lane."""
    variants = ("avx2", "portable", "emulated") if "avx2" in build.default_variants() else ("portable",)
    return binding.Library(build.build(build.home_folder() / "tests", variants))


def usable_isas() -> tuple[str, ...]:
    return everything().isas()


def matrix(kind: str, rows: int, cols: int, seed: int) -> tuple[single.PackedMatrix, np.ndarray]:
    raw = random_raw(np.random.default_rng(seed), kind, rows, cols)
    return single.PackedMatrix(everything(), kind, raw, (rows, cols)), dequantize(raw, kind, (rows, cols))


@pytest.mark.parametrize("kind", EXACT)
def test_packing_keeps_every_value_bit_for_bit(kind: str) -> None:
    packed, values = matrix(kind, 37, 512, 1)
    for row in range(37):
        np.testing.assert_array_equal(packed.row(row), values[row])


@pytest.mark.parametrize("kind", ROUNDED)
def test_rounded_formats_stay_within_half_a_step_of_their_group(kind: str) -> None:
    packed, values = matrix(kind, 19, 512, 2)
    got = np.stack([packed.row(r) for r in range(19)])
    peak = np.abs(values.reshape(19, -1, 32)).max(2, keepdims=True)
    error = np.abs(got - values).reshape(19, -1, 32)
    assert (error <= peak / 254 * 1.001 + 1e-30).all()
    assert error.max() > 0


def test_packing_refuses_a_shape_that_does_not_fit() -> None:
    for kind, shape, num_bytes in (("Q8_0", (4, 48), 4 * 51), ("Q4_K", (1, 128), 72), ("Q8_0", (4, 64), 4 * 68 - 1)):
        with pytest.raises(ValueError, match="cannot have"):
            single.PackedMatrix(everything(), kind, np.zeros(num_bytes, np.uint8), shape)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(EXACT), rows=st.integers(1, 14), outputs=st.integers(1, 50), groups=st.integers(1, 8),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_products_equal_the_exact_sum(kind: str, rows: int, outputs: int, groups: int, seed: int) -> None:
    cols = groups * (256 if kind.endswith("_K") else 96)
    packed, values = matrix(kind, outputs, cols, seed)
    x = np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)
    kept = quantized(x).astype(np.float64)
    exact = kept @ values.T.astype(np.float64)
    size = np.abs(kept) @ np.abs(values.T.astype(np.float64))
    for isa in usable_isas():
        error = np.abs(packed.multiply(x, isa) - exact)
        # Unsigned storage adds a large offset that is taken away again, so the bound is of the offset's size.
        assert (error <= 2e-6 * size + 1e-4 * np.abs(kept).max() * np.abs(values).max()).all()


@pytest.mark.parametrize("kind", EXACT)
def test_largest_values_do_not_overflow(kind: str) -> None:
    """All weight bits set and activations at +-127: the case that saturating instructions would get wrong."""
    raw = random_raw(np.random.default_rng(3), kind, 16, 512)
    start = {"Q4_0": 2, "Q4_1": 4, "Q5_0": 2, "Q5_1": 4, "Q8_0": 2, "Q4_K": 4, "Q5_K": 4}[kind]
    block = raw.reshape(16, -1, raw.shape[1] // (2 if kind.endswith("_K") else 16))
    for fill in (0xFF, 0x00, 0x80, 0x7F):
        block[:, :, start:] = fill
        packed = single.PackedMatrix(everything(), kind, raw, (16, 512))
        values = dequantize(raw, kind, (16, 512)).astype(np.float64)
        for x in (np.ones((2, 512)), -np.ones((2, 512)), np.tile([1.0, -1.0], (2, 256))):
            exact = x @ values.T
            for isa in usable_isas():
                got = packed.multiply(x.astype(np.float32), isa)
                np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-4 + 1e-4 * np.abs(values).max() * 512)


@pytest.mark.parametrize("kind", [*EXACT, "Q6_K"])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(kind: str) -> None:
    packed, _ = matrix(kind, 100, 2048, 4)
    x = np.random.default_rng(5).standard_normal((300, 2048)).astype(np.float32)
    for isa in usable_isas():
        whole = packed.multiply(x, isa)
        for low, high in ((0, 1), (7, 14), (3, 8), (100, 113), (298, 300)):
            np.testing.assert_array_equal(packed.multiply(x[low:high], isa), whole[low:high])


@pytest.mark.parametrize("kind", [*EXACT, "F16"])
def test_instruction_sets_agree(kind: str) -> None:
    """With FMA they do the same operations: bit for bit. Without, each sum is rounded twice: a tight tolerance."""
    packed, _values = matrix(kind, 48, 1024, 6)
    x = np.random.default_rng(7).standard_normal((13, 1024)).astype(np.float32)
    got = {isa: packed.multiply(x, isa) for isa in usable_isas()}
    fused = [y for isa, y in got.items() if isa != "portable"]
    for y in fused[1:]:
        np.testing.assert_array_equal(y, fused[0])
    if fused:
        np.testing.assert_allclose(got["portable"], fused[0], atol=3e-5 * np.abs(fused[0]).max())


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 4), groups=st.integers(1, 6), seed=st.integers(0, 2**32 - 1), power=st.integers(-30, 30))
def test_activations_are_rounded_as_said(rows: int, groups: int, seed: int, power: int) -> None:
    x = (np.random.default_rng(seed).standard_normal((rows, groups * 32)) * 2.0**power).astype(np.float32)
    x[0, :32] = 0
    for isa in usable_isas():
        a, scale, total = single.quantize(everything(), x, isa)
        wide = np.repeat(scale, 32, axis=1)
        np.testing.assert_array_equal((a * wide).astype(np.float32), quantized(x))
        sums = a.reshape(rows, groups, 32).sum(2, dtype=np.int64)
        np.testing.assert_array_equal(total, scale * sums.astype(np.float32))
        assert np.abs(a).max() <= 127


def test_an_unknown_instruction_set_is_refused() -> None:
    packed, _ = matrix("Q8_0", 16, 64, 8)
    with pytest.raises(ValueError, match="code 4"):
        packed.multiply(np.zeros((1, 64), np.float32), "sse9")


def test_a_build_in_a_fresh_folder_gives_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = build.build(tmp_path / "new", ("portable",))
    assert binding.Library(made).isas() == ("portable",)
    assert build.build(tmp_path / "new", ("portable",)) == made
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(build.BuildFailed, match="no C compiler: no-such-compiler"):
        build.build(tmp_path / "other", ("portable",))


def test_a_compiler_error_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    with pytest.raises(build.BuildFailed, match=r"false .* failed"):
        build.build(tmp_path, ("portable",))
    assert not list(tmp_path.glob("*.so"))
