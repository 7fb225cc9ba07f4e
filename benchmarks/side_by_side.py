"""Tables of ours beside theirs: percentiles of simulated times, and how many requests are met one by one."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from megalith.sim.live import Live

SHARES = (0.5, 0.9, 0.99)
EQUAL = 1e-5
"""Relative difference up to which two times count as equal."""

Times = Mapping[str, float]
"""Seconds of one request, by metric."""


class Ledger:
    """Collects what ends."""

    def __init__(self) -> None:
        self.ended: dict[int, Live] = {}

    def finished(self, live: Live) -> None:
        self.ended[live.request.id] = live

    def steps(self, first_ps: int, slope_ps: int, steps: int, decodes: int) -> None:
        pass

    def prompt_step(self, duration_ps: int, prompt_tokens: int, decodes: int) -> None:
        pass

    def late_step(self, duration_ps: int, prompt_tokens: int, decodes: int, waits: list[tuple[int, int]]) -> None:
        pass


def read_rows(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", newline="") if path.suffix == ".gz" else path.open(newline="") as file:
        return list(csv.DictReader(file))


def quantile(values: Iterable[float], share: float) -> float:
    """Linear between neighbours, as NumPy's."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def percentiles(side: Mapping[int, Times], metric: str) -> list[float]:
    return [quantile([times[metric] for times in side.values()], share) for share in SHARES]


def equal_share(ours: Mapping[int, Times], theirs: Mapping[int, Times], metric: str) -> float:
    """Of the requests, those whose times are equal."""
    met = [abs(ours[number][metric] - times[metric]) <= EQUAL * times[metric] for number, times in theirs.items()]
    return sum(met) / len(met)


def head() -> list[str]:
    columns = [f"p{round(100 * share)} ours | theirs" for share in SHARES]
    names = ["run", "", *columns, "largest difference", "requests met to 1e-5"]
    return [f"| {' | '.join(names)} |", f"|{'---|' * (4 + 2 * len(SHARES))}"]


def line(run: str, metric: str, ours: Sequence[float], theirs: Sequence[float], met: float | None) -> str:
    """One line: milliseconds, and the largest relative difference."""
    cells = [f"{1e3 * a:.1f} | {1e3 * b:.1f}" for a, b in zip(ours, theirs, strict=True)]
    worst = max([a / b - 1 for a, b in zip(ours, theirs, strict=True)], key=abs)
    share = "not kept" if met is None else f"{100 * met:.1f} %"
    return f"| {run} | {metric}, ms | {' | '.join(cells)} | {100 * worst + 0.0:+.2f} % | {share} |"
