"""Weight formats of model files, and their exact decoding to float32 with NumPy.

Knows the bit layout of each format (the `ggml` block layouts: ggml/src/ggml-common.h of llama.cpp). Must not know
files, models or devices. Every decoder is bit-exact to the `gguf` package's: the products and sums are done in float32
in the same order. The bipolar formats are our own (model/bipolar.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megalith.base.errors import ModelFormatError
from megalith.model import bipolar

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]

_CHUNK_ELEMENTS = 1 << 20
"""Elements decoded at a time: temporaries stay a few MiB whatever the tensor's size."""


class Format(NamedTuple):
    """A block format: `block_elements` weights take `block_bytes` bytes."""

    block_elements: int
    block_bytes: int


FORMATS: dict[str, Format] = {
    "F32": Format(1, 4),
    "F16": Format(1, 2),
    "BF16": Format(1, 2),
    "Q8_0": Format(32, 34),
    "Q4_0": Format(32, 18),
    "Q4_1": Format(32, 20),
    "Q5_0": Format(32, 22),
    "Q5_1": Format(32, 24),
    "Q4_K": Format(256, 144),
    "Q5_K": Format(256, 176),
    "Q6_K": Format(256, 210),
} | {name: Format(bipolar.GROUP, bipolar.block_bytes(n)) for name, n in bipolar.BITS_OF.items()}


def row_bytes(format_name: str, elements: int) -> int:
    """Bytes of a row of `elements` weights. Raises ModelFormatError if the format is unknown or does not divide it."""
    known = FORMATS.get(format_name)
    if known is None:
        raise ModelFormatError(f"Weight format {format_name} is not supported.", f"Supported: {', '.join(FORMATS)}.")
    if elements % known.block_elements:
        raise ModelFormatError(
            f"A row of {elements} weights cannot be {format_name}, whose blocks hold {known.block_elements}."
        )
    return elements // known.block_elements * known.block_bytes


def dequantize(raw: U8, format_name: str, shape: Sequence[int]) -> F32:
    """The float32 values of `raw` (uint8 of any shape, blocks in order), in a fresh writable array of `shape`.

    Raises ModelFormatError if the format is unknown or the number of bytes does not fit the shape.
    """
    elements = math.prod(shape)
    expected = row_bytes(format_name, elements)
    if raw.size != expected:
        raise ModelFormatError(
            f"{elements} weights in {format_name} take {expected} bytes, but there are {raw.size} bytes."
        )
    block = FORMATS[format_name]
    blocks = np.ascontiguousarray(raw).reshape(-1, block.block_bytes)
    out = np.empty((blocks.shape[0], block.block_elements), np.float32)
    decode = _DECODERS[format_name]
    stride = max(1, _CHUNK_ELEMENTS // block.block_elements)
    # Hostile or random scales may be NaN or infinite; they decode to what IEEE arithmetic says, without a warning.
    with np.errstate(all="ignore"):
        for start in range(0, blocks.shape[0], stride):
            decode(blocks[start : start + stride], out[start : start + stride])
    return out.reshape(tuple(shape))


def _half(blocks: U8, offset: int) -> F32:
    """The float16 number at byte `offset` of each block, as a float32 column."""
    return blocks[:, offset : offset + 2].view(np.float16).astype(np.float32)


def _nibbles(packed: U8, out: F32, half: int) -> None:
    """Low nibbles of each run of `half` bytes to the first `half` of 2*half outputs, high ones to the second."""
    runs = packed.reshape(packed.shape[0], -1, half)
    view = out.reshape(out.shape[0], -1, 2, half)
    view[:, :, 0] = runs & 0x0F
    view[:, :, 1] = runs >> 4


def _high_bits(blocks: U8, offset: int) -> U8:
    """The fifth bits of the 32 weights of a Q5_0 or Q5_1 block, 0 or 1, bit j of the little-endian word first."""
    return np.unpackbits(blocks[:, offset : offset + 4], axis=1, bitorder="little")


def _f32(blocks: U8, out: F32) -> None:
    out[...] = blocks.view(np.float32)


def _f16(blocks: U8, out: F32) -> None:
    out[...] = blocks.view(np.float16)


def _bf16(blocks: U8, out: F32) -> None:
    np.left_shift(blocks.view(np.uint16).astype(np.uint32), 16, out=out.view(np.uint32))


def _q8_0(blocks: U8, out: F32) -> None:
    np.multiply(blocks[:, 2:].view(np.int8), _half(blocks, 0), out=out)


def _q4_0(blocks: U8, out: F32) -> None:
    _nibbles(blocks[:, 2:], out, 16)
    out -= 8
    out *= _half(blocks, 0)


def _q4_1(blocks: U8, out: F32) -> None:
    _nibbles(blocks[:, 4:], out, 16)
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _q5_0(blocks: U8, out: F32) -> None:
    _nibbles(blocks[:, 6:], out, 16)
    out += _high_bits(blocks, 2) * np.float32(16)
    out -= 16
    out *= _half(blocks, 0)


def _q5_1(blocks: U8, out: F32) -> None:
    _nibbles(blocks[:, 8:], out, 16)
    out += _high_bits(blocks, 4) * np.float32(16)
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _k_scales(blocks: U8) -> tuple[F32, F32]:
    """Scale and minimum of the 8 sub-blocks of a Q4_K or Q5_K block: d * scale and dmin * min, each [n, 8, 1].

    The 12 bytes at offset 4 hold eight 6-bit scales and eight 6-bit minima: the first four of each in the low six bits
    of bytes 0-3 and 4-7, the others split into nibbles of bytes 8-11 and the top two bits of bytes 0-7.
    """
    low, mid, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = np.concatenate([low & 63, (high & 0x0F) | (low >> 6 << 4)], axis=1)
    minimum = np.concatenate([mid & 63, (high >> 4) | (mid >> 6 << 4)], axis=1)
    return (_half(blocks, 0) * scale)[:, :, None], (_half(blocks, 2) * minimum)[:, :, None]


def _q4_k(blocks: U8, out: F32) -> None:
    scale, minimum = _k_scales(blocks)
    _nibbles(blocks[:, 16:], out, 32)
    view = out.reshape(-1, 8, 32)
    view *= scale
    view -= minimum


def _q5_k(blocks: U8, out: F32) -> None:
    scale, minimum = _k_scales(blocks)
    _nibbles(blocks[:, 48:], out, 32)
    view = out.reshape(-1, 8, 32)
    # Bit i of byte l is the fifth bit of weight l of sub-block i.
    fifth = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[None, :, None]) & 1
    view += fifth * np.float32(16)
    view *= scale
    view -= minimum


def _q6_k(blocks: U8, out: F32) -> None:
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    scale = (_half(blocks, 208) * blocks[:, 192:208].view(np.int8)).reshape(-1, 16, 1)
    nibbles = (low >> np.array([0, 4], np.uint8)[None, None, :, None]) & 0x0F
    top = (high >> np.array([0, 2, 4, 6], np.uint8)[None, None, :, None]) & 3
    weights = nibbles.reshape(-1, 2, 4, 32) | top << 4
    view = out.reshape(-1, 16, 16)
    view[...] = weights.reshape(-1, 16, 16)
    view -= 32
    view *= scale


def _bipolar(bits: int, blocks: U8, out: F32) -> None:
    bipolar.decode(blocks, bits, out)


_DECODERS: dict[str, Callable[[U8, F32], None]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    **{name: partial(_bipolar, n) for name, n in bipolar.BITS_OF.items()},
}
