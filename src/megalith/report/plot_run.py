"""Pictures of one simulated run: latencies, occupancy and power.

Knows curves and axes; must not know requests or instances. Times are nanoseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megalith.base.units import NS_PER_S
from megalith.report.plot import check_plot_path
from megalith.report.plot_frame import Caption, framed, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MS = 1e6
# A latency of zero cannot stand on a logarithmic axis.
_LOG_FLOOR_MS = 0.001
_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


def plot_cdfs(
    path: Path,
    caption: Caption,
    curves: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    limits: Mapping[str, Sequence[tuple[int, float]]] | None = None,
) -> None:
    """One panel for each latency: the share of requests at or below it, and the limits of the service level.

    `curves`: by name such as TTFT, rising values and their shares (`Samples.cdf`). `limits`: by the same names, (limit
    in ns, share that must keep it): a line at the limit and a dot where the curve must have passed.
    """
    check_plot_path(path)
    figure, axes = framed(caption, columns=max(1, len(curves)))
    for i, (name, (values, shares)) in enumerate(curves.items()):
        panel, colour = axes[i], _COLOURS[i % len(_COLOURS)]
        panel.set(xlabel=f"{name}, ms", ylabel="share of requests at or below", ylim=(0, 1.02))
        if len(values):
            milliseconds = [max(value / _MS, _LOG_FLOOR_MS) for value in values]
            panel.step([milliseconds[0], *milliseconds], [0.0, *shares], where="post", color=colour, label=name)
            panel.set_xscale("log")
        for limit_ns, share in (limits or {}).get(name, ()):
            panel.axvline(limit_ns / _MS, color="tab:red", linestyle="--", linewidth=1)
            panel.plot(
                [limit_ns / _MS], [share], "o", color="tab:red", label=f"{share:.0%} within {limit_ns / _MS:g} ms"
            )
        if panel.get_legend_handles_labels()[1]:
            panel.legend(loc="lower right", fontsize="small")
    save(figure, path)


def plot_occupancy(
    path: Path, caption: Caption, times_ns: Sequence[int], series: Mapping[str, Sequence[float]]
) -> None:
    """What fills the cluster over time: names ending in `share` on their own axis from 0 to 1, the others left."""
    check_plot_path(path)
    figure, (panel,) = framed(caption)
    shares = {name: values for name, values in series.items() if name.endswith("share")}
    others = {name: values for name, values in series.items() if name not in shares}
    panel.set(xlabel="simulated time, s", ylabel=", ".join(others) or None)
    seconds = _seconds(times_ns)
    for i, (name, values) in enumerate(others.items()):
        panel.plot(seconds, list(values), color=_COLOURS[i % len(_COLOURS)], linewidth=1, label=name)
    panel.set_ylim(bottom=0)
    _legend(panel, "upper left")
    if shares:
        right = panel.twinx()
        right.set(ylabel=", ".join(shares), ylim=(0, 1.02))
        for i, (name, values) in enumerate(shares.items()):
            colour = _COLOURS[(len(others) + i) % len(_COLOURS)]
            right.plot(seconds, list(values), color=colour, linewidth=1, linestyle=":", label=name)
        _legend(right, "upper right")
    save(figure, path)


def plot_power(
    path: Path,
    caption: Caption,
    times_ns: Sequence[int],
    power_w: Mapping[str, Sequence[float]],
    budget_w: float | None = None,
) -> None:
    """Power over time in kW, stacked by pool, and the budget as a line."""
    check_plot_path(path)
    figure, (panel,) = framed(caption)
    panel.set(xlabel="simulated time, s", ylabel="power, kW")
    seconds = _seconds(times_ns)
    stacks = [[value / 1e3 for value in values] for values in power_w.values()]
    if stacks and seconds:
        panel.stackplot(seconds, *stacks, labels=list(power_w), alpha=0.8, step="pre")
    if budget_w is not None:
        panel.axhline(budget_w / 1e3, color="tab:red", linestyle="--", label="budget")
    panel.set_ylim(bottom=0)
    _legend(panel, "upper right")
    save(figure, path)


def _seconds(times_ns: Sequence[int]) -> list[float]:
    return [time_ns / NS_PER_S for time_ns in times_ns]


def _legend(panel: Axes, place: Literal["upper left", "upper right"]) -> None:
    if panel.get_legend_handles_labels()[1]:
        panel.legend(loc=place, fontsize="small")
