"""The plan of attention on other devices, as a headline and a table."""

from __future__ import annotations

from math import ceil

from megalith.plan.attention import ETHERNET_BYTES_PER_S, LOSS, AttentionPlan, Deployment
from megalith.report.table import Cell, Column, Table


def headline(plan: AttentionPlan) -> str:
    """What pays where, in one line."""
    rows = [row for row in plan.rows if row.mixed is not None]
    if not rows:
        return f"predicted: no instance of {plan.model} with attention on {plan.attention_device} fits or is in time."
    pays = [f"{row.context:,}" for row in rows if row.gain is not None and row.gain > 1.0]
    alone = [f"{row.context:,}" for row in rows if row.own is None and row.other is None]
    parts = [f"predicted: {plan.model}, {plan.device} with attention on {plan.attention_device}"]
    parts.append(f"pays at {', '.join(pays)} tokens" if pays else "pays at no context against the better single kind")
    if alone:
        parts.append(f"is the only one that holds {', '.join(alone)}")
    return "; ".join(parts) + ("." if plan.priced else " (without a price: see tokens/s).")


def attention_table(plan: AttentionPlan) -> Table:
    """One row a context."""
    columns = [
        Column("context", "tokens", "count"),
        Column("mixed", "best with attention elsewhere"),
        Column("requests", "requests", "count", "predicted"),
        Column("step_ms", "step, ms", "number", "predicted"),
        Column("tokens_per_s", "tokens/s", "number", "predicted"),
        Column("tokens_per_usd", "tokens/$", "number", "predicted"),
        Column("own", f"{plan.device} alone, tokens/$", "number", "predicted"),
        Column("other", f"{plan.attention_device} alone, tokens/$", "number", "predicted"),
        Column("gain", "over the better", "number", "predicted"),
        Column("link", "link needed, GB/s", "number", "predicted"),
        Column("links", "links of 400 Gb/s", "count", "predicted"),
    ]
    table = Table(columns, "Decode by context, each kind at its best")
    for row in plan.rows:
        mixed = row.mixed
        own, other = (_per_usd(one) for one in (row.own, row.other))
        if mixed is None:
            table.add(row.context, "does not fit", None, None, None, None, own, other, None, None, None)
            continue
        table.add(
            row.context, mixed.name, mixed.requests, mixed.step_s * 1e3, mixed.tokens_per_s, _per_usd(mixed), own,
            other, row.gain, mixed.needed_bytes_per_s / 1e9, ceil(mixed.needed_bytes_per_s / ETHERNET_BYTES_PER_S),
        )  # fmt: skip
    table.notes.append(
        f"Link needed: each way, of an instance; with so much a step takes {LOSS:.0%} longer than over one without end."
    )
    return table


def _per_usd(one: Deployment | None) -> Cell:
    return None if one is None or one.usd_per_hour is None else one.tokens_per_usd
