"""Block floating point for KV: what the text of an option says, and the bytes that follow. Knows no arrays.

n values share an exponent of 8 bits and have m bits each, sign included: 8 + n m bits. Source: Trukhanov and
Soloveychik, "Accurate Block Quantization in LLMs with Outliers", arXiv:2403.20137 (BFP12: 4-bit mantissas beside an
8-bit exponent; blocks of 32, 64 and 128).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from megalith.base.errors import ConfigError
from megalith.specs.model import ModelSpec

FORM = "bfpM[:block=N][,values=M][,reorder], such as bfp4:block=32,reorder"
WIDTHS = range(2, 9)
BLOCK = 32
"""Channels that share an exponent, where nobody says how many."""
_NAME = re.compile(r"bfp([0-9]{1,2})(?::(.*))?")
_OPTION = re.compile(r"(block|values)=([0-9]{1,4})")


class BlockFloat(NamedTuple):
    """`block` values (a multiple of 8) with one exponent, mantissas of `bits` bits in two's complement."""

    bits: int
    block: int = BLOCK

    @property
    def block_bytes(self) -> int:
        """An exponent byte and `bits` planes of block / 8 bytes."""
        return 1 + self.bits * self.block // 8

    def row_bytes(self, elements: int) -> int:
        """Of a row of so many values, a multiple of the block."""
        return elements // self.block * self.block_bytes


@dataclass(frozen=True, slots=True)
class KvFormat:
    """Formats of K and of V, and whether the channels of K are put in an order that suits it."""

    keys: BlockFloat
    values: BlockFloat
    reorder: bool = False

    def token_bytes(self, spec: ModelSpec) -> int:
        """Of one token's K and V in all layers: layers * KV heads * (8 + n m) / 8 bytes for each block of a head.

        Raises ConfigError where blocks do not divide a head.
        """
        size, block = spec.head_dim, self.keys.block
        if size % block:
            fit = [n for n in range(8, size + 1, 8) if size % n == 0]
            hint = f"Take block={min(fit, key=lambda n: abs(n - block))}." if fit else "Leave the KV format away."
            raise ConfigError(f"Blocks of {block} channels do not divide the heads of {spec.name}, of {size}.", hint)
        return spec.num_layers * spec.num_kv_heads * (self.keys.row_bytes(size) + self.values.row_bytes(size))


def is_block_float(text: str) -> bool:
    """Whether the name of a KV format is meant to be one of these."""
    return text.lower().startswith("bfp")


def parse_kv_format(text: str) -> KvFormat | None:
    """The format of that text, None for none. Raises ConfigError with the form."""
    if not text:
        return None
    found = _NAME.fullmatch(text.lower())
    if found is None:
        raise ConfigError(f"kv_format is {text!r}.", f"Take {FORM}.")
    given: dict[str, int] = {"block": BLOCK, "values": int(found[1])}
    reorder = False
    for part in (found[2] or "").split(",") if found[2] is not None else []:
        option = _OPTION.fullmatch(part)
        if option is not None:
            given[option[1]] = int(option[2])
        elif part == "reorder":
            reorder = True
        else:
            raise ConfigError(f"kv_format is {text!r}, and {part!r} says nothing.", f"Take {FORM}.")
    for bits in (int(found[1]), given["values"]):
        if bits not in WIDTHS:
            near = min(max(bits, WIDTHS[0]), WIDTHS[-1])
            raise ConfigError(f"kv_format is {text!r}: mantissas of {bits} bits cannot be.", f"Take 2 to 8: {near}.")
    block = given["block"]
    if block % 8 or not block:
        near = max(8, round(block / 8) * 8)
        raise ConfigError(f"kv_format is {text!r}: blocks are multiples of 8 channels.", f"Take block={near}.")
    return KvFormat(BlockFloat(int(found[1]), block), BlockFloat(given["values"], block), reorder)
