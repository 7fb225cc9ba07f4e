"""Content hashes of full KV blocks, chained from the first token.

Knows tokens and block size; knows nothing of caches. Equal hashes mean (up to a 64-bit collision) equal tokens from the
start of the sequence to the end of that block, so a block that carries the hash can stand in for computing it.

The chain is keyed BLAKE2b with 8-byte digests: hash_i = BLAKE2b(key=salt, hash_{i-1} || tokens of block i), tokens as
little-endian uint32, hash_{-1} empty. BLAKE2b is RFC 7693. With a salt that clients cannot know, nobody can search for
a prompt that collides with someone else's.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b

_HASH_BYTES = 8
_TOKEN_BYTES = 4


def block_hashes(tokens: Sequence[int], block_tokens: int, salt: int = 0) -> tuple[int, ...]:
    """One hash for each full block of `tokens`, in order; a partial last block has none.

    The same tokens, `block_tokens` and `salt` (an unsigned 64-bit integer) give the same hashes on every machine.
    """
    return BlockHasher(block_tokens, salt).feed(tokens)


class BlockHasher:
    """The incremental form: feed tokens as they become known, get the hashes of the blocks that they fill."""

    __slots__ = ("_block_bytes", "_key", "_parent", "_pending")

    def __init__(self, block_tokens: int, salt: int = 0) -> None:
        if block_tokens < 1:
            raise ValueError(f"block_tokens is {block_tokens} but must be at least 1")
        self._block_bytes = block_tokens * _TOKEN_BYTES
        self._key = salt.to_bytes(8, "little")
        self._parent = b""
        self._pending = bytearray()

    def feed(self, tokens: Iterable[int]) -> tuple[int, ...]:
        """Hashes of the blocks that `tokens` completed, in order; often none. Token ids are 0 to 2**32 - 1."""
        words = array("I", tokens)
        if sys.byteorder == "big":
            words.byteswap()
        self._pending += words.tobytes()
        size, pending, parent, key = self._block_bytes, self._pending, self._parent, self._key
        end = len(pending) - len(pending) % size
        hashes: list[int] = []
        for start in range(0, end, size):
            parent = blake2b(parent + pending[start : start + size], digest_size=_HASH_BYTES, key=key).digest()
            hashes.append(int.from_bytes(parent, "little"))
        self._parent = parent
        del pending[:end]
        return tuple(hashes)
