"""A FleetPlan in words: what binds, what the mechanisms are worth, and the tables for the terminal.

Only words and layout; computes nothing but differences.
"""

from __future__ import annotations

from megalith.plan.fleet_answer import Choice, Contribution, FleetPlan, Headroom
from megalith.plan.fleet_question import Objective
from megalith.plan.fleet_trial import Trial, scarce
from megalith.plan.mix_explain import describe_mix, mix_contribution
from megalith.report.table import Column, Table, render_number

_UNITS: dict[Objective, str] = {"cost": "$/h", "power": "W", "devices": "devices"}

_TIGHT = 1.1
"""Headroom below which a plan is a risk: step times are predicted to some tens of per cent (docs/prediction.md)."""


def describe_binding(winner: Choice, below: Trial | None, fallback: str) -> tuple[str, str]:
    """(what holds the winner back and what one instance less would do, the resource that is short)."""
    trial = winner.trial
    assert trial is not None
    tightest = trial.tightest
    used = trial.used.get(tightest)
    first = f"{tightest} has the least room" + ("" if used is None else f", {1 - used:.0%} of its limit is left")
    if tightest != trial.binding and trial.margin is not None:
        first += f" ({trial.margin:.0%} of all bounds at once)"
    if below is None:
        fewer = "there is no smaller fleet of this kind"
        if winner.size.instances > winner.shape.smallest:
            fewer = f"fewer instances cannot do the work ({fallback})"
        return f"{first}; {fewer}", scarce(trial, tightest, fallback)
    number = f"{below.size} instance{'s' if below.instances > 1 else ''}"
    breaks = "break" if below.instances > 1 else "breaks"
    share = f"{below.shares.get(below.breaks, below.attained):.0%} of the requests were within it"
    when = f" when {below.requests:,} had ended" if below.stopped_early else ""
    return f"{first}; {number} {breaks} {below.breaks}: {share}{when}", scarce(below, tightest, fallback)


def unit(plan: FleetPlan) -> str:
    """Of its objective."""
    return _UNITS[plan.minimise]


def every_contribution(plan: FleetPlan) -> list[Contribution]:
    """What every mechanism is worth, a mix of devices too where it was asked for."""
    return [*plan.contributions, *([] if plan.mix is None else [mix_contribution(plan.mix)])]


def describe_contribution(one: Contribution, minimise: Objective) -> str:
    """A line: whether it pays, and against what."""
    name = f"{one.mechanism} ({one.source})"
    match one.state:
        case "does not apply" | "not asked":
            return f"{name} {one.state}: {one.why}"
        case "pays" if one.control is not None and one.objective is not None and one.saves is not None:
            amounts = f"{_amount(one.objective, minimise)} against {_amount(one.control, minimise)}"
            return f"{name} pays: saves {one.saves:.0%}, {amounts}: {one.why}"
        case "does not pay" if one.control is not None and one.objective is not None:
            amounts = f"{_amount(one.objective, minimise)} against {_amount(one.control, minimise)}"
            return f"{name} does not pay here: {amounts}: {one.why}"
        case _:
            return f"{name} {one.state}{' here' if one.state == 'does not pay' else ''}: {one.why}"


def contribution_table(plan: FleetPlan) -> Table:
    """The same as a table."""
    columns = [
        Column("mechanism", "mechanism"),
        Column("source", "published as"),
        Column("state", "here"),
        Column("objective", f"with, {unit(plan)}", "number", digits=4),
        Column("control", f"without, {unit(plan)}", "number", digits=4),
        Column("saves", "saves", "share"),
        Column("nature", "figures"),
        Column("why", "what was compared, or why not"),
    ]
    table = Table(columns, title="What each mechanism contributes")
    for one in every_contribution(plan):
        table.add(one.mechanism, one.source, one.state, one.objective, one.control, one.saves, one.nature, one.why)
    return table


def room_lines(plan: FleetPlan) -> list[str]:
    """Headroom in rate, service level and power."""
    if plan.headroom is None:
        return []
    lines = [f"headroom: {headroom_text(plan.headroom, plan.rate_per_s)}"]
    if plan.headroom.slo:
        rooms = ", ".join(f"{room:.0%} of {bound}" for bound, room in plan.headroom.slo.items())
        lines.append(f"headroom: each by itself, the service level leaves {rooms}")
    power = plan.headroom.power
    if power is not None:
        drawn = f"{power.mean_w:,.0f} W on average, {power.peak_w:,.0f} W at most of {power.rated_w:,.0f} W rated"
        more = f"{power.instances} more such instances under the rated power" if power.instances else "no room for more"
        lines.append(f"headroom: draws {drawn}: {more}")
    return lines


def risk_lines(plan: FleetPlan) -> list[str]:
    """What becomes of the winner when something is not as planned."""
    lines = [f"risk: when {risk.what}, {risk.says}" for risk in plan.risks]
    if plan.headroom is not None and plan.headroom.kept_times < _TIGHT:
        lines.append("risk: hardly any headroom; figures of the cost model are not that exact: buy one instance more")
    return lines


