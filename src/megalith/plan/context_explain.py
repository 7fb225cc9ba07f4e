"""A ContextPlan as tables for the terminal. Only layout and ratios."""

from __future__ import annotations

from megalith.base.units import NS_PER_S
from megalith.cost.long_context import Session
from megalith.plan.context import WITHIN, ContextPlan, choices
from megalith.report.table import Column, Table

MOST_WAYS = 12


def headline(plan: ContextPlan) -> str:
    """What was asked."""
    group = f" x {plan.devices}" if plan.devices > 1 else ""
    return (
        f"{plan.model} on {plan.device}{group}, {plan.rates} rates, against {plan.against.tokens:,} tokens (predicted)"
    )


def cost_table(plan: ContextPlan, new_tokens: int, session: Session) -> Table:
    """The four costs by context."""
    table = Table(
        [
            Column("tokens", "context", "count"),
            Column("kv_bytes", "KV", "bytes", "predicted"),
            Column("users", "users that fit", "count", "predicted"),
            Column("prefill_ns", "prefill", "duration_ns", "predicted"),
            Column("decode_ns", f"decode {new_tokens:,}", "duration_ns", "predicted"),
            Column("switch_ns", "switch out and in", "duration_ns", "predicted"),
            Column("sessions_per_hour", "sessions/h", "number", "predicted"),
        ],
        "Costs of a context",
        notes=[
            f"Sessions: {session.users} users read a prompt and ask {session.rounds} times, {session.think_s:g} s of "
            "thought between; users that do not fit are switched at every question.",
            *plan.notes,
        ],
    )
    for one in dict.fromkeys((plan.against, *plan.costs)):
        table.add(
            one.tokens, one.kv_bytes, one.users, round(one.prefill_s * NS_PER_S), round(one.decode_s * NS_PER_S),
            round(one.switch_s * NS_PER_S), one.sessions_per_hour,
        )  # fmt: skip
    return table


def way_table(plan: ContextPlan, layers: int, every: bool = False) -> Table:
    """Levers that bring the longest context back."""
    longest = max(one.tokens for one in plan.costs)
    table = Table(
        [
            Column("kept", "KV kept", "share", "predicted"),
            Column("users", "users", "number", "predicted", 2),
            Column("decode", "decode", "number", "predicted", 2),
            Column("switch", "switch", "number", "predicted", 2),
            Column("changes", "by (what it does to answers was not measured)"),
        ],
        f"Ways that bring {longest:,} tokens within {WITHIN:g} times the cost of {plan.against.tokens:,}",
    )
    for way in plan.ways if every else plan.ways[:MOST_WAYS]:
        table.add(way.kept, way.users, way.decode, way.switch, "; ".join(way.changes) or "nothing: it is near")
    used = {label for row in table.rows for label in str(row[-1]).split("; ")}
    for options in choices(layers).values():
        table.notes += [f"{one.label}: {one.source}" for one in options if one.source and one.label in used]
    if not plan.ways:
        table.notes.append("None of the published settings together does.")
    if len(plan.ways) > len(table.rows):
        table.notes.append(f"{len(plan.ways) - len(table.rows)} more with --json.")
    if plan.shared_prompts > 1:
        table.notes.append(
            f"Prefill stays: it comes near only where {plan.shared_prompts:,} sessions read the same prompt once."
        )
    return table
