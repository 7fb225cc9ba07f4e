"""Which layers of a model are in memory: some stay, and a window slides over the others.

Sizes only: what moves when is policy.residency.LayerWindow, and who moves it engine.layer_window.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalith.base.errors import ConfigError, DoesNotFit
from megalith.base.units import format_bytes

SLOTS = 3
"""Of a window that the limit chooses: one layer that runs, and two that come."""


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
