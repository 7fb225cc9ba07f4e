"""The block zoo: applications as chains of blocks, and which blocks are equivalent.

Equivalence is metadata of weights, worked out before anything is served: here drawn from a seed, for synthetic
fine-tunes. A unit is what is deployed: a block, or a whole model where blocks are not shared. Pure; knows no device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megalith.base.random import uniform

if TYPE_CHECKING:
    from megalith.specs.blocks import Sharing, ZooSpec

_ADAPTER, _ALIKE, _COSINE, _RANK = 1, 2, 3, 4
LEAST_COSINE = 0.9
"""Of a block that moved away from its base; an assumption."""


@dataclass(frozen=True, slots=True)
class Application:
    """One fine-tuned model."""

    id: int
    base: str
    adapter: bool
    """Its base's weights are its own, to the bit."""
    cosines: tuple[float, ...]
    """Of each of its blocks with the base's block at that place."""
    weight: float
    """Share of the requests."""


@dataclass(slots=True)
class Unit:
    """One class of weights that is deployed as a whole."""

    id: int
    base: str
    first: int
    """Block at which it begins."""
    blocks: int
    owner: int
    """Application whose own it is; -1: the base's."""
    share: float = 0.0
    """Of the requests, those that come by."""
    stand_ins: list[int] = field(default_factory=list)
    """Units that are equivalent, though not deployed as the same."""


@dataclass(frozen=True, slots=True)
class Zoo:
    """All that is deployed, and the chain of every application."""

    applications: tuple[Application, ...]
    units: tuple[Unit, ...]
    chains: tuple[tuple[int, ...], ...]

    def pick(self, share: float) -> int:
        """The application of a request, from a number in [0, 1)."""
        for application in self.applications:
            share -= application.weight
            if share < 0.0:
                return application.id
        return self.applications[-1].id


def applications(spec: ZooSpec, seed: int) -> tuple[Application, ...]:
    """Synthetic fine-tunes. The same for (spec, seed) everywhere; the skew changes popularity alone."""
    order = sorted(range(spec.applications), key=lambda one: (uniform(seed * 8 + _RANK, one), one))
    weights = [0.0] * spec.applications
    for rank, one in enumerate(order):
        weights[one] = (rank + 1.0) ** -spec.skew
    total = sum(weights)
    # Adapters go to every second application, or whatever the share is, of each base.
    adapters = {
        one for one in range(spec.applications)
        if int((one // len(spec.bases) + 1) * spec.adapter_share) > int(one // len(spec.bases) * spec.adapter_share)
    }  # fmt: skip
    return tuple(
        Application(
            one, spec.bases[one % len(spec.bases)], one in adapters,
            tuple(1.0 if one in adapters else _cosine(spec, seed, one * spec.blocks + block)
                  for block in range(spec.blocks)),
            weights[one] / total,
        )
        for one in range(spec.applications)
    )  # fmt: skip


def _cosine(spec: ZooSpec, seed: int, place: int) -> float:
    draw = uniform(seed * 8 + _COSINE, place)
    if uniform(seed * 8 + _ALIKE, place) < spec.alike_share:
        return 0.98 + 0.02 * draw
    return LEAST_COSINE + (0.98 - LEAST_COSINE) * draw * 0.999


def make_zoo(spec: ZooSpec, sharing: Sharing, seed: int) -> Zoo:
    """What is deployed for these applications. `blocks` has each that is not enough like its base apart."""
    found = applications(spec, seed)
    units: dict[tuple[str, int, int], Unit] = {}

    def unit(base: str, first: int, blocks: int, owner: int) -> Unit:
        key = base, first, owner
        if key not in units:
            units[key] = Unit(len(units), base, first, blocks, owner)
        return units[key]

    chains = []
    for one in found:
        if sharing == "blocks":
            chain = [
                unit(one.base, place, 1, -1 if cosine >= spec.merge_cosine else one.id)
                for place, cosine in enumerate(one.cosines)
            ]
        else:
            whole = sharing == "model" or not one.adapter
            chain = [unit(one.base, 0, spec.blocks, one.id if whole else -1)]
        for member in chain:
            member.share += one.weight
        chains.append(tuple(member.id for member in chain))
    for (base, first, owner), own in units.items():
        if owner >= 0 and sharing == "blocks" and found[owner].cosines[first] >= spec.cosine:
            shared = units.get((base, first, -1))
            own.stand_ins += [] if shared is None else [shared.id]
    return Zoo(found, tuple(units.values()), tuple(chains))
