"""Which pieces of a model's weights stay in memory and which stream through a ring. Pure: sizes in, a layout out.

Pieces of a packed file (`lay_out`, the native backend) or equal layers of a torch module (`share_layers`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megalith.base.errors import ConfigError, DoesNotFit
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
    spread = _spread(len(sizes) - 1)
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


@dataclass(frozen=True, slots=True)
class LayerShare:
    """Of equal layers: `keep` stay, a window of k slides over the others, k' at a time (policy.residency.LayerWindow).

    The largest of all is the number that are near at once.
    """

    count: int
    k: int
    k_prime: int = 1
    keep: tuple[int, ...] = ()

    @property
    def near(self) -> int:
        """The most layers in memory."""
        return min(self.count, self.k + len(self.keep))

    @property
    def streamed(self) -> int:
        """Layers that a step brings, in the mean rounded up: a long stride in a large window finds some there."""
        moving = self.count - len(self.keep)
        return 0 if self.near == self.count else -(-moving * min(self.k_prime, moving - self.k) // self.k_prime)


def parse_window(text: str, count: int) -> LayerShare:
    """`K` or `K,K'` for `count` layers. Raises ConfigError."""
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts) or len(parts) > 2:
        raise ConfigError(f"{text!r} is no window of layers.", "Write it like 4, or 4,2 for k=4 and k'=2.")
    k, k_prime = int(parts[0]), int(parts[-1]) if len(parts) > 1 else 1
    if not 1 <= k_prime <= k:
        raise ConfigError(f"A window of k={k}, k'={k_prime} cannot be.", "Take 1 <= k' <= k.")
    return LayerShare(count, min(k, count), min(k_prime, count))


def share_layers(count: int, layer_bytes: int, budget_bytes: int) -> LayerShare:
    """The share that streams least in `budget_bytes`: a window of three slots, and what is left stays, spread evenly.

    A larger window streams no less; two slots are the least that overlap. Raises DoesNotFit where not even they fit.
    """
    room = budget_bytes // layer_bytes
    if room >= count:
        return LayerShare(count, count)
    if room < min(2, count):
        raise DoesNotFit(
            f"A window of two layers needs {format_bytes(2 * layer_bytes)}, and {format_bytes(max(0, budget_bytes))} "
            "are left for it.",
            f"Raise the limit by {format_bytes(2 * layer_bytes - budget_bytes)}.",
        )
    k = min(SLOTS, room)
    return LayerShare(count, k, 1, tuple(sorted(_spread(count)[: room - k])))


def _spread(count: int) -> list[int]:
    """0 to count - 1 in an order whose every beginning is spread evenly (bits of the number turned round)."""
    bits = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda piece: int(f"{piece:0{bits}b}"[::-1], 2))


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