def _amount(objective: float, minimise: Objective) -> str:
    text = f"{objective:,.0f}" if minimise == "devices" else render_number(objective, 4)
    return f"{text} {_UNITS[minimise]}"


def headline(plan: FleetPlan) -> list[str]:
    """The answer in a few lines."""
    winner = plan.winner
    least = {"cost": "cheapest", "power": "least-power", "devices": "smallest"}[plan.minimise]
    price = "" if winner.price_per_hour_usd is None else f", {render_number(winner.price_per_hour_usd, 4)} $/h"
    power = "" if winner.power_w is None else f", {render_number(winner.power_w)} W on average"
    lines = [
        f"{plan.nature}: {plan.model} under {plan.load}, {render_number(plan.rate_per_s)} requests/s, {plan.slo}",
        f"{least}: {winner.title} ({winner.devices} devices{price}{power})",
    ]
    if plan.runner_up is not None:
        more = plan.runner_up.objective / winner.objective - 1 if winner.objective else 0.0
        told = f"{_amount(plan.runner_up.objective, plan.minimise)}, {more:+.0%}"
        lines.append(f"runner-up: {plan.runner_up.title} ({told})")
    lines.append(f"binding: {plan.binding}")
    lines.append(f"short of: {plan.resource}")
    lines += [*room_lines(plan), *risk_lines(plan)]
    lines.append(f"simulate it: {winner.flags}")
    lines += [f"mechanism: {describe_contribution(one, plan.minimise)}" for one in plan.contributions]
    if plan.mix is not None:
        lines += describe_mix(plan.mix, _UNITS[plan.minimise])
    return lines


def headroom_text(headroom: Headroom, rate_per_s: float) -> str:
    """`1.22 times the load (6.7 requests/s) is kept, 1.28 times breaks ttft=400ms`."""
    rate = render_number(rate_per_s * headroom.kept_times)
    kept = f"{headroom.kept_times:.3g} times the load ({rate} requests/s) is kept"
    if headroom.broken_times is None:
        return f"{kept}; more was not tried"
    return f"{kept}, {headroom.broken_times:.3g} times breaks {headroom.breaks}"


def choice_table(plan: FleetPlan) -> Table:
    """Winner and runner-up, with their figures."""
    nature = plan.nature
    columns = [
        Column("place", "place"),
        Column("fleet", "fleet"),
        Column("devices", "devices", "count"),
        Column("price_per_hour_usd", "$/h", "number", digits=4),
        Column("price_per_million_tokens_usd", "$/Mtok", "number", nature),
        Column("power_w", "mean power, W", "count", nature),
        Column("ttft_ns", "TTFT", "duration_ns", nature),
        Column("tpot_ns", "TPOT", "duration_ns", nature),
        Column("attained", "good", "share", nature),
        Column("margin", "margin", "share", nature),
        Column("kv_peak_share", "KV peak", "share", nature),
    ]
    table = Table(columns, title="Fleets that keep the service level")
    for place, choice in (("winner", plan.winner), ("runner-up", plan.runner_up)):
        if choice is None:
            continue
        trial = choice.trial
        table.add(
            place, choice.title, choice.devices, choice.price_per_hour_usd, choice.price_per_million_tokens_usd,
            choice.power_w, choice.ttft_ns, choice.tpot_ns, None if trial is None else trial.attained, choice.margin,
            None if trial is None else trial.kv_peak_share,
        )  # fmt: skip
    table.notes.append("TTFT and TPOT are those at the percentile of their bound.")
    table.notes += plan.notes
    if plan.runs:
        table.notes.append(f"{plan.runs:,} runs of {plan.span_s / 60:.3g} min of load or parts of it")
    return table


def passed_table(plan: FleetPlan) -> Table:
    """Every other kind of fleet, and why not; the same reason for several degrees once."""
    columns = [
        Column("device", "device"),
        Column("degree", "tp"),
        Column("setup", "set-up"),
        Column("instances", "instances", "count"),
        Column("objective", unit(plan), "number", digits=4),
        Column("stage", "decided by"),
        Column("why", "why"),
    ]
    table = Table(columns, title="Not chosen")
    groups: dict[tuple[object, ...], tuple[dict[str, None], dict[str, None]]] = {}
    for one in plan.passed:
        key = (one.shape.device, one.instances, one.objective, one.stage, one.why)
        degrees, setups = groups.setdefault(key, ({}, {}))
        stages = one.shape.pipeline_parallel
        degrees[f"{one.shape.tensor_parallel}" + (f" x pp{stages}" if stages > 1 else "")] = None
        apart = f" + {one.shape.attention}" if one.shape.attention else ""
        setups[one.shape.setup + apart] = None
    decided = {"arithmetic": "arithmetic", "sample": "a part of the load", "whole": "all of the load"}
    for (device, instances, objective, stage, why), (degrees, setups) in groups.items():
        table.add(
            str(device), ", ".join(degrees), ", ".join(setups),
            instances if isinstance(instances, int) else None,
            objective if isinstance(objective, float) else None, decided[str(stage)], str(why),
        )  # fmt: skip
    return table
