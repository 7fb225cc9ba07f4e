"""Operator graphs: a step as operators that wait for each other and share places; when each of them runs.

Where the operators of a step follow each other on one device, a step is a sum (cost/compute.py). Where they overlap on
one device (NanoFlow), or run on several (attention on other devices, in storage, stages of a pipeline), it is a graph:
every operator runs at one *place*, of which it takes a share, for a time that is known for that share, after the
operators that it waits for. `schedule` places them in time; `check` proves that nothing waits wrongly or takes more
than there is. Pure and in whole picoseconds: the same graph has the same schedule on every machine.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

from megalith.base.errors import ConfigError

WHOLE: Final = 1_000
"""Shares are thousandths, so that sums of them have no rounding."""


class Op(NamedTuple):
    """One operator. Its number is its position in the graph."""

    name: str
    at: str
    """The place it occupies while it runs: a device, a link, one head of a drive."""
    duration_ps: int
    """With that share of the place."""
    after: tuple[int, ...] = ()
    """Numbers of operators that must have ended; all of them smaller than its own."""
    share: int = WHOLE
    uses: Mapping[str, float] = {}
    """Physical resources (compute, memory, link) that it keeps busy while it runs, as fractions: for occupancy."""
    tokens: tuple[int, int] = (0, 0)
    """Rows of the step that it computes, first and past the last."""


class Schedule(NamedTuple):
    """When each operator of a graph runs, in picoseconds from the start of the step."""

    start_ps: tuple[int, ...]
    end_ps: tuple[int, ...]

    @property
    def makespan_ps(self) -> int:
        """Duration of the step."""
        return max(self.end_ps, default=0)


class Moment(NamedTuple):
    """A stretch of time in which nothing begins or ends."""

    start_ps: int
    end_ps: int
    value: float


def schedule(ops: Sequence[Op]) -> Schedule:
    """Start every operator as soon as all it waits for has ended and its place has the share that it takes.

    Among those that are ready at one place the smaller number goes first, and a later one may pass one that needs more
    than is free. Nothing that runs is stopped. Raises ConfigError for a graph that cannot be.
    """
    _check_graph(ops)
    followers: dict[int, list[int]] = defaultdict(list)
    missing = [len(op.after) for op in ops]
    ready: dict[str, list[int]] = defaultdict(list)
    for number, op in enumerate(ops):
        for before in op.after:
            followers[before].append(number)
        if not op.after:
            ready[op.at].append(number)
    free: dict[str, int] = defaultdict(lambda: WHOLE)
    start, end = [0] * len(ops), [0] * len(ops)
    running: list[tuple[int, int]] = []
    now_ps, places = 0, set(ready)
    while True:
        for place in places:
            _begin(ops, ready[place], free, now_ps, start, end, running)
        if not running:
            return Schedule(tuple(start), tuple(end))
        now_ps, places = running[0][0], set()
        while running and running[0][0] == now_ps:
            _, number = heapq.heappop(running)
            free[ops[number].at] += ops[number].share
            places.add(ops[number].at)
            for follower in followers[number]:
                missing[follower] -= 1
                if not missing[follower]:
                    heapq.heappush(ready[ops[follower].at], follower)
                    places.add(ops[follower].at)


def critical_ps(ops: Sequence[Op]) -> int:
    """The longest chain of operators: no schedule is shorter."""
    ends: list[int] = []
    for op in ops:
        ends.append(op.duration_ps + max((ends[before] for before in op.after), default=0))
    return max(ends, default=0)


def work_ps(ops: Iterable[Op]) -> dict[str, float]:
    """How long every place is busy at least, share by share: no schedule is shorter than any of them."""
    work: dict[str, float] = defaultdict(float)
    for op in ops:
        work[op.at] += op.duration_ps * op.share / WHOLE
    return dict(work)


def occupancy(ops: Sequence[Op], plan: Schedule, resource: str, *, place: str | None = None) -> list[Moment]:
    """How busy a physical resource is over time, of all operators or of those at one place; gaps are 0."""
    uses = [op.uses.get(resource, 0.0) if place in (None, op.at) else 0.0 for op in ops]
    return _profile(uses, plan)


def check(ops: Sequence[Op], plan: Schedule, *, slack: float = 1e-9) -> None:
    """Raise ValueError when an operator begins before what it waits for, or a place or resource is above 1."""
    for number, op in enumerate(ops):
        if plan.end_ps[number] - plan.start_ps[number] != op.duration_ps:
            raise ValueError(f"operator {number} ({op.name}) does not take its {op.duration_ps} ps")
        for before in op.after:
            if plan.end_ps[before] > plan.start_ps[number]:
                raise ValueError(f"operator {number} ({op.name}) begins before {before} ({ops[before].name}) ends")
    for place in {op.at for op in ops}:
        shares = [op.share / WHOLE if op.at == place else 0.0 for op in ops]
        resources = {name for op in ops if op.at == place for name in op.uses}
        loads = {place: _profile(shares, plan)}
        loads |= {f"{name} of {place}": occupancy(ops, plan, name, place=place) for name in resources}
        for name, moments in loads.items():
            worst = max(moments, key=lambda moment: moment.value, default=None)
            if worst is not None and worst.value > 1.0 + slack:
                raise ValueError(f"{name} is {worst.value:.4f} times full at {worst.start_ps} ps")


def _begin(
    ops: Sequence[Op], waiting: list[int], free: dict[str, int], now_ps: int, start: list[int], end: list[int],
    running: list[tuple[int, int]],
) -> None:  # fmt: skip
    """Start what fits of those that wait at one place, in order."""
    passed: list[int] = []
    while waiting:
        number = heapq.heappop(waiting)
        op = ops[number]
        if op.share > free[op.at]:
            passed.append(number)
            if not free[op.at]:
                break
            continue
        free[op.at] -= op.share
        start[number], end[number] = now_ps, now_ps + op.duration_ps
        heapq.heappush(running, (end[number], number))
    for number in passed:
        heapq.heappush(waiting, number)


def _profile(values: Sequence[float], plan: Schedule) -> list[Moment]:
    changes: dict[int, float] = defaultdict(float)
    for value, start, end in zip(values, plan.start_ps, plan.end_ps, strict=True):
        if start < end:
            changes[start] += value
            changes[end] -= value
    times = sorted(changes)
    level, moments = 0.0, []
    for begin, finish in pairwise(times):
        level += changes[begin]
        moments.append(Moment(begin, finish, max(level, 0.0)))
    return moments


def _check_graph(ops: Sequence[Op]) -> None:
    for number, op in enumerate(ops):
        if any(not 0 <= before < number for before in op.after):
            raise ConfigError(
                f"Operator {number} ({op.name}) waits for {op.after}, but only those before it can be waited for.",
                "List operators in an order in which they could run.",
            )
        if len(set(op.after)) < len(op.after) or op.duration_ps < 0 or not 0 < op.share <= WHOLE:
            raise ConfigError(
                f"Operator {number} ({op.name}) of {op.duration_ps} ps with {op.share} thousandths after {op.after} "
                "cannot be.",
                f"Give it a time of at least 0, a share of 1 to {WHOLE}, and each operator before it once.",
            )
