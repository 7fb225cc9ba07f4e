"""A RanksPlan for people. Only words and layout."""

from __future__ import annotations

from megalith.base.units import format_bytes, format_duration
from megalith.plan.tensor_parallel import RanksPlan
from megalith.report.table import Column, Table


def memory_table(plan: RanksPlan) -> Table:
    """Memory of rank 0 and of any other, by item."""
    columns = [Column("item", "item"), Column("first", "rank 0", "bytes", "predicted")]
    if len(plan.memory) > 1:
        columns.append(Column("other", "every other rank", "bytes", "predicted"))
    table = Table(columns=(*columns, Column("formula", "how")), title=f"{plan.model} over {plan.ranks} ranks")
    others = {line.item: line.num_bytes for line in plan.memory[-1].lines}
    for line in plan.memory[0].lines:
        more = (others.get(line.item, 0),) if len(plan.memory) > 1 else ()
        table.add(line.item, line.num_bytes, *more, line.formula)
    table.add("needed", *(rank.num_bytes for rank in plan.memory),
              f"the whole model is {format_bytes(plan.weight_bytes)}")  # fmt: skip
    return table


def step_lines(plan: RanksPlan) -> list[str]:
    """What a decode step takes, and why."""
    lines = [
        f"A decode step takes {format_duration(plan.step_ns)} (predicted): the longer of compute "
        f"{format_duration(plan.compute_ns)} + links {format_duration(plan.link_ns)}, and disk "
        f"{format_duration(plan.disk_ns)} for {format_bytes(plan.stream_bytes)} on every rank (rate "
        f"{plan.disk_source})."
    ]
    if plan.ranks > 2:
        at = plan.crossover_ns or 0
        lines.append(f"Sums of one decode are faster by the star beyond {format_duration(at)} of latency (predicted).")
    elif plan.ranks == 2:
        lines.append("With two ranks star and ring have two hops each, and the ring sends half the bytes.")
    return lines
