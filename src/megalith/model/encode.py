"""Encoding float32 weights into the block formats: the other half of `model.formats`.

Knows the same bit layouts. Must not know files, models or devices. A block's scale (and minimum) is chosen among the
plain one and a few others by the least sum of squared errors of what the decoder will give back, so no block is worse
than with the plain choice; every weight then goes to the nearest value that the stored float16 scale can express.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from megalith.base.errors import ModelFormatError
from megalith.model import bipolar
from megalith.model.formats import FORMATS, row_bytes

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]

_CHUNK_ELEMENTS = 1 << 18
"""Elements encoded at a time: the search keeps about ten temporaries of this size."""
_LARGEST_HALF = 65504.0
_SHRINK = (1.0, 0.95, 0.9)
"""Ranges tried, as shares of the block's own: clipping one outlier often helps the 31 others."""
_REFITS = 2
"""Least-squares refits of the scale to the chosen levels, after each range."""


def encode(values: F32, format_name: str) -> U8:
    """`values` [rows, columns] in `format_name`: uint8 [rows, row bytes].

    Raises ModelFormatError: no encoder for the format, a row that its blocks do not divide, or a value that is not
    finite or beyond what the format holds (float16 numbers end at 65,504).
    """
    encoder = _ENCODERS.get(format_name)
    if encoder is None:
        raise ModelFormatError(
            f"Weights cannot be written as {format_name}, only read.", f"Written: {', '.join(_ENCODERS)}."
        )
    rows, columns = values.shape
    width = row_bytes(format_name, columns)
    size, size_bytes = FORMATS[format_name]
    blocks = np.ascontiguousarray(values, np.float32).reshape(-1, size)
    peak = float(np.abs(blocks).max()) if blocks.size else 0.0
    if not math.isfinite(peak):
        raise ModelFormatError("A weight is not a finite number: the source is damaged.")
    if peak > _LARGEST_HALF and format_name not in ("F32", "BF16"):
        raise ModelFormatError(
            f"A weight of {peak:g} is beyond {format_name}, whose numbers end at 65504.", "Use BF16."
        )
    out = np.zeros((blocks.shape[0], size_bytes), np.uint8)
    stride = max(1, _CHUNK_ELEMENTS // size)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        for start in range(0, blocks.shape[0], stride):
            encoder(blocks[start : start + stride], out[start : start + stride])
    return out.reshape(rows, width)


def writable() -> tuple[str, ...]:
    """The formats that `encode` writes."""
    return tuple(_ENCODERS)


def _half(values: F32) -> F32:
    """`values` rounded to float16, as float32; what would be infinite is the largest finite one."""
    return np.clip(values, -_LARGEST_HALF, _LARGEST_HALF).astype(np.float16).astype(np.float32)


def _levels(x: F32, scale: F32, minimum: F32, low: int, high: int) -> F32:
    """The nearest level of each weight; level 0 (or the one nearest to it) where the scale is zero."""
    q: F32 = np.rint((x - minimum) / scale)
    q[(scale == 0).ravel()] = 0
    np.clip(q, low, high, out=q)
    return q


class _Best:
    """The best (scale, minimum, levels) so far of each block."""

    def __init__(self, x: F32, low: int, high: int) -> None:
        self.x, self.low, self.high = x, low, high
        self.scale = self.minimum = np.zeros((x.shape[0], 1), np.float32)
        self.q = np.zeros_like(x)
        self.error = np.full((x.shape[0], 1), np.inf, np.float32)

    def offer(self, scale: F32, minimum: F32) -> F32:
        """Try a scale and a minimum, already rounded to float16; gives the levels that go with them."""
        q = _levels(self.x, scale, minimum, self.low, self.high)
        off = q * scale + minimum - self.x
        error = np.einsum("ij,ij->i", off, off)[:, None]
        better = error < self.error
        self.scale = np.where(better, scale, self.scale)
        self.minimum = np.where(better, minimum, self.minimum)
        self.q = np.where(better, q, self.q)
        self.error = np.where(better, error, self.error)
        return q


def _symmetric(x: F32, low: int, high: int, shrink: tuple[float, ...] = _SHRINK) -> _Best:
    """One scale a block, levels `low`..`high`: the weight of the largest magnitude falls on `low`."""
    best = _Best(x, low, high)
    zero = np.zeros((x.shape[0], 1), np.float32)
    peak = np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1)
    for share in shrink:
        q = best.offer(_half(peak * np.float32(share / low)), zero)
        for _ in range(_REFITS if len(shrink) > 1 else 0):
            fitted = (q * x).sum(1, keepdims=True) / np.maximum((q * q).sum(1, keepdims=True), 1)
            q = best.offer(_half(fitted), zero)
    return best


