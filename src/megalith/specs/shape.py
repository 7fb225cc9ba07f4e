"""RequestShape: one request of a workload, before it has a text or an instance; and the names of its prefix blocks.

Knows lengths, times and prefix identities. Must not know where requests come from or who serves them.
"""

from __future__ import annotations

import functools
from itertools import chain

import msgspec

from megalith.base.errors import ConfigError

PREFIX_BLOCK_TOKENS = 512
"""Mooncake's traces name the prefix of a prompt by one id for each 512 tokens."""


class RequestShape(msgspec.Struct, frozen=True, gc=False):
    """One request. `at_ns` counts from the start of the run; None: as soon as a client is free."""

    index: int
    at_ns: int | None
    input_tokens: int
    output_tokens: int
    prefix_ids: tuple[int, ...] = ()
    """One id for each block of the prompt, the last of which may be partial. Equal id means equal tokens from the start
    of the prompt to the end of that block. They may cover only the beginning of the prompt."""
    priority: int = 0
    """Higher goes first; 0 is normal."""
    model: int = 0
    """Which of several models it asks for."""


def prefix_hashes(
    shape: RequestShape, block_tokens: int, prefix_block_tokens: int = PREFIX_BLOCK_TOKENS
) -> tuple[int, ...]:
    """One hash for each full block of `block_tokens` that the prefix ids cover: `policy.facts.Request.prefix_hashes`.

    At `prefix_block_tokens` the ids themselves; at a divisor of it each id becomes as many different numbers, id *
    parts + part, so that two hashes are equal exactly when id and place are: no collisions, and no mixing to pay for.
    Blocks that are cut off by the end of the prompt have none. Raises ConfigError for any other block size.
    """
    ids = shape.prefix_ids
    if not ids:
        return ()
    parts = _parts(block_tokens, prefix_block_tokens)
    full = shape.input_tokens // block_tokens
    if parts == 1:
        return ids[:full]
    needed = ids[: -(-full // parts)]
    return tuple(chain.from_iterable([range(i * parts, i * parts + parts) for i in needed]))[:full]


@functools.cache
def _parts(block_tokens: int, prefix_block_tokens: int) -> int:
    """KV blocks in one block of the trace."""
    if block_tokens > 0 and prefix_block_tokens % block_tokens == 0:
        return prefix_block_tokens // block_tokens
    divisors = [size for size in range(1, prefix_block_tokens + 1) if prefix_block_tokens % size == 0]
    near = min(divisors, key=lambda size: (abs(size - block_tokens), size))
    what = f"KV blocks of {block_tokens} tokens do not divide the {prefix_block_tokens}-token blocks of the workload."
    raise ConfigError(what, f"Use blocks of {near} tokens, or another divisor of {prefix_block_tokens}.")
