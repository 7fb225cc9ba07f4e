"""Slo: what a person promises about latency, as text and as data.

Knows names, limits and shares; must not know how latencies come about. A limit is a time, or a multiple of what a
reference would have taken for the same request alone (Splitwise, ISCA 2024, section VI-A: a slowdown).

How a limit counts. Each has a share of the requests that must keep it: `tpot=40ms@p90` is kept when at least 90 % of
*all* requests do. A request that was rejected, failed or gave nothing keeps no limit, so that a fleet cannot improve
by refusing. With no request refused this is the nearest-rank percentile of report.percentiles; an answer of one token
has no TPOT and is left out of a bound on it. Limits without a share are promised together: at least `attain` of the
requests must keep all of them at once (DistServe, OSDI 2024, section 2.2: 0.9). A request is *good* when it keeps
every limit on requests; goodput counts those.
"""

from __future__ import annotations

import re
from typing import Literal, TypeAlias, get_args

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.base.units import parse_duration_ns

Metric: TypeAlias = Literal["ttft", "tpot", "e2e", "itl"]
METRICS: tuple[Metric, ...] = get_args(Metric)

_EXAMPLE = "Write it like ttft=400ms,tpot=40ms@p90 or ttft=400ms,tpot=40ms,attain=0.9 or ttft=3x@p90, or `splitwise`."


class Bound(Config):
    """One limit: exactly one of `limit_ns` and `slowdown`."""

    metric: Metric
    limit_ns: int | None = None
    slowdown: float | None = None
    """Times the reference's figure for a request of the same lengths."""
    percent: float | None = None
    """This many of a hundred requests (for `itl`: of the gaps between tokens) must keep it; None: see `Slo.attain`."""

    def __post_init__(self) -> None:
        """ConfigError for a limit that means nothing."""
        if (self.limit_ns is None) == (self.slowdown is None):
            raise ConfigError(f"The bound on {self.metric} needs a time or a slowdown, and not both.", _EXAMPLE)
        if (self.limit_ns if self.slowdown is None else self.slowdown) <= 0:  # type: ignore[operator]
            raise ConfigError(f"The bound {self} is not above zero.", _EXAMPLE)
        if self.percent is not None and not 0 < self.percent <= 100:
            raise ConfigError(f"The bound {self} asks for p{self.percent:g}.", "Ask for above p0 and at most p100.")
        if self.metric == "itl" and (self.percent is None or self.slowdown is not None):
            raise ConfigError("A bound on itl is on all gaps between tokens.", "Give a time and a share: itl=50ms@p99.")

    def __str__(self) -> str:
        limit = f"{self.slowdown:.15g}x" if self.limit_ns is None else _time(self.limit_ns)
        return f"{self.metric}={limit}" + ("" if self.percent is None else f"@p{self.percent:.15g}")


class Slo(Config):
    """All limits of a service."""

    bounds: tuple[Bound, ...]
    attain: float = 0.9
    """Share of the requests that must keep all bounds without a `percent` at once."""

    def __post_init__(self) -> None:
        """ConfigError for an impossible share or no bound."""
        if not 0 < self.attain <= 1:
            raise ConfigError(f"attain={self.attain:g} is no share of the requests.", "Give one above 0, at most 1.")
        if not self.bounds:
            raise ConfigError("A service level needs a bound.", _EXAMPLE)

    def __str__(self) -> str:
        shared = (f"attain={self.attain:.15g}",) if self.joint else ()
        return ",".join((*map(str, self.bounds), *shared))

    @property
    def joint(self) -> tuple[Bound, ...]:
        """The bounds that must be kept at once."""
        return tuple(bound for bound in self.bounds if bound.percent is None)

    @property
    def attain_percent(self) -> float:
        """`attain` of a hundred, as the decimal number that was written."""
        return float(f"{self.attain * 100:.12g}")

    @property
    def needs_reference(self) -> bool:
        """Whether a bound is a slowdown."""
        return any(bound.slowdown is not None for bound in self.bounds)


def make_slo(
    *, ttft_ns: int | None = None, tpot_ns: int | None = None, e2e_ns: int | None = None, attain: float = 0.9
) -> Slo:
    """The common case: limits that `attain` of the requests must keep at once."""
    limits: tuple[tuple[Metric, int | None], ...] = (("ttft", ttft_ns), ("tpot", tpot_ns), ("e2e", e2e_ns))
    bounds = tuple(Bound(metric=metric, limit_ns=limit) for metric, limit in limits if limit is not None)
    return Slo(bounds=bounds, attain=attain)


def _splitwise() -> Slo:
    """The nine limits of splitwise-sim: TTFT 2x, 3x, 6x and TPOT, E2E 1.25x, 1.5x, 5x at p50, p90, p99."""
    table: dict[Metric, tuple[float, float, float]] = {
        "ttft": (2, 3, 6), "tpot": (1.25, 1.5, 5), "e2e": (1.25, 1.5, 5),
    }  # fmt: skip
    return Slo(
        bounds=tuple(
            Bound(metric=metric, slowdown=float(times), percent=percent)
            for metric, row in table.items()
            for times, percent in zip(row, (50.0, 90.0, 99.0), strict=True)
        )
    )


SPLITWISE_SLO = _splitwise()


def parse_slo(text: str) -> Slo:
    """A service level from text. Raises ConfigError.

    Comma-separated: `METRIC=LIMIT[@pNN]` with metric ttft, tpot, e2e or itl and a limit such as 400ms or 3x, and
    `attain=0.9` or `attain=90%`. The word `splitwise` stands for that paper's nine limits and may be among them.
    """
    bounds: list[Bound] = []
    attain = 0.9
    for part in filter(None, (part.strip().lower() for part in text.split(","))):
        name, _, value = (word.strip() for word in part.partition("="))
        if part == "splitwise":
            bounds.extend(SPLITWISE_SLO.bounds)
        elif name == "attain":
            attain = _share(value)
        elif name in METRICS and value:
            bounds.append(_bound(name, value))
        else:
            raise ConfigError(f"{part!r} is no service level.", _EXAMPLE)
    return Slo(bounds=tuple(bounds), attain=attain)


def _bound(metric: Metric, value: str) -> Bound:
    limit, _, at = (word.strip() for word in value.partition("@"))
    percent = None
    if at:
        match = re.fullmatch(r"p?(\d+(?:\.\d+)?)%?", at)
        if match is None:
            raise ConfigError(f"{at!r} is no percentile.", "Write it like @p90.")
        percent = float(match.group(1))
    if re.fullmatch(r"\d+(?:\.\d+)?\s*x", limit):
        return Bound(metric=metric, slowdown=float(limit[:-1]), percent=percent)
    if not limit:
        raise ConfigError(f"The bound on {metric} has no limit.", _EXAMPLE)
    return Bound(metric=metric, limit_ns=parse_duration_ns(limit), percent=percent)


def _time(duration_ns: int) -> str:
    """Text that parse_duration_ns reads as the same number."""
    for unit, scale in (("s", 10**9), ("ms", 10**6), ("us", 10**3)):
        if duration_ns >= scale:
            return f"{duration_ns / scale:.15g}{unit}"
    return f"{duration_ns}ns"


def _share(value: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", value)
    if match is None:
        raise ConfigError(f"{value!r} is no share.", "Write attain=0.9 or attain=90%.")
    return float(match.group(1)) / (100 if match.group(2) else 1)
