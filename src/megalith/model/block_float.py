"""Block floating point in NumPy: rows of values to packed bytes and back. Knows no models.

A block of n values x has the exponent p with max |x| in [2^(p-1), 2^p), and the step s = 2^(p - m + 1); a mantissa is
the integer nearest to x / s (halves to even), kept within -2^(m-1) and 2^(m-1) - 1. So |x - decoded| <= s / 2, or <= s
where the largest positive value rounds up to 2^(m-1). Stored: the byte p + 128, then m planes of n / 8 bytes, the
lowest bit first; element e is bit e % 8 of byte e // 8. Bytes of zeros are zeros. Source: arXiv:2403.20137, section 2.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megalith.base.errors import EngineError
from megalith.specs.kv_format import BlockFloat

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
_BIAS = 128
_LEAST, _MOST = -118, 127
"""Exponents p: a step is a normal float32 for every width; smaller blocks round to zeros."""


def encode(values: F32, form: BlockFloat) -> U8:
    """[..., E] to [..., row bytes], E a multiple of the block.

    Raises EngineError for values that are not finite or pass 2^127.
    """
    blocks = values.reshape(*values.shape[:-1], -1, form.block)
    peak = np.abs(blocks).max(-1)
    if not (peak < 2.0**_MOST).all():
        raise EngineError("K or V has values that are not finite or pass 2^127: weights or kernels are broken.")
    exponents = np.maximum(np.frexp(peak)[1], _LEAST)
    half = 1 << form.bits - 1
    scaled = np.ldexp(blocks, (form.bits - 1 - exponents)[..., None])
    mantissas = np.clip(np.rint(scaled), -half, half - 1).astype(np.int8).view(np.uint8)
    out = np.empty((*peak.shape, form.block_bytes), np.uint8)
    out[..., 0] = exponents + _BIAS
    places = np.arange(form.bits, dtype=np.uint8)[:, None]
    planes = np.packbits(mantissas[..., None, :] >> places & 1, axis=-1, bitorder="little")
    out[..., 1:] = planes.reshape(*peak.shape, -1)
    return out.reshape(*values.shape[:-1], -1)


def decode(raw: U8, form: BlockFloat) -> F32:
    """[..., row bytes] to [..., E], exactly mantissa times step."""
    blocks = raw.reshape(*raw.shape[:-1], -1, form.block_bytes)
    planes = blocks[..., 1:].reshape(*blocks.shape[:-1], form.bits, form.block // 8)
    flags = np.unpackbits(planes, axis=-1, bitorder="little")
    codes = flags[..., 0, :].copy()
    for place in range(1, form.bits):
        codes |= flags[..., place, :] << np.uint8(place)
    spare = np.uint8(8 - form.bits)  # The sign bit goes to the top of the byte; the step is as much smaller.
    mantissas = (codes << spare).view(np.int8).astype(np.float32)
    steps = steps_of(blocks, form) * np.float32(2.0 ** -int(spare))
    mantissas *= steps[..., None]
    return mantissas.reshape(*raw.shape[:-1], -1)


def steps_of(blocks: U8, form: BlockFloat) -> F32:
    """Steps [...] of blocks [..., block bytes]."""
    exponents = blocks[..., 0].astype(np.int32) - (_BIAS + form.bits - 1)
    return np.ldexp(np.float32(1), exponents).astype(np.float32)
