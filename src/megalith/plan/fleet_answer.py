"""What `plan fleet` answers: the winner, the runner-up, what holds it back, and what became of every other kind.

Only data. Figures of trials are simulated, those of predictions predicted; the struct says which it holds.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from megalith.plan.fleet_question import Objective, Shape, Size
from megalith.plan.fleet_trial import Trial
from megalith.plan.mix_table import Knows

FORMAT = "megalith.plan-fleet/2"


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """A fleet that keeps the service level."""

    shape: Shape
    size: Size
    flags: str
    """For `megalith simulate`."""
    devices: int
    objective: float
    """In USD an hour, watts or devices."""
    price_per_hour_usd: float | None
    power_w: float | None
    price_per_million_tokens_usd: float | None
    trial: Trial | None
    """None where only the arithmetic was asked."""
    ttft_ns: float | None
    """At the percentile of its bound."""
    tpot_ns: float | None
    margin: float | None

    @property
    def title(self) -> str:
        """In a few words."""
        return self.shape.render(self.size)


class Passed(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of fleet that was not chosen."""

    shape: Shape
    stage: Literal["arithmetic", "sample", "whole"]
    """What decided: no simulation, one of a part of the load, or one of all of it."""
    instances: int | None
    """What it needs, or at least needs."""
    objective: float | None
    why: str


class PowerRoom(msgspec.Struct, frozen=True, kw_only=True):
    """Power of the winner's devices: what is drawn against what they are rated for."""

    mean_w: float
    peak_w: float
    """Highest sample."""
    rated_w: float
    instances: int
    """That could stand beside the winner's under the rated power if all drew their share of the peak."""


class Headroom(msgspec.Struct, frozen=True, kw_only=True):
    """How much more load the winner takes."""

    kept_times: float
    """At this many times the rate the service level is kept."""
    broken_times: float | None
    """At this many it is not; None: it was kept at the highest that was tried."""
    breaks: str
    slo: dict[str, float] = {}
    """By bound: the share of its limit that is not used at the planned load. Each by itself."""
    power: PowerRoom | None = None


class Contribution(msgspec.Struct, frozen=True, kw_only=True):
    """What one mechanism is worth under this load: the best fleet with it against the best without, else all equal."""

    mechanism: str
    source: str
    """The published system."""
    state: Literal["pays", "does not pay", "does not apply", "not asked"]
    nature: Literal["simulated", "predicted"]
    objective: float | None = None
    """With it; None where no fleet with it was found, or none was looked for."""
    control: float | None = None
    """Without it."""
    saves: float | None = None
    """Share of the control; below 0 it costs more."""
    why: str


class Risk(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of the winner when something is not as planned. Simulated."""

    what: str
    kept: bool
    says: str
    """What breaks and by how much, or what is left."""


class MixPart(msgspec.Struct, frozen=True, kw_only=True):
    """The instances of one type in a mix."""

    name: str
    flags: str
    """For `megalith simulate`, with this type's part of the load."""
    count: int
    busy: float
    """Instances that its part of the planned load keeps busy, by the throughput table; predicted."""
    requests: int | None
    """That it got in the simulated run; None without one."""


class MixAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a mix of types is cheaper than the best fleet of one type."""

    nature: Literal["simulated", "predicted"]
    knows: Knows
    """What the router between the types looks at."""
    pays: bool
    why: str
    """Why it does not pay, where it does not."""
    parts: list[MixPart] = []
    objective: float | None = None
    control: float | None = None
    """What the best fleet of one type costs."""
    against: str | None = None
    """Which one that is."""
    saves: float | None = None
    """Share of the control's; negative when the mix is dearer."""
    factor: float = 1.0
    """The load is over-provisioned by this."""
    proven: bool = True
    """That no mix is cheaper, by the throughput table and under this factor."""
    good: float | None = None
    """Share of the requests within every bound; None where it was not simulated."""
    shares: dict[str, float] = {}
    """By promise: the share of the requests that keep it."""
    runs: int = 0

    @property
    def title(self) -> str:
        """In a few words."""
        return " + ".join(f"{part.count} x {part.name}" for part in self.parts)


class FleetPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The answer."""

    format: str
    nature: Literal["simulated", "predicted"]
    minimise: Objective
    model: str
    slo: str
    load: str
    rate_per_s: float
    requests: int
    """Of the load, so many were simulated or counted."""
    requests_in_all: int | None
    span_s: float
    winner: Choice
    runner_up: Choice | None
    binding: str
    """The bound with the least margin, in words, and what one instance less would do."""
    resource: str
    headroom: Headroom | None
    passed: list[Passed]
    contributions: list[Contribution]
    """What each mechanism is worth."""
    risks: list[Risk]
    runs: int
    notes: list[str]
    timing: dict[str, str]
    """By device: where its step times come from."""
    mix: MixAnswer | None = None
    """None: not asked for."""
