"""ExpertsPlans in words and tables, for the terminal. Only layout and shares."""

from __future__ import annotations

from collections.abc import Mapping

from megalith.base.units import format_bytes
from megalith.plan.experts import ExpertsPlan, ExpertsQuestion
from megalith.report.table import Column, Table


def headline(plan: ExpertsPlan, question: ExpertsQuestion) -> str:
    """What was asked."""
    popular = "uniform" if not question.zipf else f"Zipf {question.zipf:g}"
    router = "a router of the same size before it" if question.router else "no router"
    return (
        f"{plan.count:,} models of the shape of {plan.model}, {format_bytes(plan.weight_bytes)} each, "
        f"{format_bytes(plan.total_bytes)} together; {popular} popularity; a batch of {question.batch:,} with "
        f"{question.prompt_tokens:,} prompt and {question.output_tokens:,} answer tokens, {router} (predicted)"
    )


def tier_table(plans: Mapping[str, ExpertsPlan]) -> Table:
    """Where the models are."""
    table = Table(
        [
            Column("node", "node"),
            Column("device_bytes", "device memory for models", "bytes", "predicted"),
            Column("slots", "models there", "count", "predicted"),
            Column("host_slots", "models in host memory", "count", "predicted"),
            Column("nodes_on_device", "nodes to hold all on devices", "count", "predicted"),
            Column("nodes_in_host", "in host memory", "count", "predicted"),
            Column("switch_ns", "switch", "duration_ns", "predicted"),
        ],
        "Tiers",
    )
    for name, plan in plans.items():
        table.add(name, plan.device_bytes, plan.slots, plan.host_slots, plan.nodes_on_device, plan.nodes_in_host,
                  plan.switch_ns)  # fmt: skip
    table.notes += [f"{name}: {plan.source}" for name, plan in plans.items()]
    return table


def latency_table(plans: Mapping[str, ExpertsPlan]) -> Table:
    """Where the time of a batch goes."""
    table = Table(
        [
            Column("node", "node"),
            Column("hit_rate", "hits", "share", "predicted"),
            Column("router_ns", "router", "duration_ns", "predicted"),
            Column("switch_ns", "switching", "duration_ns", "predicted"),
            Column("prompt_ns", "prompts", "duration_ns", "predicted"),
            Column("decode_ns", "decode", "duration_ns", "predicted"),
            Column("total_ns", "batch", "duration_ns", "predicted"),
            Column("switch_share", "switching", "share", "predicted"),
        ],
        "Latency of a batch",
    )
    for name, plan in plans.items():
        parts = plan.parts
        table.add(name, plan.hit_rate, parts.router_ns, parts.switch_ns, parts.prompt_ns, parts.decode_ns,
                  parts.total_ns, parts.switch_ns / parts.total_ns)  # fmt: skip
    table.notes.append(
        "latency = router + misses x switch + models x (prompt + decode); hits by Che's approximation of an LRU cache."
    )
    return table


def hit_table(plans: Mapping[str, ExpertsPlan]) -> Table:
    """The same batch at other hit rates."""
    rates = sorted({rate for plan in plans.values() for rate, _ in plan.by_hit_rate if rate * 100 % 5 == 0})
    table = Table(
        [Column("node", "node"), *[Column(f"hit_{rate:g}", f"{rate:.0%} hits", "duration_ns", "predicted")
                                   for rate in rates]],
        "Latency by hit rate",
    )  # fmt: skip
    for name, plan in plans.items():
        known = dict(plan.by_hit_rate)
        table.add(name, *[known[rate] for rate in rates])
    return table
