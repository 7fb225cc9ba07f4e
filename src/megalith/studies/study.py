"""What a study is: claims of a publication, arms with the mechanism on and off, and how results are judged.

Knows words and numbers; must not know how points are run or how a page looks. Every study has a control, that is an arm
with the mechanism switched off: a gain that is there without the mechanism is not its gain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.report.plot_sweep import Curve
from megalith.report.table import Nature, Table
from megalith.sim.scenario import Scenario
from megalith.sim.sweep import PointResult

if TYPE_CHECKING:
    from megalith.studies.results import Results

Word: TypeAlias = Literal["reproduced", "exceeded", "partly", "not reproduced", "goes against", "no result"]
Figure: TypeAlias = str | Callable[[PointResult], float | None]
"""`ttft_ns.p99` (seconds), a field of PointResult, a name in its `figures`, or a function."""
Role: TypeAlias = Literal["on", "off", "baseline"]
NO_GAIN = 0.05
"""Within this share of the neutral value a mechanism has done nothing."""


class Claim(NamedTuple):
    """One figure of a publication. Figures are ratios in favour of the mechanism unless `neutral` says otherwise."""

    key: str
    text: str
    setting: str
    published: float
    band: tuple[float, float]
    """Figures in it reproduce the claim."""
    neutral: float = 1.0
    """The figure of a mechanism that does nothing."""
    unit: str = "x"
    said: str = ""
    """What the publication says where it gives no one figure; `published` is then what that means at least."""


class Arm(NamedTuple):
    """One way to run the set-up."""

    name: str
    role: Role
    """`on`: with the mechanism. `off`: the control, all the same without it. `baseline`: another system."""
    title: str


class Case(NamedTuple):
    """What sets one point of an experiment apart."""

    arm: str
    at: float
    """Where on the axis: a rate, a number of clients, a budget."""
    seed: int
    fast: bool


class Simulated(Config, kw_only=True):
    """A point that the simulator runs."""

    scenario: Scenario
    measure: str = ""
    """`module:function` of (StudyPoint) -> PointResult, for figures that a plain run does not give."""
    options: dict[str, float | str] = {}


class Computed(Config, kw_only=True):
    """A point without a scenario: the planner's, or a real run. One after the other, in this process."""

    call: str
    """`module:function` of (options) -> figures by name."""
    options: dict[str, float | str] = {}


Task: TypeAlias = Simulated | Computed


@dataclass(frozen=True, slots=True)
class Experiment:
    """Arms along an axis, each point with several seeds."""

    name: str
    title: str
    arms: tuple[Arm, ...]
    axis: str
    at: tuple[float, ...]
    task: Callable[[Case], Task]
    seeds: int = 5
    fast_at: tuple[float, ...] = ()
    """A few points that show the claim; empty: all of them."""
    fast_seeds: int = 1
    nature: Nature = "simulated"
    shown: Mapping[str, Figure] = field(default_factory=dict)
    """Figures of every point that the page prints, by title."""

    def cases(self, fast: bool, seeds: int | None = None) -> list[Case]:
        """Every point, in a fixed order."""
        number = seeds or (self.fast_seeds if fast else self.seeds)
        places = self.fast_at if fast and self.fast_at else self.at
        return [Case(arm.name, at, seed, fast) for at in places for arm in self.arms for seed in range(number)]


class Finding(NamedTuple):
    """A claim against ours."""

    claim: Claim
    ours: float | None
    on: str
    """The figure with the mechanism, as text with its unit."""
    off: str
    """The same without it."""
    note: str = ""
    counts: bool = True
    """False: printed beside the others, without a say in the verdict."""

    @property
    def word(self) -> Word:
        """How ours stands to the claim."""
        return assess(self.claim, self.ours)


class Gate(NamedTuple):
    """A figure that must lie in a band, or the study has failed to show what it is there for."""

    name: str
    value: float | None
    low: float
    high: float
    source: str

    @property
    def passed(self) -> bool:
        """Whether it lies in the band; a figure that could not be had does not."""
        return self.value is not None and self.low <= self.value <= self.high


