"""Block formats as safetensors hold them: the `pack-quantized` layout of compressed-tensors, there and back, exactly.

Knows bit layouts only. A matrix [rows, columns] of B-bit integers q with one scale for each group of a row is three
tensors: `weight_packed` int32 [rows, columns B / 32] with q + 2^(B-1), the first in the lowest bits; `weight_scale`
[rows, groups]; `weight_shape` int64 [2]. Weight = q scale. (compressed-tensors 0.20, compressors/pack_quantized; vLLM
and transformers read it.) With 8 bits, groups of 32 and float16 scales this is Q8_0 in another order, with 4 bits Q4_0:
both directions keep every bit. Larger groups become blocks of 32 that share a scale.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megalith.base.errors import ModelFormatError
from megalith.model.formats import dequantize

U8 = NDArray[np.uint8]

GROUP = 32
BITS = {"Q8_0": 8, "Q4_0": 4}
"""The formats that have a place in this layout, and their bits."""
FORMAT_OF_BITS = {bits: name for name, bits in BITS.items()}


def split(raw: U8, format_name: str) -> tuple[U8, U8]:
    """Blocks [rows, row bytes] as bytes of weight_packed [rows, columns B / 8] and of its scales [rows, 2 groups]."""
    rows = raw.shape[0]
    blocks = raw.reshape(rows, -1, 2 + GROUP * BITS[format_name] // 8)
    scales, body = np.ascontiguousarray(blocks[:, :, :2]), blocks[:, :, 2:]
    if format_name == "Q8_0":
        packed = body ^ np.uint8(0x80)
    else:
        # A block keeps weights j and j + 16 in byte j; the layout wants 2 j and 2 j + 1 there.
        levels = np.concatenate([body & 15, body >> 4], axis=2)
        packed = levels[:, :, 0::2] | levels[:, :, 1::2] << 4
    return packed.reshape(rows, -1), scales.reshape(rows, -1)


def join(packed: U8, scales: U8, scale_format: str, columns: int, what: str) -> U8:
    """Blocks [rows, row bytes] from bytes of weight_packed [rows, ...] and of weight_scale [rows, ...].

    Raises ModelFormatError for a scale that is not a float16 number: it would have to be rounded.
    """
    rows = packed.shape[0]
    bits = packed.shape[1] * 8 // columns
    found = dequantize(scales, scale_format, (rows, scales.size // rows // (4 if scale_format == "F32" else 2)))
    with np.errstate(over="ignore"):
        halves = found.astype(np.float16)
    if not (halves.astype(np.float32) == found).all():
        raise ModelFormatError(
            f"{what}: a scale of its groups, in {scale_format}, is no float16 number, and is not rounded silently.",
            "Save the scales in float16.",
        )
    each = np.repeat(halves, columns // GROUP // halves.shape[1], axis=1)
    out = np.empty((rows, columns // GROUP, 2 + GROUP * bits // 8), np.uint8)
    out[:, :, :2] = each[:, :, None].view(np.uint8)
    body = packed.reshape(rows, columns // GROUP, -1)
    if bits == 8:
        out[:, :, 2:] = body ^ np.uint8(0x80)
    else:
        levels = np.stack([body & 15, body >> 4], axis=3).reshape(rows, -1, GROUP)
        out[:, :, 2:] = levels[:, :, :16] | levels[:, :, 16:] << 4
    return out.reshape(rows, -1)
