"""Which pieces of a model's weights stay in memory and which stream through a ring. Pure: sizes in, a layout out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megalith.base.errors import DoesNotFit
from megalith.base.units import format_bytes

SLOTS = 3
"""Of the ring: one that is computed from, and two that are read into at once."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What stays and what streams, by piece number."""

    pinned: tuple[int, ...]
    streamed: tuple[int, ...]
    slots: int
    slot_bytes: int
    pinned_bytes: int

    @property
    def num_bytes(self) -> int:
        """Of memory."""
        return self.pinned_bytes + self.slots * self.slot_bytes


def lay_out(sizes: Sequence[int], budget_bytes: int, page_bytes: int) -> Layout:
    """The layout for pieces of `sizes` bytes, the last of which is the head, in `budget_bytes` of pages.

    The head is pinned first: steps without an output do not use it. Then layers, spread evenly, so that the disk reads
    on while what stays is computed. Raises DoesNotFit when not even two slots fit.
    """
    whole = _layout(sizes, frozenset(range(len(sizes))), page_bytes)
    if whole.num_bytes <= budget_bytes:
        return whole
    bits = len(sizes).bit_length()
    spread = sorted(range(len(sizes) - 1), key=lambda piece: int(f"{piece:0{bits}b}"[::-1], 2))
    best, pinned = _layout(sizes, frozenset(), page_bytes), frozenset[int]()
    for piece in (len(sizes) - 1, *spread):
        tried = _layout(sizes, pinned | {piece}, page_bytes)
        if tried.num_bytes <= budget_bytes:
            best, pinned = tried, pinned | {piece}
    if best.num_bytes > budget_bytes:
        raise DoesNotFit(
            f"A window of weights needs {format_bytes(best.num_bytes)} ({best.slots} slots of "
            f"{format_bytes(best.slot_bytes)}, the largest piece), and {format_bytes(budget_bytes)} are left for it.",
            f"Raise the limit by {format_bytes(best.num_bytes - budget_bytes)}.",
        )
    return best


def _layout(sizes: Sequence[int], pinned: frozenset[int], page_bytes: int) -> Layout:
    streamed = tuple(piece for piece in range(len(sizes)) if piece not in pinned)
    slots = min(SLOTS, len(streamed))
    slot = max((_whole(sizes[piece], page_bytes) for piece in streamed), default=0)
    kept = tuple(sorted(pinned))
    return Layout(kept, streamed, slots, slot, _whole(sum(sizes[piece] for piece in kept), page_bytes))


def _whole(num_bytes: int, page_bytes: int) -> int:
    return -(-num_bytes // page_bytes) * page_bytes


def least_bytes(sizes: Sequence[int], page_bytes: int) -> int:
    """The smallest budget that `lay_out` accepts: the head may be the largest piece, and is better pinned then."""
    last = len(sizes) - 1
    return min(_layout(sizes, kept, page_bytes).num_bytes for kept in (frozenset[int](), frozenset({last})))
