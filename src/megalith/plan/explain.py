"""A ServePlan for people: tables for the terminal and the docs, and a few lines for the verbs that load.

Only words and layout. Must not compute predictions.
"""

from __future__ import annotations

from megalith.base.units import format_bytes, format_duration
from megalith.report.table import Column, Table, render_number
from megalith.specs.plan import BatchPoint, Estimate, ServePlan


def band(estimate: Estimate | None, digits: int = 3) -> str:
    """`12.3 [9.8, 16.1]`."""
    if estimate is None:
        return "-"
    value, low, high = (render_number(x, digits) for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def duration_band(estimate: Estimate) -> str:
    """`2.81 ms [2.2 ms, 3.4 ms]`."""
    low, high = format_duration(estimate.low), format_duration(estimate.high)
    return f"{format_duration(estimate.value)} [{low}, {high}]"


def memory_table(plan: ServePlan) -> Table:
    """Memory by item with its formula, the sum, the limit and what is left."""
    each = f" on each of {plan.devices} devices" if plan.devices > 1 else ""
    table = Table(
        columns=(
            Column("item", "item"),
            Column("num_bytes", "bytes", "bytes", "predicted"),
            Column("formula", "how"),
        ),
        title=f"Memory{each}",
    )
    for line in plan.memory:
        table.add(line.item, line.num_bytes, line.formula)
    table.add("needed", plan.need_bytes, f"for {plan.batch} x {plan.context:,} tokens")
    table.add("limit", plan.limit_bytes, plan.limit_source)
    table.add("left", plan.limit_bytes - plan.need_bytes, "fits" if plan.fits else "DOES NOT FIT")
    return table


def speed_table(plan: ServePlan) -> Table:
    """Decode speed, power and money by batch; each cell has its band."""
    columns = [
        Column("batch", "batch", "count"),
        Column("tpot", "TPOT ms", nature="predicted"),
        Column("tokens_per_s", "output tok/s", nature="predicted"),
        Column("binding", "bound by", nature="predicted"),
        Column("power_w", "power W", nature="predicted"),
        Column("joules_per_token", "J/token", nature="predicted"),
    ]
    priced = any(point.usd_per_million_tokens is not None for point in plan.points)
    if priced:
        columns.append(Column("usd_per_million_tokens", "USD per M tokens", nature="predicted"))
    title = f"Decode at {plan.points[0].context:,} tokens of context"
    table = Table(columns=columns, title=title, notes=[f"Band [low, high]: {plan.band_source}."])
    for point in plan.points:
        table.add(*_speed_cells(point, priced))
    table.notes.extend(plan.notes)
    return table


def _speed_cells(point: BatchPoint, priced: bool) -> tuple[int | str, ...]:
    cells: tuple[int | str, ...] = (
        point.batch,
        band(point.tpot_ns.scaled(1e-6)),
        band(point.tokens_per_s),
        point.binding,
        band(point.power_w),
        band(point.joules_per_token, 2),
    )
    return (*cells, band(point.usd_per_million_tokens)) if priced else cells


def remedy_table(plan: ServePlan) -> Table:
    """What would make it fit."""
    table = Table(
        columns=(
            Column("change", "change"),
            Column("need_bytes", "would need", "bytes", "predicted"),
            Column("limit_bytes", "of", "bytes"),
        ),
        title="What would make it fit",
    )
    for remedy in plan.remedies:
        table.add(remedy.change, remedy.need_bytes, remedy.limit_bytes)
    return table


def headline(plan: ServePlan) -> list[str]:
    """The plan in four sentences."""
    active = "" if plan.active_parameters == plan.parameters else f" ({plan.active_parameters:,} active)"
    group = f" x {plan.devices}" if plan.devices > 1 else ""
    fit = (
        f"fits: {format_bytes(plan.need_bytes)} of {format_bytes(plan.limit_bytes)}"
        if plan.fits
        else f"DOES NOT FIT: {format_bytes(plan.need_bytes)} against {format_bytes(plan.limit_bytes)}"
    )
    return [
        f"{plan.model}, {plan.parameters:,} parameters{active}, {plan.weight_format}, KV {plan.kv_format} "
        f"({plan.kv_bytes_per_token:,} B a token)",
        f"on {plan.device}{group}: {fit}; at most {plan.max_sequences:,} sequences of {plan.context:,} tokens, "
        f"or one of {plan.max_context:,}",
        f"prefill {band(plan.prefill_tokens_per_s)} tok/s, TTFT of {plan.prompt_tokens:,} tokens "
        f"{duration_band(plan.ttft_ns)} (predicted)",
        f"profile: {plan.device_source}",
    ]


def plan_text(plan: ServePlan) -> str:
    """The plan in a few lines, as the serving verbs print it before loading. Everything is predicted."""
    items = ", ".join(f"{line.item} {format_bytes(line.num_bytes)}" for line in plan.memory)
    first = plan.points[0]
    usable = [point for point in plan.points if point.fits]
    last = usable[-1] if usable else first
    lines = [
        *headline(plan)[:2],
        f"memory (predicted): {items}; {plan.num_blocks:,} KV blocks of {plan.block_tokens} tokens",
        headline(plan)[2],
        f"decode at {first.context:,} tokens (predicted): batch {first.batch} TPOT {duration_band(first.tpot_ns)}; "
        f"batch {last.batch} {band(last.tokens_per_s)} tok/s, bound by {last.binding}",
        f"band: {plan.band_source}",
        *(note for note in plan.notes if note.startswith("Weights do not stay")),
    ]
    return "\n".join(lines)
