"""A FleetPlan as one page: what to buy, what each mechanism contributes, the room that is left, the risks; with plots.

Knows plans and sections; computes nothing. Pictures are drawn into a folder that the caller gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megalith.plan.fleet_answer import FleetPlan
from megalith.plan.fleet_explain import (
    choice_table,
    contribution_table,
    every_contribution,
    headline,
    passed_table,
    risk_lines,
    room_lines,
    unit,
)  # fmt: skip
from megalith.plan.mix_explain import mix_table
from megalith.report.html_page import Section, render
from megalith.report.plot_bars import plot_bars
from megalith.report.plot_frame import Caption
from megalith.report.plot_sweep import Curve, plot_curves
from megalith.report.table import Table

_MOST_BARS = 10

Panels = tuple[Mapping[str, Mapping[str, Curve]], Mapping[str, float]]
"""Panels and limits of the picture against the rate, as `sim.sweep_rows.curves` makes them."""


def page(plan: FleetPlan, curves: Panels | None, folder: Path) -> str:
    """The HTML page. `curves`: winner and runner-up against the rate; None where nothing was simulated."""
    title = f"{plan.model}: {plan.winner.title}"
    first, *rest = headline(plan)[:3]
    sections = [
        Section("What to buy", code=f"megalith simulate {plan.winner.flags} ...", tables=_bought(plan)),
        Section(
            "What each mechanism contributes", pictures=_bars(plan, folder), tables=[contribution_table(plan)],
        ),
        Section("Headroom", [*_bound(plan), *room_lines(plan)], pictures=_curves(plan, curves, folder)),
        Section("Risks", risk_lines(plan) or ["risk: not looked at: only a simulated plan tries what may go wrong"]),
        Section("Not chosen, and why", tables=[passed_table(plan)] if plan.passed else []),
        Section("Where the figures come from", [*_sources(plan), *plan.notes]),
    ]  # fmt: skip
    return render(title, [first, *rest], sections, f"megalith plan fleet, {plan.nature} figures, {plan.format}")


def _bought(plan: FleetPlan) -> list[Table]:
    mix = [mix_table(plan.mix)] if plan.mix is not None and plan.mix.parts else []
    return [choice_table(plan), *mix]


def _bound(plan: FleetPlan) -> list[str]:
    return [f"binding: {plan.binding}", f"short of: {plan.resource}"]


def _sources(plan: FleetPlan) -> list[str]:
    return [
        f"Load: {plan.load}, {plan.requests:,} requests over {plan.span_s / 60:.3g} min.",
        *(f"Step times of {device}: {source}." for device, source in plan.timing.items()),
    ]


def _bars(plan: FleetPlan, folder: Path) -> list[tuple[str, bytes]]:
    """Winner, runner-up and the other side of every mechanism, the cheapest first."""
    bars = {plan.winner.title: plan.winner.objective}
    if plan.runner_up is not None:
        bars[plan.runner_up.title] = plan.runner_up.objective
    for one in every_contribution(plan):
        for name, value in ((f"with {one.mechanism}", one.objective), (f"without {one.mechanism}", one.control)):
            if value is not None and value not in (plan.winner.objective,):
                bars.setdefault(name, value)
    shown = dict(sorted(bars.items(), key=lambda bar: bar[1])[:_MOST_BARS])
    path = folder / "bars.png"
    plot_bars(
        path, Caption("Best fleet by mechanism", _settings(plan), plan.nature), shown, unit(plan), plan.winner.title
    )
    return [("What the best fleet with and without each mechanism costs", path.read_bytes())]


def _curves(plan: FleetPlan, curves: Panels | None, folder: Path) -> list[tuple[str, bytes]]:
    """Two panels a picture."""
    panels, limits = curves or ({}, {})
    names, pictures = list(panels), []
    for begin in range(0, len(names), 2):
        pair = {name: panels[name] for name in names[begin : begin + 2]}
        path = folder / f"rates{begin}.png"
        caption = Caption("Winner and runner-up against the load", _settings(plan), plan.nature)
        plot_curves(path, caption, pair, limits, logarithmic=begin == 0)
        pictures.append((f"{' and '.join(pair)} against the load", path.read_bytes()))
    return pictures


def _settings(plan: FleetPlan) -> dict[str, str]:
    return {"model": plan.model, "load": plan.load, "service level": plan.slo}