@dataclass(frozen=True, slots=True)
class Picture:
    """Curves to draw: several panels, or ratios against a line at 1."""

    name: str
    title: str
    axis: str
    panels: Mapping[str, Mapping[str, Curve]] = field(default_factory=dict)
    ratios: Mapping[str, Curve] = field(default_factory=dict)
    ylabel: str = ""
    """Of ratios."""
    claim: tuple[str, float] | None = None
    """Of ratios: the published one."""
    logarithmic: bool = True


@dataclass(slots=True)
class Judgement:
    """What a study says of its results."""

    findings: list[Finding]
    gates: list[Gate]
    tables: dict[str, Table] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Study:
    """A runnable claim of a published system."""

    name: str
    title: str
    summary: tuple[str, ...]
    """What the system is, in about five lines."""
    reference: str
    claims: tuple[Claim, ...]
    experiments: tuple[Experiment, ...]
    judge: Callable[[Results], Judgement]
    differences: tuple[str, ...]
    """What differs from the publication, and why."""
    profiles: tuple[str, ...] = ()
    """What computed points are timed by, in words; simulated ones say so themselves."""
    system: str = ""
    """Title of the publication whose row of the census page (docs/systems.md) it answers for."""

    def __post_init__(self) -> None:
        """ConfigError for a study without a claim or an experiment without a control."""
        if not self.claims or not self.experiments:
            raise ConfigError(f"The study {self.name} has no claim or no experiment.", "Give it one of each.")
        for experiment in self.experiments:
            roles = {arm.role for arm in experiment.arms}
            if not {"on", "off"} <= roles:
                raise ConfigError(
                    f"{self.name}: the experiment {experiment.name} has arms {sorted(roles)} and no control.",
                    "Give it an arm with the mechanism `on` and one with it `off`.",
                )

    def claim(self, key: str) -> Claim:
        """The claim of that key. Raises KeyError."""
        return {claim.key: claim for claim in self.claims}[key]


def assess(claim: Claim, ours: float | None) -> Word:
    """How a figure of ours stands to a published one.

    In the band: reproduced; beyond it on the published side: exceeded. Between there and the neutral value: partly.
    About the neutral value: not reproduced. On the other side of it: goes against.
    """
    if ours is None or not isfinite(ours):
        return "no result"
    up = claim.published >= claim.neutral
    low, high = claim.band
    if low <= ours <= high:
        return "reproduced"
    if (ours > high) if up else (ours < low):
        return "exceeded"
    gain = (ours - claim.neutral) if up else (claim.neutral - ours)
    slack = NO_GAIN * (abs(claim.neutral) or 1.0)
    if abs(gain) <= slack:
        return "not reproduced"
    return "partly" if gain > 0 else "goes against"


def overall(findings: Sequence[Finding]) -> Word:
    """The verdict on all claims that count: the common word; else `partly` while any holds at all."""
    words = {finding.word for finding in findings if finding.counts}
    if not words or "no result" in words:
        return "no result"
    if len(words) == 1:
        return words.pop()
    if words == {"reproduced", "exceeded"}:
        return "reproduced"
    return "partly" if words & {"reproduced", "exceeded", "partly"} else "goes against"


def sentence(findings: Sequence[Finding]) -> str:
    """The verdict in words with numbers."""
    parts = [
        f"{finding.claim.text}: {_number(finding.ours)}{finding.claim.unit} where {claimed(finding.claim)}"
        f" was published ({finding.word})"
        for finding in findings
        if finding.counts
    ]
    return "; ".join(parts) + "." if parts else "Nothing to judge."


def claimed(claim: Claim) -> str:
    """What was published, in words or as a figure with its unit."""
    return claim.said or f"{_number(claim.published)}{claim.unit}"


def _number(value: float | None) -> str:
    return "no figure" if value is None else f"{value:.3g}"
