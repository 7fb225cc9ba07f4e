"""Which pieces of a model's weights stay in memory and which stream through a ring. Pure: sizes in, a layout out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megalith.base.errors import DoesNotFit
from megalith.base.units import MIB, format_bytes

PIECE_BYTES = 8 * MIB
"""Of large models: four reads of so much at once are as fast as the disk (the guide has the measurement)."""
SLOTS, LEAST_SLOTS = 8, 3
"""Of the ring: one that is computed from, four that are read into, and three that are there before they are needed."""
_PIECES = 128
_RING_SHARE = 4


def piece_limit(total_bytes: int) -> int:
    """The size of pieces for weights of `total_bytes`: small models have smaller ones, so that there are enough."""
    return min(PIECE_BYTES, max(MIB, total_bytes // _PIECES))


@dataclass(frozen=True, slots=True)
class Layout:
    """What stays and what streams, by piece number."""

    pinned: tuple[int, ...]
    streamed: tuple[int, ...]
    slots: int
    slot_bytes: int
    pinned_bytes: int
    """In whole pages, as the ring."""
    ring_bytes: int

    @property
    def num_bytes(self) -> int:
        """Of memory."""
        return self.pinned_bytes + self.ring_bytes


def lay_out(sizes: Sequence[int], head: int, budget_bytes: int, page_bytes: int) -> Layout:
    """The layout for pieces of `sizes` bytes, of which those from `head` on are the head, in `budget_bytes` of pages.

    The head is pinned first: steps without an output do not use it. Then layers, spread evenly, so that the disk reads
    on while what stays is computed. The ring has eight slots, fewer where they would take more than a quarter. Raises
    DoesNotFit when not even three slots fit.
    """
    if _whole(sum(sizes), page_bytes) <= budget_bytes:
        return _layout(sizes, range(len(sizes)), 0, page_bytes)
    bits = max(1, (head - 1).bit_length())
    spread = sorted(range(head), key=lambda piece: int(f"{piece:0{bits}b}"[::-1], 2))
    slots = min(SLOTS, max(LEAST_SLOTS, budget_bytes // (_RING_SHARE * max(sizes))), len(sizes))
    least = least_bytes(sizes, page_bytes)
    if least > budget_bytes:
        raise DoesNotFit(
            f"A window of weights needs {format_bytes(least)} ({LEAST_SLOTS} slots of {format_bytes(max(sizes))}, the "
            f"largest piece), and {format_bytes(budget_bytes)} are left for it.",
            f"Raise the limit by {format_bytes(least - budget_bytes)}.",
        )
    pinned, left = list[int](), budget_bytes - _whole(slots * max(sizes), page_bytes)
    left -= left % page_bytes
    for piece in (*range(head, len(sizes)), *spread):
        if sizes[piece] <= left and len(pinned) < len(sizes) - slots:
            pinned.append(piece)
            left -= sizes[piece]
    return _layout(sizes, pinned, slots, page_bytes)


def _layout(sizes: Sequence[int], pinned: Sequence[int], slots: int, page_bytes: int) -> Layout:
    kept = frozenset(pinned)
    streamed = tuple(piece for piece in range(len(sizes)) if piece not in kept)
    slot = max((sizes[piece] for piece in streamed), default=0)
    there = _whole(sum(sizes[piece] for piece in kept), page_bytes)
    return Layout(tuple(sorted(kept)), streamed, slots, slot, there, _whole(slots * slot, page_bytes))


def _whole(num_bytes: int, page_bytes: int) -> int:
    return -(-num_bytes // page_bytes) * page_bytes


def least_bytes(sizes: Sequence[int], page_bytes: int) -> int:
    """The smallest budget that `lay_out` accepts: a ring of the fewest slots, or all where that is less."""
    return _whole(min(LEAST_SLOTS * max(sizes), sum(sizes)), page_bytes)
