"""A NanoPlan as tables for the terminal. Only layout and ratios."""

from __future__ import annotations

from megalith.cost.nano import STREAM_OF
from megalith.plan.nano import NanoPlan
from megalith.report.table import Column, Table, render_number

NAMES = {
    "kqv": "KQV", "prefill": "attention, prompts", "decode": "attention, decodes", "o": "O",
    "reduce": "all-reduce behind O", "up": "up and gate", "down": "down", "gather": "all-reduce behind down",
}  # fmt: skip


def headline(plan: NanoPlan) -> list[str]:
    """What was asked, and what binds."""
    times = plan.times
    over_memory, over_links = times.memory_ns / times.compute_ns, times.link_ns / times.compute_ns
    limited = "; more decodes do not fit the memory" if plan.limited else ""
    return [
        f"{plan.model} on {plan.devices} x {plan.device}, {plan.rows:,} rows a step: {plan.decodes:,} decodes behind "
        f"{plan.context:,} tokens each, {plan.rows - plan.decodes:,} prompt rows{limited} (predicted)",
        f"Bound by {times.bound}: T_memory / T_compute = {over_memory:.2f}, T_links / T_compute = {over_links:.2f}",
        f"Optimum F / (2 P) = {render_number(plan.optimum, 4)} tokens/s of one device, with "
        f"{plan.flops_per_s / 1e12:.1f} TFLOP/s and {plan.parameters / 1e9:.2f} billion active parameters",
    ]


def way_table(plan: NanoPlan) -> Table:
    """Sequential, split, and overlapped."""
    table = Table(
        [
            Column("name", "way"),
            Column("step_ns", "step", "duration_ns", "predicted"),
            Column("tokens_per_s", "tokens/s of a device", "count", "predicted"),
            Column("share", "of the optimum", "share", "predicted"),
            Column("gain", "over sequential", "number", "predicted", 4),
            Column("power_w", "W of a device", "count", "predicted"),
        ],
        "Ways to run the step",
    )
    for way in plan.ways:
        table.add(way.name, way.step_ns, way.tokens_per_s, way.share, way.gain, way.power_w)
    table.notes.append(
        f"Assumed, not measured: attention of decodes needs {plan.enough.memory / 10:g} % of a device for its best "
        f"speed, a collective {plan.enough.link / 10:g} %, a product all of it."
    )
    if plan.programs:
        table.notes.append(f"Orders: {plan.programs} integer programs, {plan.proven} solved to the end.")
    return table


def pipeline_table(plan: NanoPlan) -> Table:
    """The operators of a layer in steady state."""
    table = Table(
        [
            Column("kind", "operator"),
            Column("stream", "stream"),
            Column("rows", "rows"),
            Column("share", "share", "share"),
            Column("alone_ns", "alone", "duration_ns", "predicted"),
            Column("takes_ns", "takes", "duration_ns", "predicted"),
            Column("start_ns", "starts", "duration_ns", "predicted"),
        ],
        f"One layer in steady state; the next begins every {plan.period_ns / 1000:,.0f} µs",
    )
    for line in plan.pipeline:
        rows = f"{line.rows[0]:,} to {line.rows[1]:,}"
        stream = STREAM_OF.get(line.kind, "compute")  # type: ignore[call-overload]
        table.add(NAMES[line.kind], stream, rows, line.share, line.alone_ns, line.takes_ns, line.start_ns)
    if not plan.pipeline:
        table.notes.append("Do not split: one operator after the other is fastest.")
    return table


def busy_table(plan: NanoPlan) -> Table:
    """How busy the resources are."""
    table = Table(
        [
            Column("resource", "resource"),
            Column("sequential", "sequential", "share", "predicted"),
            Column("overlapped", "overlapped", "share", "predicted"),
            Column("most", "at most", "share", "predicted"),
        ],
        "Busy, of what kernels reach alone",
    )
    for name, figures in plan.busy.items():
        table.add(name, *figures)
    return table
