"""Beginning ahead: a surrogate's output lets the next block begin before the true one has crossed servers.

Knows which rows were begun so, and what becomes of them when the truth is there; must not know how rows are sent.
"""

from __future__ import annotations

from collections.abc import Callable

from megalith.base.random import uniform
from megalith.cost.timer import PS_PER_NS
from megalith.policy import blocks as decide
from megalith.sim.block_parts import Instance, Row, Trial
from megalith.sim.block_result import BlockCounters
from megalith.specs.blocks import BlockScenario

_TRIAL = 12
"""Stream of draws: whether a surrogate was right."""


class Ahead:
    """`send(source, target, rows)`, `advance(rows, instance)`, `arrived(rows, target)` and `queue(row, instance)` are
    what a run does with rows."""

    def __init__(
        self,
        scenario: BlockScenario,
        counters: BlockCounters,
        send: Callable[[Instance, Instance, list[Row]], object],
        advance: Callable[[list[Row], Instance], object],
        arrived: Callable[[list[Row], Instance], object],
        queue: Callable[[Row, Instance], object],
    ) -> None:
        self._scenario, self._counters = scenario, counters
        self._send, self._advance, self._arrived, self._put = send, advance, arrived, queue
        self._trials = 0

    def rows(self, instance: Instance, rows: list[Row], duration_ps: int) -> list[Row]:
        """Those of a step whose next block may begin on what a surrogate says."""
        device = instance.device
        surrogate_ns = round(duration_ps * self._scenario.surrogate_share) // PS_PER_NS
        queued = device.queued()
        found = []
        for row in rows:
            after = row.place + 1
            if row.trial is not None or row.computes > 1 or after == len(row.owners):
                continue
            target = row.owners[after].device
            if target.server != device.server and decide.begins_ahead(
                queued, target.queued(), target.running, surrogate_ns, duration_ps // PS_PER_NS
            ):
                found.append(row)
        return found

    def send(self, event: tuple[Instance, list[Row]]) -> None:
        """(instance, rows): what a surrogate made of these goes to the next blocks."""
        instance, rows = event
        onward: dict[Instance, list[Row]] = {}
        for row in rows:
            self._trials += 1
            right = uniform(self._scenario.seed * 16 + _TRIAL, self._trials) < self._scenario.surrogate_accuracy
            row.trial = Trial(right)
            row.place += 1
            onward.setdefault(row.owners[row.place], []).append(row)
        self._counters.trials += len(rows)
        for target, found in onward.items():
            self._send(instance, target, found)

    def truth(self, rows: list[Row], target: Instance) -> None:
        """The true output is there."""
        waiting = set(target.queue)
        through = []
        for row in rows:
            trial = row.trial
            assert trial is not None
            if trial.right or row in waiting:  # who has not begun begins on the true one
                row.trial = None
                if trial.done:
                    through.append(row)
            else:
                self._counters.redone += 1
                if trial.done:
                    row.trial = None
                    self._arrived([row], target)
                else:
                    trial.state = "redo"
        if through:
            self._advance(through, target)

    def stands(self, row: Row, instance: Instance) -> bool:
        """Whether a row that is through with a step may go on."""
        trial = row.trial
        if trial is None:
            return True
        if trial.state == "redo":
            row.trial = None
            self._put(row, instance)
        else:
            trial.done = True
        return False