def _affine(x: F32, high: int) -> _Best:
    """A scale and a minimum for each block, levels 0..`high`."""
    best = _Best(x, 0, high)
    bottom, top = x.min(1, keepdims=True), x.max(1, keepdims=True)
    mean_x = x.mean(1, keepdims=True)
    for share in _SHRINK:
        spare = (top - bottom) * np.float32((1 - share) / 2)
        low = bottom + spare
        q = best.offer(_half((top - spare - low) / np.float32(high)), _half(low))
        for _ in range(_REFITS):
            mean_q = q.mean(1, keepdims=True)
            spread = q - mean_q
            norm = (spread * spread).sum(1, keepdims=True)
            scale = _half((spread * x).sum(1, keepdims=True) / np.where(norm == 0, 1, norm))
            q = best.offer(scale, _half(mean_x - scale * mean_q))
    return best


def _put_half(out: U8, offset: int, values: F32) -> None:
    out[:, offset : offset + 2] = values.astype(np.float16).view(np.uint8)


def _put_levels(out: U8, offset: int, levels: F32, fifth_at: int | None) -> None:
    """Levels 0..15 (or 0..31, their fifth bits at byte `fifth_at`): weights j and j + 16 share a byte."""
    q = levels.astype(np.uint8)
    out[:, offset : offset + 16] = (q[:, :16] & 15) | (q[:, 16:] & 15) << 4
    if fifth_at is not None:
        out[:, fifth_at : fifth_at + 4] = np.packbits(q >> 4, axis=1, bitorder="little")


def _f32(x: F32, out: U8) -> None:
    out[...] = x.view(np.uint8)


def _f16(x: F32, out: U8) -> None:
    out[...] = _half(x).astype(np.float16).view(np.uint8)


def _bf16(x: F32, out: U8) -> None:
    bits = x.view(np.uint32)
    # Round to nearest, ties to even; a finite number may become infinite only beyond bfloat16's own largest.
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    out[...] = rounded.astype(np.uint16).view(np.uint8)


def _q8_0(x: F32, out: U8) -> None:
    best = _symmetric(x, -127, 127, (1.0,))
    _put_half(out, 0, best.scale)
    out[:, 2:] = best.q.astype(np.int8).view(np.uint8)


def _q4_0(x: F32, out: U8) -> None:
    best = _symmetric(x, -8, 7)
    _put_half(out, 0, best.scale)
    _put_levels(out, 2, best.q + 8, None)


def _q5_0(x: F32, out: U8) -> None:
    best = _symmetric(x, -16, 15)
    _put_half(out, 0, best.scale)
    _put_levels(out, 6, best.q + 16, 2)


def _q4_1(x: F32, out: U8) -> None:
    best = _affine(x, 15)
    _put_half(out, 0, best.scale)
    _put_half(out, 2, best.minimum)
    _put_levels(out, 4, best.q, None)


def _q5_1(x: F32, out: U8) -> None:
    best = _affine(x, 31)
    _put_half(out, 0, best.scale)
    _put_half(out, 2, best.minimum)
    _put_levels(out, 8, best.q, 4)


def _bipolar(bits: int, x: F32, out: U8) -> None:
    bipolar.encode(x, bits, out)


_ENCODERS: dict[str, Callable[[F32, U8], None]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    **{name: partial(_bipolar, n) for name, n in bipolar.BITS_OF.items()},
}
