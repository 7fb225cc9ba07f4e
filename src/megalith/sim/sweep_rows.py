"""A sweep for people: one row a fleet, policy and rate, averaged over seeds with the spread; curves for a picture.

Knows results of points and their labels; must not know how they were run. Every figure is simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from statistics import fmean

import msgspec

from megalith.base.units import format_duration
from megalith.report.plot_sweep import Curve
from megalith.report.table import Column, Table, render_number
from megalith.sim.samples import Distribution
from megalith.sim.sweep import PointResult
from megalith.specs.slo import Metric, Slo

FORMAT = "megalith.sweep/1"
_MS = 1e6


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """One figure over the seeds that have it."""

    mean: float
    minimum: float
    maximum: float
    seeds: int


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """All seeds of one fleet, policy and rate."""

    fleet: str
    policy: str
    rate_per_s: float
    seeds: int
    """Those that ran; failed ones are not in any figure."""
    kept: int | None
    """Seeds in which the service level was kept; None without one."""
    figures: dict[str, Spread | None]
    """By name; None where no seed has the figure."""


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """One point that has no result."""

    labels: dict[str, str]
    error: str


def _latency(name: str, percent: str) -> Callable[[PointResult], float | None]:
    def read(result: PointResult) -> float | None:
        found: Distribution | None = result.latencies.get(name)
        return None if found is None else float(getattr(found, percent))

    return read


def _good_per_device(result: PointResult) -> float | None:
    return None if result.good_per_s is None or not result.devices else result.good_per_s / result.devices


def _price(result: PointResult) -> float | None:
    rate = result.output_tokens_per_s
    return None if result.price_per_hour_usd is None or rate <= 0 else result.price_per_hour_usd / (rate * 3600) * 1e6


_PERCENTS = ("p50", "p90", "p95", "p99")
_FIGURES: dict[str, Callable[[PointResult], float | None]] = {
    **{f"ttft_{percent}_ns": _latency("ttft_ns", percent) for percent in _PERCENTS},
    **{f"tpot_{percent}_ns": _latency("tpot_ns", percent) for percent in _PERCENTS},
    **{f"e2e_{percent}_ns": _latency("e2e_ns", percent) for percent in _PERCENTS},
    "attained": lambda result: result.attained,
    "requests_per_s": lambda result: result.requests_per_s,
    "good_per_s_device": _good_per_device,
    "output_tokens_per_s": lambda result: result.output_tokens_per_s,
    "price_per_million_tokens_usd": _price,
    "mean_power_w": lambda result: result.mean_power_w,
    "rejected": lambda result: result.rejected,
    "preemptions": lambda result: result.preemptions,
    "migrations": lambda result: result.migrations,
}

_SHOWN = {
    "ttft_p50_ns": "TTFT p50", "ttft_p99_ns": "TTFT p99", "tpot_p50_ns": "TPOT p50", "tpot_p99_ns": "TPOT p99",
    "attained": "good", "good_per_s_device": "goodput/s/device",
    "price_per_million_tokens_usd": "$/Mtok", "preemptions": "preemptions",
}  # fmt: skip


def make_rows(results: Sequence[PointResult]) -> tuple[list[Row], list[Failure]]:
    """Rows in the order of fleets, policies and rates as they come in `results`, and what failed."""
    groups: dict[tuple[str, str, float], list[PointResult]] = {}
    failures = []
    for result in results:
        if result.error:
            failures.append(Failure(labels=result.labels, error=result.error))
            continue
        labels = result.labels
        groups.setdefault((labels["fleet"], labels["policy"], float(labels["rate"])), []).append(result)
    return [_row(*key, seeds) for key, seeds in groups.items()], failures


def _row(fleet: str, policy: str, rate_per_s: float, seeds: Sequence[PointResult]) -> Row:
    told = [result.kept for result in seeds if result.kept is not None]
    return Row(
        fleet=fleet,
        policy=policy,
        rate_per_s=rate_per_s,
        seeds=len(seeds),
        kept=sum(told) if told else None,
        figures={name: _spread([read(result) for result in seeds]) for name, read in _FIGURES.items()},
    )


def _spread(values: Sequence[float | None]) -> Spread | None:
    known = [float(value) for value in values if value is not None and isfinite(value)]
    if not known:
        return None
    return Spread(mean=fmean(known), minimum=min(known), maximum=max(known), seeds=len(known))


def sweep_table(rows: Sequence[Row]) -> Table:
    """The rows for the terminal: the mean over seeds, and behind ± half the range between them."""
    shown = [name for name in _SHOWN if any(row.figures[name] is not None for row in rows)]
    columns = [Column("fleet", "fleet"), Column("policy", "policy"), Column("rate_per_s", "requests/s", "number")]
    columns += [Column(name, _SHOWN[name], "text", "simulated") for name in shown]
    with_slo = any(row.kept is not None for row in rows)
    if with_slo:
        columns.append(Column("kept", "SLO kept", "text", "simulated"))
    table = Table(columns, title="Simulated sweep")
    for row in rows:
        cells = [_cell(name, row.figures[name]) for name in shown]
        kept = "-" if row.kept is None else "yes" if row.kept == row.seeds else f"{row.kept} of {row.seeds} seeds"
        verdict = (kept if row.kept else "no",) if with_slo else ()
        table.add(row.fleet.replace(",", ", "), row.policy, row.rate_per_s, *cells, *verdict)
    most = max((row.seeds for row in rows), default=0)
    if most > 1:
        table.notes.append(
            f"mean of {most} seeds; ± is half the range between them, as a share of it (of `good`: in points)"
        )
    return table


def failure_table(failures: Sequence[Failure]) -> Table:
    """What has no result, and why; the same reason once."""
    table = Table([Column("points", "points", "count"), Column("where", "where"), Column("why", "why")], "Failed")
    reasons: dict[str, list[dict[str, str]]] = {}
    for failure in failures:
        reasons.setdefault(failure.error, []).append(failure.labels)
    for why, labels in reasons.items():
        where = [_values([one[name] for one in labels]) for name in labels[0]]
        table.add(len(labels), ", ".join(f"{name} {text}" for name, text in zip(labels[0], where, strict=True)), why)
    return table


def _values(values: Sequence[str]) -> str:
    each = list(dict.fromkeys(values))
    return "/".join(each) if len(each) <= 4 else f"{each[0]}..{each[-1]}"


def _cell(name: str, spread: Spread | None) -> str:
    if spread is None:
        return "-"
    half = (spread.maximum - spread.minimum) / 2
    if name == "attained":
        return f"{spread.mean:.1%} ±{half:.1%}" if half else f"{spread.mean:.1%}"
    text = format_duration(spread.mean) if name.endswith("_ns") else render_number(spread.mean)
    return f"{text} ±{half / spread.mean:.1%}" if half else text


def curves(
    results: Sequence[PointResult], slo: Slo | None = None
) -> tuple[dict[str, dict[str, Curve]], dict[str, float]]:
    """Panels for `plot_curves`, and the limits of the service level: TTFT, TPOT, and goodput or throughput.

    The percentile of a latency is that of its bound where there is one (and figures have it), else p99.
    """
    panels: dict[str, dict[str, Curve]] = {}
    limits: dict[str, float] = {}
    latencies: tuple[tuple[Metric, str], ...] = (("ttft", "TTFT"), ("tpot", "TPOT"))
    for metric, title in latencies:
        percent, limit_ms = _bound(metric, slo)
        ylabel = f"{title} {percent}, ms"
        panels[ylabel] = _curves(results, _latency(f"{metric}_ns", percent), 1 / _MS)
        if limit_ms is not None:
            limits[ylabel] = limit_ms
    if slo is None:
        panels["output tokens/s"] = _curves(results, lambda result: result.output_tokens_per_s)
    else:
        panels["goodput/s per device"] = _curves(results, _good_per_device)
    return panels, limits


def power_panel(results: Sequence[PointResult]) -> dict[str, dict[str, Curve]]:
    """A further panel for `plot_curves`: mean power, where it is known."""
    curves = _curves(results, lambda result: result.mean_power_w)
    return {"mean power, W": curves} if curves else {}


def _bound(metric: Metric, slo: Slo | None) -> tuple[str, float | None]:
    for bound in slo.bounds if slo is not None else ():
        percent = f"p{bound.percent if bound.percent is not None else slo.attain_percent if slo else 0:g}"
        if bound.metric == metric and bound.limit_ns is not None and percent in _PERCENTS:
            return percent, bound.limit_ns / _MS
    return "p99", None


def _curves(
    results: Sequence[PointResult], read: Callable[[PointResult], float | None], scale: float = 1.0
) -> dict[str, Curve]:
    lines: dict[str, dict[float, list[float]]] = {}
    several = {name: len({result.labels[name] for result in results}) > 1 for name in ("fleet", "policy")}
    for result in results:
        if result.error:
            continue
        label = ", ".join(result.labels[name] for name, many in several.items() if many) or result.labels["fleet"]
        value = read(result)
        if value is not None and isfinite(value):
            lines.setdefault(label, {}).setdefault(float(result.labels["rate"]), []).append(value * scale)
    return dict(lines)
