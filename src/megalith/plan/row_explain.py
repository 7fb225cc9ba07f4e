"""Rows and headrooms as tables for the terminal. Only layout and ratios."""

from __future__ import annotations

from collections.abc import Sequence

from megalith.plan.row import Headroom, RowQuestion, device_title, lost
from megalith.report.table import Column, Table
from megalith.sim.fluid_row import RowResult


def headline(question: RowQuestion, servers: int, rate: float, days: float) -> str:
    """What was asked."""
    return (
        f"{servers} servers of {device_title(question)} with {question.model} in the budget of "
        f"{question.budget_servers} ({question.budget_w / 1000:,.0f} kW), at most {rate:.3g} requests/s each, "
        f"{days:g} days (simulated, fidelity fluid)"
    )


def row_table(results: Sequence[RowResult]) -> Table:
    """Each policy's row; the last result is the row with nobody at the clocks."""
    free = results[-1]
    table = Table(
        [
            Column("policy", "policy"),
            Column("peak", "peak of budget", "share", "simulated"),
            Column("mean", "mean of budget", "share", "simulated"),
            Column("brakes", "brakes", "count", "simulated"),
            Column("low", "low capped", "share", "simulated"),
            Column("high", "high capped", "share", "simulated"),
            Column("high_p50", "high p50", "text", "simulated"),
            Column("high_p99", "high p99", "text", "simulated"),
            Column("low_p50", "low p50", "text", "simulated"),
            Column("low_p99", "low p99", "text", "simulated"),
        ],
        "A row by power policy",
        notes=[
            "Latencies: end to end over those of a request alone, against the same row with nobody at the clocks.",
            "Capped: share of the time at less than the full clock.",
        ],
    )
    for result in results:
        name = "nobody at the clocks" if result.spec.policy is None else result.spec.policy.name
        less = lost(result, free)
        changes = [f"{value:+.2%}" for value in (less.high_p50, less.high_p99, less.low_p50, less.low_p99)]
        table.add(
            name, result.peak_share, result.mean_share, result.counters.brakes, result.capped["low"],
            result.capped["high"], *changes,
        )  # fmt: skip
    return table


def headroom_table(found: Sequence[Headroom]) -> Table:
    """How many servers by policy."""
    table = Table(
        [
            Column("policy", "policy"),
            Column("servers", "servers within the limits", "count", "simulated"),
            Column("more", "more than the budget's", "share", "simulated"),
            Column("unbraked", "servers without a brake", "count", "simulated"),
            Column("peak", "peak of budget", "share", "simulated"),
        ],
        "Headroom in the busiest three hours",
    )
    for one in found:
        table.add(one.policy, one.servers, one.more, one.without_brakes, one.peak_share)
    return table
