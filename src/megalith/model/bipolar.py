"""Bipolar integers: every bit of a number stands for +1 or -1 times its power of two.

A number of n bits is sum_i (2 b_i - 1) 2^i: an odd integer from -(2^n - 1) to 2^n - 1, symmetric and without a zero.
Its code is sum_i b_i 2^i, so that level = 2 code - (2^n - 1). Source: "Efficient Arbitrary Precision Acceleration for
Large Language Models on GPU Tensor Cores" (bipolar-INT; bit-level decomposition and recovery of a product).

Knows integers, bit planes and the blocks of the formats BIPOLAR1 to BIPOLAR8; knows no files or models. A block holds
64 weights: a float16 scale, then n planes of 8 bytes, the lowest bit first; element e is bit e % 8 of byte e // 8. The
products here are the integer reference of the native kernels (engine/native/c/bipolar.c).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

GROUP = 64
"""Weights that share a scale."""
WIDTHS = range(1, 9)
_REFITS = 2
"""Least-squares refits of a scale to the chosen levels, after each share."""
_LARGEST_HALF = 65504.0


def format_name(bits: int) -> str:
    """The weight format of that many bits."""
    return f"BIPOLAR{bits}"


BITS_OF = {format_name(bits): bits for bits in WIDTHS}
"""The bipolar formats, and their bits."""


def block_bytes(bits: int) -> int:
    """Bytes of a block: a scale and `bits` planes."""
    return 2 + bits * GROUP // 8


def levels(codes: U8, bits: int) -> I64:
    """What codes stand for: odd integers."""
    found: I64 = 2 * codes.astype(np.int64) - (2**bits - 1)
    return found


def planes_of(codes: U8, bits: int) -> NDArray[np.bool_]:
    """[bits, ...]: bit i of each code, the lowest first."""
    places = np.arange(bits, dtype=np.uint8).reshape(-1, *(1,) * codes.ndim)
    return (codes[None] >> places & 1).astype(np.bool_)


def product(a_MK: U8, a_bits: int, w_NK: U8, w_bits: int) -> I64:
    """The reference: [M, N] sums of level times level over K, in integers."""
    out: I64 = levels(a_MK, a_bits) @ levels(w_NK, w_bits).T
    return out


def product_by_planes(a_MK: U8, a_bits: int, w_NK: U8, w_bits: int) -> I64:
    """The same by decomposition into pairs of planes and recovery from the counts of unequal bits.

    Two bits give +1 where they are equal and -1 where not, so planes i and j give K - 2 unequal, times 2^(i + j).
    """
    size = a_MK.shape[1]
    out = np.zeros((a_MK.shape[0], w_NK.shape[0]), np.int64)
    for j, a in enumerate(planes_of(a_MK, a_bits)):
        for i, w in enumerate(planes_of(w_NK, w_bits)):
            unequal = (a[:, None] ^ w[None]).sum(2)
            out += (size - 2 * unequal) << (i + j)
    return out


def encode(blocks: F32, bits: int, out: U8) -> None:
    """`blocks` [n, 64] as blocks of `bits` bits into `out` [n, block bytes].

    The scale is the one of least squared error among a few shares of the block's largest weight and refits of each.
    """
    best_scale = np.zeros((len(blocks), 1), np.float32)
    best_codes = np.zeros(blocks.shape, np.uint8)
    best_error = np.full((len(blocks), 1), np.inf, np.float32)
    peak = np.abs(blocks).max(1, keepdims=True)
    for share in _shares(bits):
        scale = _half(peak * np.float32(share / (2**bits - 1)))
        for _ in range(_REFITS + 1):
            codes = nearest(blocks, scale, bits)
            q = (2 * codes.astype(np.float32)) - np.float32(2**bits - 1)
            error = ((q * scale - blocks) ** 2).sum(1, keepdims=True)
            better = error < best_error
            best_scale = np.where(better, scale, best_scale)
            best_codes = np.where(better, codes, best_codes)
            best_error = np.where(better, error, best_error)
            scale = _half((q * blocks).sum(1, keepdims=True) / (q * q).sum(1, keepdims=True))
    out[:, :2] = best_scale.astype(np.float16).view(np.uint8)
    planes = np.packbits(planes_of(best_codes, bits), axis=2, bitorder="little")
    out[:, 2:] = planes.swapaxes(0, 1).reshape(len(blocks), -1)


def nearest(x: F32, scale: F32, bits: int) -> U8:
    """The code whose level times `scale` is nearest; some code where the scale is zero."""
    top = np.float32(2**bits - 1)
    q = np.rint((x / np.where(scale == 0, np.float32(np.inf), scale) + top) / 2)
    return np.clip(q, 0, top).astype(np.uint8)


def decode(blocks: U8, bits: int, out: F32) -> None:
    """Blocks [n, block bytes] to weights [n, 64]: level times scale, one rounding."""
    codes, scales = unpacked(blocks, bits)
    np.multiply(levels(codes, bits).astype(np.float32), scales[:, None], out=out)


def unpacked(blocks: U8, bits: int) -> tuple[U8, F32]:
    """Codes [n, 64] and scales [n] of blocks [n, block bytes]."""
    planes = blocks[:, 2:].reshape(len(blocks), bits, GROUP // 8)
    flags = np.unpackbits(planes, axis=2, bitorder="little")
    codes: U8 = (flags << np.arange(bits, dtype=np.uint8)[:, None]).sum(1, dtype=np.uint8)
    return codes, np.ascontiguousarray(blocks[:, :2]).view(np.float16)[:, 0].astype(np.float32)


def _shares(bits: int) -> tuple[float, ...]:
    """Shares of the largest weight on which the outermost level is tried: few levels serve best when tails are cut."""
    if bits == 1:
        return (0.4,)  # The refit finds the mean magnitude, the best there is.
    if bits <= 3:
        return (1.0, 0.85, 0.7, 0.55)
    return (1.0, 0.9, 0.8) if bits <= 5 else (1.0,)


def _half(values: F32) -> F32:
    return np.clip(values, -_LARGEST_HALF, _LARGEST_HALF).astype(np.float16).astype(np.float32)
