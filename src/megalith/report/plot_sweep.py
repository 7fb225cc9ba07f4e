"""Pictures of a sweep: a figure against the rate for several fleets or policies, and the ratio of two of them.

Knows curves with several seeds; must not know what was swept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TypeAlias

from megalith.base.errors import ConfigError
from megalith.report.plot import check_plot_path
from megalith.report.plot_frame import Caption, framed, save

Curve: TypeAlias = Mapping[float, Sequence[float]]
"""By rate in requests/s, the figure of each seed; None and infinite ones are left out beforehand."""

_OFFERED = "offered load, requests/s"
_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:gray")
_MARKERS = "os^Dv<>p"


def plot_curves(
    path: Path,
    caption: Caption,
    panels: Mapping[str, Mapping[str, Curve]],
    limits: Mapping[str, float] | None = None,
    *,
    logarithmic: bool = True,
    xlabel: str = _OFFERED,
) -> None:
    """Latency-throughput curves: one panel a figure (`TTFT p90, ms`), one line a fleet or policy.

    The line is the median over seeds and the band reaches from the smallest to the largest. `limits` by panel: the
    service level.
    """
    check_plot_path(path)
    from matplotlib.ticker import LogFormatter

    figure, axes = framed(caption, columns=max(1, len(panels)))
    for panel, (ylabel, curves) in zip(axes, panels.items(), strict=False):
        panel.set(xlabel=xlabel, ylabel=ylabel)
        for i, (label, curve) in enumerate(curves.items()):
            _draw(panel, label, curve, i)
        limit = (limits or {}).get(ylabel)
        if limit is not None:
            panel.axhline(limit, color="black", linestyle="--", linewidth=1, label="service level")
        if logarithmic and any(value > 0 for curve in curves.values() for values in curve.values() for value in values):
            panel.set_yscale("log")
            for axis in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
                axis(LogFormatter(minor_thresholds=(1.5, 0.5)))
        if panel.get_legend_handles_labels()[1]:
            panel.legend(fontsize="small")
    save(figure, path)


def plot_knee(
    path: Path,
    caption: Caption,
    ylabel: str,
    ratios: Mapping[str, Curve],
    claim: tuple[str, float] | None = None,
    *,
    xlabel: str = _OFFERED,
) -> None:
    """How many times better, against the rate: no gain is a line at 1, and the largest median is marked.

    `claim`: (text, ratio) of the publication, as a line.
    """
    check_plot_path(path)
    figure, (panel,) = framed(caption)
    panel.set(xlabel=xlabel, ylabel=ylabel)
    panel.axhline(1.0, color="black", linewidth=1, label="no gain")
    for i, (label, curve) in enumerate(ratios.items()):
        _draw(panel, label, curve, i)
        if curve:
            rate, best = knee(curve)
            unit = "/s" if xlabel == _OFFERED else ""
            panel.annotate(f"{best:.3g}x at {rate:.3g}{unit}", (rate, best), textcoords="offset points", xytext=(4, 6))
    if claim is not None:
        panel.axhline(claim[1], color="tab:red", linestyle="--", linewidth=1, label=claim[0])
    panel.set_ylim(bottom=0)
    panel.margins(x=0.12)
    panel.legend(fontsize="small")
    save(figure, path)


def knee(curve: Curve) -> tuple[float, float]:
    """The rate with the largest median over seeds, and that median. ConfigError for a curve without points."""
    points = {rate: median(values) for rate, values in curve.items() if values}
    if not points:
        raise ConfigError("A curve without points has no knee.", "Sweep at least one rate.")
    rate = max(points, key=lambda rate: (points[rate], -rate))
    return rate, points[rate]


def _draw(panel: object, label: str, curve: Curve, index: int) -> None:
    rates = sorted(rate for rate, values in curve.items() if values)
    if not rates:
        return
    colour = _COLOURS[index % len(_COLOURS)]
    seeds = max(len(curve[rate]) for rate in rates)
    name = f"{label} ({seeds} seeds)" if seeds > 1 else label
    middle = [median(curve[rate]) for rate in rates]
    panel.plot(rates, middle, color=colour, marker=_MARKERS[index % len(_MARKERS)], markersize=4, label=name)  # type: ignore[attr-defined]
    if seeds > 1:
        low, high = [min(curve[rate]) for rate in rates], [max(curve[rate]) for rate in rates]
        panel.fill_between(rates, low, high, color=colour, alpha=0.18, linewidth=0)  # type: ignore[attr-defined]
