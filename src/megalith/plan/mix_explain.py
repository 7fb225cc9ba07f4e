"""A MixAnswer in words and as a table. Only words and layout."""

from __future__ import annotations

from megalith.plan.fleet_answer import Contribution, MixAnswer
from megalith.report.table import Column, Table, render_number

_KNOWS = {
    "prompt": "a router that knows the length of the prompt",
    "sizes": "a router that knows the lengths of prompt and answer (ORACLE: nobody knows the answer's beforehand)",
}


def describe_mix(mix: MixAnswer, unit: str) -> list[str]:
    """Whether it pays, in a line or two."""
    if mix.objective is None:
        return [f"mix does not pay here: {mix.why}"]
    price = f"{render_number(mix.objective, 4)} {unit}"
    against = "" if mix.control is None else f" against {render_number(mix.control, 4)} {unit} ({mix.against})"
    if mix.pays:
        saved = "" if mix.saves is None else f", saves {mix.saves:.0%}"
        lines = [f"mix pays ({mix.nature}): {mix.title} for {price}{against}{saved}"]
    else:
        lines = [f"mix does not pay here ({mix.nature}): {mix.title} for {price}{against}: {mix.why}"]
    more = f"it needs {_KNOWS[mix.knows]}"
    if mix.factor != 1:
        more += f"; sized for {mix.factor:.3g} times the load"
    if mix.good is not None:
        more += f"; {mix.good:.1%} of the requests are good"
    if not mix.proven:
        more += "; the solver's time ran out: a cheaper one may exist"
    return [*lines, f"mix: {more}"]


def mix_contribution(mix: MixAnswer) -> Contribution:
    """The same as what every other mechanism contributes."""
    why = f"{mix.title} against {mix.against}" if mix.objective is not None else mix.why
    return Contribution(
        mechanism="mix of devices", source="Mélange", state="pays" if mix.pays else "does not pay", nature=mix.nature,
        objective=mix.objective, control=mix.control, saves=mix.saves, why=why,
    )  # fmt: skip


def mix_table(mix: MixAnswer) -> Table:
    """What is bought and how busy it is."""
    columns = [
        Column("type", "type"),
        Column("instances", "instances", "count"),
        Column("busy", "busy at the planned load", "share", "predicted"),
        Column("requests", "requests", "count", mix.nature),
        Column("flags", "flags"),
    ]
    table = Table(columns, "Cheapest mix by the integer program")
    for part in mix.parts:
        table.add(part.name, part.count, part.busy / part.count, part.requests, part.flags)
    if mix.shares:
        kept = ", ".join(f"{bound} by {share:.1%}" for bound, share in mix.shares.items())
        table.notes.append(
            f"Simulated: {kept} of the requests; {mix.runs} {'mix was' if mix.runs == 1 else 'mixes were'} run."
        )
    return table
