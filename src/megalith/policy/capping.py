"""Power capping of a row of machines: POLCA's two thresholds with priorities, and the baselines beside it.

Knows telemetry samples and names of scopes; must not know how clocks turn into watts or how long a command takes.
Power is a share of the budget. Levels are a ladder: each has a threshold to enter it, one below it to leave it
(hysteresis), and the clocks of low- and high-priority scopes while it holds. Telemetry comes every 2 s and a clock
takes some 40 s to change, so the step that hurts the high priority waits until the one before can have worked (`hold`);
a loop without that wait escalates on power that is already on its way down.

Clocks are those of an A100 with at most 1,410 MHz (POLCA, ASPLOS 2024, as accounts of it give them).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf, nan
from typing import NamedTuple

from megalith.base.config import Config
from megalith.base.units import NS_PER_S
from megalith.policy.cluster import Command, Event, SetClock, View
from megalith.policy.router_options import require

_MAX_MHZ = 1410


class Level(NamedTuple):
    """One step of the ladder, in shares of the budget and of the highest clock."""

    above: float
    """Entered above this."""
    release: float
    """Left below this."""
    low: float
    """Clock of the low-priority scopes."""
    high: float
    """Clock of the high-priority scopes."""
    waits: bool = False
    """Entered only from the level before, after the hold time."""


class ScopeOptions(Config):
    """Which pools are whose."""

    low: tuple[str, ...] = ()
    """Pools of low priority. Without low and high the whole domain is of low priority."""
    high: tuple[str, ...] = ()
    """Pools of high priority."""
    brake_above: float = 1.0
    """Above this share of the budget everything is slowed at once: the breaker must not open."""
    brake_clock: float = 288 / _MAX_MHZ
    brake_s: float = 5.0
    """How long the hardware brakes. Power during that time says nothing of the load, so no level is left on it."""


class PolcaOptions(ScopeOptions):
    """Thresholds and clocks of the paper."""

    first: float = 0.80
    second: float = 0.89
    """The largest rise of power within the actuation time was 11.8 % in the paper's six weeks."""
    hysteresis: float = 0.05
    base_clock: float = 1275 / _MAX_MHZ
    """Low priority above the first threshold."""
    deep_clock: float = 1110 / _MAX_MHZ
    """Low priority above the second."""
    high_clock: float = 1305 / _MAX_MHZ
    """High priority when that did not help."""
    hold_s: float = 40.0
    """From one level to the next that touches the high priority: at least the actuation time."""

    def __post_init__(self) -> None:
        require(0 < self.first < self.second, "first must be above 0 and below second")
        require(0 <= self.hysteresis < self.first, "hysteresis must be at least 0 and below first")
        _require_clocks(self.base_clock, self.deep_clock, self.high_clock, self.brake_clock)


class SingleThresholdOptions(ScopeOptions):
    """One level for everybody."""

    threshold: float = 0.89
    hysteresis: float = 0.05
    clock: float = 1110 / _MAX_MHZ

    def __post_init__(self) -> None:
        require(0 <= self.hysteresis < self.threshold, "hysteresis must be at least 0 and below threshold")
        _require_clocks(self.clock, self.brake_clock)


def _require_clocks(*fractions: float) -> None:
    require(all(0 < fraction <= 1 for fraction in fractions), "clocks must be above 0 and at most 1")


class _State:
    """One power domain."""

    def __init__(self) -> None:
        self.level = 0
        self.since_ns = 0
        self.braked_ns: float = -inf
        self.clocks: dict[str, float] = {}
        """What was last asked for; absent is the highest clock, nan unknown."""


class Capping:
    """A ladder of levels over the telemetry of each power domain."""

    name = "capping"
    listens = frozenset({"telemetry", "command"})
    period_ns: int | None = None

    def __init__(self, options: ScopeOptions, ladder: Sequence[Level], hold_s: float = 0.0) -> None:
        self.options = options
        self._ladder = tuple(ladder)
        self._hold_ns = round(hold_s * NS_PER_S)
        self._domains: dict[str, _State] = {}

    def act(self, event: Event, view: View) -> Iterable[Command]:  # noqa: ARG002
        """On telemetry: brake when it must be, and the clocks that differ from what was asked for before."""
        if event.kind == "command":
            self._forget_refused(event)
            return ()
        domain = str(event.data["domain"])
        share = float(event.data["power_w"]) / float(event.data["budget_w"])
        if share != share:  # nan: no sample, no decision
            return ()
        state = self._domains.setdefault(domain, _State())
        level = self.next_level(state.level, share, event.at_ns - state.since_ns)
        if event.at_ns <= state.braked_ns + self.options.brake_s * NS_PER_S:
            level = max(level, state.level)
        if level != state.level:
            state.level, state.since_ns = level, event.at_ns
        commands: list[Command] = []
        if share > self.options.brake_above:
            state.braked_ns = event.at_ns
            commands.append(SetClock(domain, self.options.brake_clock, brake=True))
        for scope, fraction in self._clocks(domain, level):
            if state.clocks.get(scope, 1.0) != fraction:
                state.clocks[scope] = fraction
                commands.append(SetClock(scope, fraction))
        return commands

    def next_level(self, level: int, share: float, held_ns: int) -> int:
        """The level after a sample: up at once, but for the levels that wait; down as far as the releases allow."""
        up = 0
        for index, step in enumerate(self._ladder, 1):
            waited = level >= index or (level == index - 1 and held_ns >= self._hold_ns)
            if share > step.above and (waited or not step.waits):
                up = index
        kept = max((index for index, step in enumerate(self._ladder, 1) if share >= step.release), default=0)
        return max(up, min(level, kept))

    def _clocks(self, domain: str, level: int) -> list[tuple[str, float]]:
        low, high = self.options.low, self.options.high
        if not low and not high:
            low = (domain,)
        step = self._ladder[level - 1] if level else Level(0.0, 0.0, 1.0, 1.0)
        return [(scope, step.low) for scope in low] + [(scope, step.high) for scope in high]

    def _forget_refused(self, event: Event) -> None:
        """A clock that was refused is asked for again at the next sample."""
        command = event.data["command"]
        if isinstance(command, SetClock) and not command.brake and event.data["outcome"] != "done":
            for state in self._domains.values():
                if state.clocks.get(command.scope) == command.fraction:
                    state.clocks[command.scope] = nan


class Polca(Capping):
    """Low priority first and in two steps, high priority last and least."""

    name = "polca"

    def __init__(self, options: PolcaOptions, seed: int = 0) -> None:  # noqa: ARG002
        first, second = options.first - options.hysteresis, options.second - options.hysteresis
        ladder = (
            Level(options.first, first, options.base_clock, 1.0),
            Level(options.second, second, options.deep_clock, 1.0),
            Level(options.second, second, options.deep_clock, options.high_clock, waits=True),
        )
        super().__init__(options, ladder, options.hold_s)


class SingleThreshold(Capping):
    """The same low clock for everybody above one threshold: a baseline."""

    name = "single-threshold"

    def __init__(self, options: SingleThresholdOptions, seed: int = 0) -> None:  # noqa: ARG002
        release = options.threshold - options.hysteresis
        super().__init__(options, (Level(options.threshold, release, options.clock, options.clock),))


class NoCap(Capping):
    """Nothing but the brake: a baseline."""

    name = "no-cap"

    def __init__(self, options: ScopeOptions, seed: int = 0) -> None:  # noqa: ARG002
        super().__init__(options, ())
