"""How long a step takes when only a window of its layers is in memory: the memory-time curve of Superpipeline.

A layer begins when the one before has ended and it is near; when it begins, the window asks for others; one link brings
them in the order in which they were asked for. That is a max-plus recursion over the layers' turns, exact for constant
times (`walk_ns`). For equal layers and a window with k > k' it comes to

    inference: max(L c + rest, n m)        training: at least max(L (c + b) + rest, 2 (L - k) m)

with L layers of c forward and b backward, n moves of m each (`moves`); for k = k' nothing overlaps from one window to
the next. Knows times and turns; the policy that says what is asked for is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol


class Asked(Protocol):
    """What a policy wants near, in the order of need."""

    @property
    def load(self) -> Sequence[int]: ...  # noqa: D102


class Residency(Protocol):
    """The part of policy.residency.ResidencyPolicy that time depends on."""

    def need(self, *parts: int) -> Asked: ...  # noqa: D102


class Turn(NamedTuple):
    """A layer runs, and then what belongs to no layer."""

    layer: int
    compute_ns: float
    rest_ns: float = 0.0


def moves(layers: int, k: int, k_prime: int = 1) -> float:
    """Layers that an inference step brings, in the mean: all of them, but where a shift finds its next ones there."""
    return 0.0 if k >= layers else layers * min(1.0, (layers - k) / k_prime)


def inference_turns(layers: int, compute_ns: float, rest_ns: float) -> list[Turn]:
    """Of one step of `layers` equal layers; the rest is head and embedding."""
    return [Turn(n, compute_ns, rest_ns if n == layers - 1 else 0.0) for n in range(layers)]


def training_turns(layers: int, forward_ns: float, backward_ns: float, rest_ns: tuple[float, float]) -> list[Turn]:
    """Up and down again; the rest is head and loss between them, and what comes after the backward."""
    up = inference_turns(layers, forward_ns, rest_ns[0])
    return [*up, *(Turn(n, backward_ns, 0.0 if n else rest_ns[1]) for n in reversed(range(layers)))]


def walk_ns(policy: Residency, turns: Iterable[Turn], move_ns: Sequence[float], steps: int = 12) -> float:
    """A step in the mean of `steps`, one right after the other, but for the first two, which fill the window."""
    now = free = begun = 0.0
    ready: dict[int, float] = {}
    turns = list(turns)
    for step in range(steps):
        begun = now if step == 2 else begun
        for turn in turns:
            for layer in policy.need(turn.layer).load:
                free = max(free, now) + move_ns[layer]
                ready[layer] = free
            now = max(now, ready.get(turn.layer, 0.0)) + turn.compute_ns + turn.rest_ns
    return (now - begun) / (steps - 2)
