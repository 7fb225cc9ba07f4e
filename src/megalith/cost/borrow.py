"""Layers that live elsewhere: what fetching them costs, as a formula, as a cost model and around any timer.

Some layers of a model lie in the memory of a peer device or of the host, spread evenly among those that stay. Each is
fetched while the layer before it is computed, into one of two buffers, so

    time of a borrowed layer = max(compute, fetch)       time of one that stays = compute
    compute = step / layers                              fetch = layer bytes of one device / bandwidth + latency

After EnergonAI's peer memory pooling (Du et al., 2022, arXiv:2209.02341). All layers take an equal share of a step,
head and host time included. The link has nothing else to do; who lends has its memory less. Knows no cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from megalith.base.errors import ConfigError
from megalith.base.units import NS_PER_S
from megalith.cost.compute import CostModel, StepCost, StepShape
from megalith.cost.memory import WeightBytes
from megalith.cost.profile import Profile
from megalith.cost.timer import PS_PER_NS, Line, Prompt
from megalith.cost.timer_around import AroundTimer
from megalith.cost.timer_phases import DeviceTimer, quick_line

BUFFERS = 2
"""Layers that a device keeps room for when it borrows: the one that is computed and the one that comes."""


class Loan(NamedTuple):
    """Layers that lie in one place."""

    layers: int
    fetch_ps: int
    """What fetching one of them takes."""


def layer_bytes(weights: WeightBytes, layers: int, devices: int = 1) -> int:
    """Bytes of one layer on each of `devices` tensor parallel devices, all experts counted."""
    return -(-(weights.layers + weights.vectors) // (layers * devices))


def resident(weights: WeightBytes, layers: int, borrowed: int) -> WeightBytes:
    """What stays of the weights when so many layers are borrowed: the others, and the buffers."""
    if not 0 <= borrowed <= layers:
        raise ConfigError(f"{borrowed} layers cannot be borrowed of {layers}.", f"Use at most {layers}.")
    stay = min(layers, layers - borrowed + (BUFFERS if borrowed else 0))
    return msgspec.structs.replace(
        weights,
        layers=-(-weights.layers * stay // layers),
        experts=-(-weights.experts * stay // layers),
        vectors=-(-weights.vectors * stay // layers),
    )


def loan(layers: int, num_bytes: int, bytes_per_s: float, latency_ns: float, where: str) -> Loan:
    """A loan of layers of `num_bytes` each over a link. ConfigError when there is no link."""
    if layers and bytes_per_s <= 0.0:
        raise ConfigError(f"No link to the {where} is known to borrow {layers} layers over.", "Use another device.")
    return Loan(layers, round((num_bytes * NS_PER_S / bytes_per_s + latency_ns) * PS_PER_NS) if layers else 0)


def loans(
    weights: WeightBytes, layers: int, devices: int, profile: Profile, peer: int, host: int, host_bytes_per_s: float
) -> tuple[Loan, ...]:
    """Those of `peer` layers from a peer over the links of `profile`, and of `host` from host memory."""
    resident(weights, layers, peer + host)
    one = layer_bytes(weights, layers, devices)
    return (
        loan(peer, one, profile.peer_bytes_per_s, profile.peer_latency_ns, "peer"),
        loan(host, one, host_bytes_per_s, profile.peer_latency_ns, "host"),
    )


def exposed_ps(step_ps: int, layers: int, borrowed: Sequence[Loan]) -> int:
    """What a step waits for layers on their way: the sum over borrowed ones of max(0, fetch - step / layers)."""
    compute_ps = step_ps // layers
    return sum([one.layers * (one.fetch_ps - compute_ps) for one in borrowed if one.fetch_ps > compute_ps])


class BorrowingCostModel(CostModel):
    """A CostModel whose steps wait for borrowed layers."""

    def __init__(self, cost: CostModel, borrowed: Sequence[Loan]) -> None:
        super().__init__(cost.spec, cost.profile, cost.weights, cost.kv_format, cost.devices)
        self.borrowed = borrowed

    def step(self, shape: StepShape) -> StepCost:
        """See CostModel; fetching keeps the links busy."""
        cost = super().step(shape)
        fetch_ps = sum(one.layers * one.fetch_ps for one in self.borrowed)
        wait_ps = exposed_ps(cost.duration_ns * PS_PER_NS, self.spec.num_layers, self.borrowed)
        return StepCost(
            cost.duration_ns + -(-wait_ps // PS_PER_NS), cost.compute_ns, cost.memory_ns,
            cost.link_ns + fetch_ps // PS_PER_NS, cost.fixed_ns,
        )  # fmt: skip


class BorrowingTimer(AroundTimer):
    """The DeviceTimer of a device that borrows layers, around its own. A lower clock does not slow the link."""

    def __init__(self, inner: DeviceTimer, layers: int, borrowed: Sequence[Loan]) -> None:
        self.inner, self.layers, self.borrowed = inner, layers, tuple(one for one in borrowed if one.layers)
        self._longest_ps = max([one.fetch_ps for one in self.borrowed], default=0) * layers

    def step_ps(self, prompts: Sequence[Prompt], decodes: int, context_sum: int, context_max: int) -> int:
        """See StepTimer."""
        step_ps = self.inner.step_ps(prompts, decodes, context_sum, context_max)
        return step_ps + exposed_ps(step_ps, self.layers, self.borrowed)

    def decode_line(self, decodes: int, context_sum: int, context_max: int) -> Line:
        """See StepTimer: straight where every fetch is hidden, or where steps do not grow; else one step at a time."""
        first, slope, steps = line = self.inner.decode_line(decodes, context_sum, context_max)
        if slope >= 0 and first >= self._longest_ps:
            return line
        return quick_line((first + exposed_ps(first, self.layers, self.borrowed), 0, 1 if slope else steps))

    def around(self, inner: DeviceTimer) -> BorrowingTimer:
        """See AroundTimer; power is as if it did not wait."""
        return BorrowingTimer(inner, self.layers, self.borrowed)
