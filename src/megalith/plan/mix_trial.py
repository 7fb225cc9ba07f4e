"""One simulated run of a mix: each request goes to a type by its group's shares, each type is a cluster of its own.

Types never exchange requests, so a run of each with its part of the load is a run of the whole. Within a group the
requests are dealt so that after every one of them each type is as near to its share as can be: no luck in it. Knows
how to run and what to read from results; must not know how a mix was found.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from megalith.base.units import NS_PER_S
from megalith.plan.fleet_question import FleetQuestion, Shape, Size
from megalith.plan.mix_table import Knows, group_key
from megalith.sim.attainment import AttainmentFigures
from megalith.sim.run import simulate
from megalith.specs.shape import RequestShape
from megalith.specs.workload import TraceSource, WorkloadSpec, open_workload


class MixTrial(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a mix under its load; simulated."""

    kept: bool
    requests: int
    good: float
    """Share of the requests within every bound."""
    shares: dict[str, float]
    """By promise: the share of the requests that keep it."""
    breaks: str
    """The promise with the least room, or most broken."""
    part: tuple[int, ...]
    """By type, the requests that it got."""


def run_mix(
    question: FleetQuestion,
    shapes: Sequence[Shape],
    counts: Sequence[int],
    knows: Knows,
    keys: Sequence[tuple[int, ...]],
    shares: Sequence[Sequence[float]],
) -> MixTrial:
    """Run it. `shares[group][type]`, `keys[group]` what the router sees of that group; types with a share have
    instances. The question's workload has an end."""
    parts = deal(list(open_workload(question.workload, question.seed)), knows, keys, shares)
    wanted: dict[str, float] = {}
    kept: dict[str, float] = {}
    good, total = 0, 0
    for shape, count, part in zip(shapes, counts, parts, strict=True):
        if not part:
            continue
        slo = _run_one(question, shape, count, part)
        total += len(part)
        good += slo.good
        for verdict in slo.verdicts:
            wanted[verdict.bound] = verdict.wanted_share
            kept[verdict.bound] = kept.get(verdict.bound, 0.0) + verdict.share * len(part)
    found = {bound: number / total for bound, number in kept.items()}
    return MixTrial(
        kept=all(found[bound] >= wanted[bound] - 1e-12 for bound in found), requests=total, good=good / total,
        shares=found, breaks=min(found, key=lambda bound: found[bound] - wanted[bound]),
        part=tuple(map(len, parts)),
    )  # fmt: skip


def deal(
    requests: Sequence[RequestShape], knows: Knows, keys: Sequence[tuple[int, ...]], shares: Sequence[Sequence[float]]
) -> list[list[RequestShape]]:
    """The requests of each type, in order of arrival. A size that no group has goes as the most similar group does."""
    groups = {key: group for group, key in enumerate(keys)}
    owed = [[0.0] * len(row) for row in shares]
    parts: list[list[RequestShape]] = [[] for _ in shares[0]]
    for request in requests:
        key = group_key(request.input_tokens, request.output_tokens, knows)
        if key not in groups:
            groups[key] = groups[min(keys, key=lambda known: sum(abs(a - b) for a, b in zip(known, key, strict=True)))]
        group = groups[key]
        credit = owed[group]
        for place, share in enumerate(shares[group]):
            credit[place] += share
        open_to = [place for place, share in enumerate(shares[group]) if share > 0]
        to = max(open_to, key=lambda place: credit[place])
        credit[to] -= 1
        parts[to].append(request)
    return parts


def _run_one(question: FleetQuestion, shape: Shape, count: int, part: Sequence[RequestShape]) -> AttainmentFigures:
    with tempfile.TemporaryDirectory(prefix="megalith-mix-") as folder:
        path = Path(folder) / "part.csv"
        rows = [
            f"{(one.at_ns or 0) // NS_PER_S}.{(one.at_ns or 0) % NS_PER_S:09d},{one.input_tokens},{one.output_tokens}"
            for one in part
        ]
        path.write_text("\n".join(["at_s,input_tokens,output_tokens", *rows, ""]), encoding="utf-8")
        workload = WorkloadSpec(
            name=question.workload.name, trace=TraceSource(path=str(path)), max_new=question.workload.max_new
        )
        scenario = question.scenario(shape.fleet(Size(count)), workload=workload)
        slo = simulate(scenario).figures.slo
    assert slo is not None
    return slo
