"""Bit-plane products: every pair of widths is exact in integers, and a model of them is the NumPy forward pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megalith.base.errors import ConfigError, MachineError
from megalith.cost.memory import packed_bytes
from megalith.engine.api import EngineConfig
from megalith.engine.launch import build_engine
from megalith.engine.native import build, single
from megalith.engine.native_runner import NativeRunner, packed_weight_bytes
from megalith.engine.packed_file import PackedFile, ensure_packed
from megalith.engine.weight_window import WeightWindow
from megalith.model import bipolar
from megalith.model.formats import dequantize
from megalith.model.quantize import Recipe, quantize
from megalith.model.source import resolve
from tests.engine.native_models import RandomCheckpoint, batch_of, llama
from tests.engine.native_models import forward as numpy_forward
from tests.engine.test_native_kernels import everything, usable_isas

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="no C compiler")
PAIRS = [(w, a) for w in bipolar.WIDTHS for a in bipolar.WIDTHS]
SPEC = llama(hidden=128, ffn=192, num_heads=4, num_kv_heads=2, head_dim=32, num_layers=1)
SIZES = {"block_tokens": 16, "num_blocks": 12, "num_host_blocks": 0, "max_rows": 64, "threads": 1}


def matrix_of(codes_NK: np.ndarray, bits: int, scale: float = 1.0) -> single.PackedMatrix:
    rows, cols = codes_NK.shape
    blocks = codes_NK.reshape(-1, 64)
    planes = np.packbits(bipolar.planes_of(blocks, bits), axis=2, bitorder="little").swapaxes(0, 1)
    scales = np.full((len(blocks), 1), scale, np.float16).view(np.uint8)
    raw = np.concatenate([scales, planes.reshape(len(blocks), -1)], 1)
    return single.PackedMatrix(everything(), bipolar.format_name(bits), raw.reshape(rows, -1), (rows, cols))


def planes_of(codes_MK: np.ndarray, bits: int) -> np.ndarray:
    """What `single.quantize_planes` gives, from codes."""
    rows, cols = codes_MK.shape
    flags = np.moveaxis(bipolar.planes_of(codes_MK.reshape(rows, -1, 2, 32), bits), 0, 2)
    words = np.packbits(flags, axis=-1, bitorder="little").view(np.uint32)[..., 0]
    return np.stack([words & 0x0F0F0F0F, words >> 4 & 0x0F0F0F0F], -1).reshape(rows, cols // 64, bits, 2, 2)


def codes_in(planes: np.ndarray, bits: int) -> np.ndarray:
    """The codes [M, K] in planes [M, K / 64, bits, 2, 2]."""
    words = np.ascontiguousarray(planes[..., 0] | planes[..., 1] << 4)
    flags = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    return (flags << np.arange(bits, dtype=np.uint8)[:, None]).sum(2, dtype=np.uint8).reshape(len(planes), -1)


@pytest.mark.parametrize(("w_bits", "a_bits"), PAIRS)
def test_every_pair_of_widths_is_the_integer_product(w_bits: int, a_bits: int) -> None:
    """Odd numbers of rows and columns; random codes, and the largest and smallest sums that there are."""
    rng = np.random.default_rng(100 * w_bits + a_bits)
    for rows, outputs, inputs in ((1, 1, 64), (5, 37, 192), (3, 17, 256)):
        w = rng.integers(0, 2**w_bits, (outputs, inputs), dtype=np.uint8)
        a = rng.integers(0, 2**a_bits, (rows, inputs), dtype=np.uint8)
        w[0], a[0] = 2**w_bits - 1, rng.choice([0, 2**a_bits - 1])
        exact = bipolar.product(a, a_bits, w, w_bits)
        assert abs(exact).max() < 2**24  # the kernel adds groups in float32, which holds these integers
        ones = np.ones((rows, inputs // 64), np.float32)
        for isa in usable_isas():
            np.testing.assert_array_equal(matrix_of(w, w_bits).multiply_planes(planes_of(a, a_bits), ones, isa), exact)


@pytest.mark.parametrize("bits", bipolar.WIDTHS)
def test_panels_hold_n_bits_a_weight_and_the_values_of_the_file(bits: int) -> None:
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (48, 320), dtype=np.uint8)
    packed = matrix_of(codes, bits, 0.5)
    assert packed.num_bytes() == (48 * 320 * bits) // 8 + 2 * 48 * 320 // 64
    assert packed.num_bytes() == packed_bytes(48 * 320, bipolar.format_name(bits))
    for row in range(48):
        np.testing.assert_array_equal(packed.row(row), 0.5 * bipolar.levels(codes[row], bits))


@pytest.mark.parametrize("bits", bipolar.WIDTHS)
def test_activations_go_to_the_nearest_level_of_their_group(bits: int) -> None:
    x = np.random.default_rng(bits).standard_normal((9, 192)).astype(np.float32)
    x[1, :64], x[2] = 0, x[2] * 1e30
    planes, scale = single.quantize_planes(everything(), x, bits)
    for isa in usable_isas():
        for got, want in zip(single.quantize_planes(everything(), x, bits, isa), (planes, scale), strict=True):
            np.testing.assert_array_equal(got, want)
    assert scale[1, 0] == 0
    groups, step = x.reshape(9, 3, 64), np.where(scale == 0, 1, scale)[:, :, None]
    top = 2**bits - 1
    off = np.abs(bipolar.levels(codes_in(planes, bits), bits).reshape(groups.shape) - groups / step)
    # Within one step of what is in range, and what is beyond it is at the outermost level.
    over = np.maximum(np.abs(groups / step) - top, 0)
    assert (off <= np.maximum(1, over) + 1e-4).all()
    if bits >= 4:
        assert over.max() < 1e-4 * top


@pytest.mark.parametrize(("w_bits", "a_bits"), [(1, 1), (3, 5), (4, 8), (8, 8)])
def test_a_row_has_the_same_bits_alone_and_in_any_batch_and_instruction_set(w_bits: int, a_bits: int) -> None:
    rng = np.random.default_rng(5)
    packed = matrix_of(rng.integers(0, 2**w_bits, (50, 640), dtype=np.uint8), w_bits, 0.01)
    x = rng.standard_normal((20, 640)).astype(np.float32)
    planes, scale = single.quantize_planes(everything(), x, a_bits)
    results = {}
    for isa in usable_isas():
        whole = packed.multiply_planes(planes, scale, isa)
        results[isa] = whole
        for low, high in ((0, 1), (7, 13)):
            np.testing.assert_array_equal(
                packed.multiply_planes(planes[low:high], scale[low:high], isa), whole[low:high]
            )
    portable = results.pop("portable")  # without FMA every sum is rounded twice
    for fused in results.values():
        np.testing.assert_array_equal(fused, next(iter(results.values())))
        np.testing.assert_allclose(fused, portable, atol=1e-5 * np.abs(portable).max())


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot have"):
        single.PackedMatrix(everything(), "BIPOLAR3", np.zeros((4, 26 * 2), np.uint8), (4, 96))
    with pytest.raises(ValueError, match="cannot have"):
        single.PackedMatrix(everything(), "BIPOLAR3", np.zeros((4, 25), np.uint8), (4, 64))
    with pytest.raises(ValueError, match="96 values"):
        single.quantize_planes(everything(), np.zeros((1, 96), np.float32), 4)
    with pytest.raises(ValueError, match="9 bit planes"):
        single.quantize_planes(everything(), np.zeros((1, 64), np.float32), 9)
    packed = matrix_of(np.zeros((16, 64), np.uint8), 2)
    with pytest.raises(ValueError, match=r"want \(1, 1, 4, 2, 2\)"):
        packed.multiply_planes(np.zeros((1, 2, 4, 2, 2), np.uint32), np.zeros((1, 2), np.float32))
    with pytest.raises(ValueError, match="failed"):  # 8-bit activations in groups of 32 are not for it
        packed.multiply(np.zeros((1, 64), np.float32))


def as_planes(bits: int):  # type: ignore[no-untyped-def]
    """What activations of so many bits hold, as `forward` wants it."""

    def hold(x: np.ndarray) -> np.ndarray:
        planes, scale = single.quantize_planes(everything(), x.astype(np.float32), bits)
        levels = bipolar.levels(codes_in(planes, bits), bits).reshape(*scale.shape, 64)
        return (levels * scale[:, :, None]).astype(np.float32).reshape(x.shape)

    return hold


@pytest.mark.parametrize(("w_bits", "a_bits"), [(8, 8), (4, 8), (4, 4), (2, 3), (1, 1)])
def test_logits_of_a_layer_equal_the_numpy_forward_pass(w_bits: int, a_bits: int) -> None:
    weights = RandomCheckpoint(SPEC, bipolar.format_name(w_bits), head_kind="Q8_0")
    runner = NativeRunner(SPEC, weights, **SIZES, activation_bits=a_bits)  # type: ignore[arg-type]
    held = {name: weights.stored_format(name) for name in weights.names()}
    assert runner.memory_bytes()["weights"] == packed_weight_bytes(SPEC, held)
    tokens = np.random.default_rng(1).integers(0, SPEC.vocab, 40).astype(np.int32)
    got = runner.logits(batch_of([(tokens, 0)], [np.arange(3)], [list(range(40))]))
    expected = numpy_forward(SPEC, weights, tokens, inside=as_planes(a_bits))
    # Few levels turn a last-bit difference into another level now and then; most rows have none.
    scale = np.abs(expected).max()
    assert np.median(np.abs(got - expected)) < 2e-3 * scale
    if a_bits == 8:
        assert np.abs(got - expected).max() < 0.03 * scale
        plain = numpy_forward(SPEC, weights, tokens, exact=True)
        assert np.median(np.abs(got - plain)) < 0.02 * scale
    runner.close()


def test_weights_may_stream_through_a_window(tmp_path: Path) -> None:
    spec = llama(hidden=128, ffn=192, num_heads=4, num_kv_heads=2, head_dim=32, num_layers=6)
    weights = RandomCheckpoint(spec, "BIPOLAR3", head_kind="Q8_0")
    with_all = NativeRunner(spec, weights, **SIZES, activation_bits=5)  # type: ignore[arg-type]
    ensure_packed(tmp_path / "p", spec, weights, piece_bytes=12 << 10)  # type: ignore[arg-type]
    budget = with_all.memory_bytes()["weights"] * 3 // 4
    window = WeightWindow(PackedFile(tmp_path / "p"), spec, budget, page_bytes=4096)
    assert window.layout.streamed
    streaming = NativeRunner(spec, weights, window=window, **SIZES, activation_bits=5)  # type: ignore[arg-type]
    batch = batch_of([(np.arange(20, dtype=np.int32), 0)], [np.arange(4)], [list(range(20))])
    np.testing.assert_array_equal(streaming.logits(batch), with_all.logits(batch))
    streaming.close()
    with_all.close()


def test_a_file_is_served_with_its_own_and_with_other_activations(tiny: Path, tmp_path: Path) -> None:
    """The tiny model's FFN has 96 inputs: that matrix takes F16 and is multiplied beside bipolar ones."""
    outcome = quantize(resolve(str(tiny)), Recipe.of("bipolar4a6", {}), tmp_path / "b.gguf")
    assert len(outcome.fallbacks) == 2
    batch = batch_of([(np.arange(9, dtype=np.int32), 0)], [np.arange(1)], [list(range(9))])
    logits = {}
    for bits in (None, 6, 2):
        built = build_engine(EngineConfig(model=str(tmp_path / "b.gguf"), mode="native", activation_bits=bits))
        logits[bits] = built.runner.logits(batch)
        built.runner.close()
    np.testing.assert_array_equal(logits[None], logits[6])
    assert np.abs(logits[2] - logits[6]).max() > 0.01 * np.abs(logits[6]).max()
    down = built.model.checkpoint.tensor("layers.0.down.weight")
    assert down.format == "F16"
    assert dequantize(down.raw, "F16", down.shape).shape == (64, 96)


