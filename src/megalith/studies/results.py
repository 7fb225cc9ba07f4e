"""What the points of a study gave, by experiment, arm, place on the axis and seed.

Knows figures by name; must not know what they mean. Ratios are taken seed by seed, between runs that had the same
requests, before anything is averaged.
"""

from __future__ import annotations

from itertools import pairwise
from statistics import median

from megalith.base.errors import ConfigError
from megalith.base.units import NS_PER_S
from megalith.report.plot_sweep import Curve
from megalith.sim.samples import Distribution
from megalith.sim.sweep import PointResult
from megalith.studies.study import Case, Figure, Study

_LATENCIES = ("ttft_ns", "tpot_ns", "itl_ns", "e2e_ns", "queue_ns", "normalized_ns")


class Results:
    """Grows point by point. Places and seeds come in the order of the study, whatever order points end in."""

    def __init__(self, study: Study, fast: bool = False, seeds: int | None = None) -> None:
        self.study = study
        self.fast = fast
        self.cases: dict[str, list[Case]] = {
            experiment.name: experiment.cases(fast, seeds) for experiment in study.experiments
        }
        self._found: dict[tuple[str, Case], PointResult] = {}
        self.failures: list[str] = []
        """Points without a result, and why."""

    def add(self, experiment: str, case: Case, result: PointResult) -> None:
        """Take one result."""
        if result.error:
            self.failures.append(f"{experiment}, {case.arm} at {case.at:g}, seed {case.seed}: {result.error}")
        else:
            self._found[experiment, case] = result

    def get(self, experiment: str, case: Case) -> PointResult | None:
        """The result of one point; None when there is none."""
        return self._found.get((experiment, case))

    def places(self, experiment: str) -> list[float]:
        """Where on the axis there are points."""
        return list(dict.fromkeys(case.at for case in self.cases[experiment]))

    def seeds(self, experiment: str) -> int:
        """How many seeds each point has."""
        return len({case.seed for case in self.cases[experiment]})

    def curve(self, experiment: str, arm: str, figure: Figure) -> dict[float, list[float]]:
        """By place on the axis the figure of each seed; what has no such figure is left out."""
        found: dict[float, list[float]] = {}
        for case in self._cases(experiment, arm):
            result = self.get(experiment, case)
            value = None if result is None else read(result, figure)
            if value is not None:
                found.setdefault(case.at, []).append(value)
        return found

    def ratio(self, experiment: str, over: str, under: str, figure: Figure) -> dict[float, list[float]]:
        """`over` divided by `under`, seed by seed, where both have the figure and the lower one is above zero."""
        found: dict[float, list[float]] = {}
        for case in self._cases(experiment, over):
            value = self._ratio(experiment, case, under, figure)
            if value is not None:
                found.setdefault(case.at, []).append(value)
        return found

    def by_seed(self, experiment: str, over: str, under: str, figure: Figure) -> dict[int, dict[float, float]]:
        """The same ratios by seed and then by place: one curve for each sequence of requests."""
        found: dict[int, dict[float, float]] = {}
        for case in self._cases(experiment, over):
            value = self._ratio(experiment, case, under, figure)
            if value is not None:
                found.setdefault(case.seed, {})[case.at] = value
        return found

    def middle(self, experiment: str, arm: str, figure: Figure, at: float) -> float | None:
        """The median over the seeds at one place; None without a figure."""
        values = self.curve(experiment, arm, figure).get(at)
        return median(values) if values else None

    def middle_ratio(self, experiment: str, over: str, under: str, figure: Figure, at: float) -> float | None:
        """The median over the seeds of the ratio at one place; None without a figure."""
        values = self.ratio(experiment, over, under, figure).get(at)
        return median(values) if values else None

    def _ratio(self, experiment: str, case: Case, under: str, figure: Figure) -> float | None:
        pair = self.get(experiment, case), self.get(experiment, case._replace(arm=under))
        over, below = (None if result is None else read(result, figure) for result in pair)
        return quotient(over, below)

    def _cases(self, experiment: str, arm: str) -> list[Case]:
        if experiment not in self.cases:
            raise ConfigError(
                f"{self.study.name} has no experiment {experiment!r}.", f"It has {', '.join(self.cases)}."
            )
        return [case for case in self.cases[experiment] if case.arm == arm]


def quotient(over: float | None, under: float | None) -> float | None:
    """One figure over another; None where one is missing or the lower one is zero."""
    return over / under if over is not None and under else None


def crossing(curve: Curve, *, rising: bool) -> float | None:
    """Where the median over seeds first passes 1, on straight lines between places; None where it does not.

    Rising: from at most 1 to above it; else from above 1 to at most that.
    """
    points = [(at, median(values)) for at, values in sorted(curve.items())]
    for (low, before), (high, after) in pairwise(points):
        if (before > 1) != (after > 1) and (after > 1) == rising:
            return low + (high - low) * (1 - before) / (after - before)
    return None


def read(result: PointResult, figure: Figure) -> float | None:
    """One figure of a result; durations in seconds. ConfigError for a name that means nothing."""
    if callable(figure):
        return figure(result)
    if figure in result.figures:
        return result.figures[figure]
    name, _, percent = figure.partition(".")
    if name in result.latencies or name in _LATENCIES:
        distribution: Distribution | None = result.latencies.get(name)
        return None if distribution is None else getattr(distribution, percent) / NS_PER_S
    if figure in result.__struct_fields__:
        value = getattr(result, figure)
        return None if value is None else float(value)
    raise ConfigError(f"No figure {figure!r}.", f"There are {', '.join([*result.figures, *result.__struct_fields__])}.")
