"""A PlacementPlan in words and tables. Only words and layout."""

from __future__ import annotations

from megalith.plan.placement import PlacementPlan
from megalith.plan.placement_question import COLOCATED
from megalith.report.table import Column, Table, render_number

_WHAT = {"unit": "together", "prefill": "prefill alone", "decode": "decode alone"}


def headline(plan: PlacementPlan) -> list[str]:
    """The answer in a few lines."""
    fleet, near = plan.fleet, "KV may go between nodes" if plan.affinity == "high" else "KV stays inside a node"
    rate, each = render_number(fleet.rate_per_s), render_number(fleet.rate_per_s / fleet.devices)
    lines = [
        f"simulated: {plan.model} on {plan.device} under {plan.load}, {plan.slo}; {near}",
        f"placement: {fleet.title} ({fleet.devices} devices)",
        f"serves: {rate} requests/s, {each} a device, {fleet.attained:.1%} within both limits",
    ]
    if plan.ideal_per_device_per_s is not None:
        ideal = render_number(plan.ideal_per_device_per_s)
        lines.append(f"at scale: {ideal} requests/s a device where the rates of both phases match exactly")
    lines += [
        f"added: {more} {phase} instance{'s' if more > 1 else ''} beyond ceil(rate / goodput), which broke both limits "
        "taken together"
        for phase, more in fleet.added.items()
    ]
    lines.append(_verdict(plan))
    lines.append(f"simulate it: {fleet.flags}")
    return lines


def _verdict(plan: PlacementPlan) -> str:
    best = plan.colocated
    if best is None or plan.gain is None:
        return "split: yes; no fleet that does both on one instance keeps this service level at any rate"
    against = f"{best.what} on {best.title}, {render_number(best.per_device_per_s)} requests/s a device"
    word = "yes" if plan.splits else "no"
    devices = f"; {plan.colocated_devices} such devices serve the same rate"
    return f"split: {word}, {plan.gain:.2f}x the goodput a device of the best that does not split ({against}{devices})"


def measured_table(plan: PlacementPlan) -> Table:
    """Everything that was measured, best first in each group."""
    columns = [
        Column("what", "what"),
        Column("title", "instances"),
        Column("devices", "devices", "count"),
        Column("rate_per_s", "goodput, requests/s", "number", "simulated"),
        Column("per_device_per_s", "a device", "number", "simulated"),
        Column("breaks", "breaks first"),
    ]
    table = Table(columns, title="Goodput")
    order = [*_WHAT, *dict(COLOCATED)]
    for one in sorted(plan.measured, key=lambda one: (order.index(one.what), -one.per_device_per_s)):
        what = _WHAT.get(one.what, f"both phases, {one.what}")
        table.add(what, one.title, one.devices, one.rate_per_s, one.per_device_per_s, one.breaks)
    for name, why in plan.passed.items():
        table.notes.append(f"{name} was left out: {why}")
    table.notes += [f"Timed by: {why}" for why in dict.fromkeys(plan.timing.values())]
    table.notes += [*plan.notes, f"{plan.runs:,} runs."]
    return table