def test_activation_bits_that_nothing_uses_are_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no bipolar weights"):
        build_engine(EngineConfig(model=str(tiny), activation_bits=4))
    quantize(resolve(str(tiny)), Recipe.of("bipolar2", {}), tmp_path / "b.gguf")
    for bits in (0, 9):
        with pytest.raises(ConfigError, match="1 to 8"):
            build_engine(EngineConfig(model=str(tmp_path / "b.gguf"), activation_bits=bits))
    with pytest.raises(ConfigError, match="floating point"):
        build_engine(EngineConfig(model=str(tmp_path / "b.gguf"), mode="float32", activation_bits=4))
    weights = RandomCheckpoint(SPEC, "BIPOLAR2", head_kind="Q8_0")
    with pytest.raises(MachineError, match="activation_bits is 9"):
        NativeRunner(SPEC, weights, **SIZES, activation_bits=9)  # type: ignore[arg-type]


def test_the_plan_knows_the_bytes_and_that_planes_take_time(tiny: Path, tmp_path: Path) -> None:
    plans, held = {}, {}
    for to in ("bipolar8a8", "bipolar1", "q8_0"):
        path = tmp_path / f"{to}.gguf"
        quantize(resolve(str(tiny)), Recipe.of(to, {"down": "Q8_0"}), path)
        built = build_engine(EngineConfig(model=str(path), mode="native", threads=1, max_context=256))
        plans[to] = {line.item: line.num_bytes for line in built.fit.plan.memory} | {"ns": built.fit.plan.ttft_ns.value}
        held[to] = built.runner.memory_bytes()
        built.runner.close()
        assert plans[to]["weights"] == held[to]["weights"]
        assert plans[to]["activations"] >= held[to]["activations"]
    assert plans["bipolar1"]["ns"] < plans["bipolar8a8"]["ns"]
    assert plans["q8_0"]["ns"] < plans["bipolar8a8"]["ns"]
    assert held["q8_0"]["activations"] < held["bipolar1"]["activations"]
