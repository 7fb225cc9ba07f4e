"""A PlatformPlan in words and tables, for the terminal. Only layout; computes nothing but units."""

from __future__ import annotations

from collections.abc import Sequence

from megalith.base.units import NS_PER_S, format_bytes, format_duration
from megalith.plan.platform import DeviceCount, PlatformPlan, PlatformQuestion
from megalith.report.table import Column, Table, render_number

MOST_ROWS = 12


def headline(plan: PlatformPlan) -> list[str]:
    """What was asked."""
    use = plan.use_case
    each = f", {plan.batch} at once" if plan.batch > 1 else ""
    beams = f" in {use.beams} beams" if use.beams > 1 else ""
    return [
        f"{plan.model}, {plan.parameters:,} parameters: {use.title}, {use.prompt_tokens:,} prompt and "
        f"{use.output_tokens:,} answer tokens{beams}{each}; TTFT {use.ttft_ms:g} ms, TPOT {use.tpot_ms:g} ms",
        "All rates are reached ones (predicted by the roofline of GenZ, arXiv:2406.01698), not data-sheet peaks.",
    ]


def need_table(plan: PlatformPlan, question: PlatformQuestion) -> Table:
    """What the platform must have, and what asks for it."""
    table = Table(
        [Column("what", "platform needs"), Column("value", "at least", nature="predicted"), Column("why", "for")],
        "The platform" if plan.devices == 1 else f"The platform, every layer shared by {plan.devices} devices",
    )
    table.add("memory", format_bytes(plan.memory_bytes),
              f"weights {format_bytes(plan.weight_bytes)} + KV {format_bytes(plan.kv_bytes)}")  # fmt: skip
    table.add("compute", f"{si(plan.flops_per_s)}FLOP/s",
              f"TTFT: {si(plan.prefill_flops * plan.devices)}FLOP, bound by {plan.prefill_binding}")  # fmt: skip
    table.add("memory bandwidth", f"{si(plan.memory_bytes_per_s)}B/s",
              f"TPOT: {si(plan.step_bytes * plan.devices)}B a step, bound by {plan.decode_binding}")  # fmt: skip
    if plan.most_hop_ns is not None:
        link = "no bandwidth is enough" if plan.link_bytes_per_s is None else f"{si(plan.link_bytes_per_s)}B/s"
        table.add("each link, one direction", link,
                  f"collectives in {question.link_share:.0%} of each limit, {question.link_latency_ns:g} ns a hop "
                  f"(at {plan.most_hop_ns:,.0f} ns no bandwidth is enough)")  # fmt: skip
    table.notes.append(
        f"With these rates TTFT is {format_duration(plan.ttft_s * NS_PER_S)} and TPOT "
        f"{format_duration(plan.tpot_s * NS_PER_S)}; compute and bandwidth are {plan.factor:.2f} times what either "
        "would need alone."
    )
    return table


def count_table(counts: Sequence[DeviceCount], every: bool) -> Table:
    """How many devices of the catalogue have that much."""
    table = Table(
        [
            Column("device", "device"),
            Column("count", "at least", "count", "predicted"),
            Column("most", "where its band ends", "count", "predicted"),
            Column("binds", "by"),
            Column("within_a_node", "share fast links"),
        ],
        "Devices whose reached rates and usable memory add up to it",
        notes=["Lower bounds: uneven cuts, collectives and fixed times of a step are not in them."],
    )
    for one in counts if every else counts[:MOST_ROWS]:
        table.add(one.device, one.count, one.most, one.binds, one.within_a_node)
    return table


def si(value: float) -> str:
    """`1.5 P` of a value; a unit follows."""
    for scale, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= scale:
            return f"{render_number(value / scale)} {letter}"
    return f"{render_number(value)} "
