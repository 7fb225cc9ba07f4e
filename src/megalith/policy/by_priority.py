"""The router `by-priority`: requests of low and of high priority on pools of their own.

Knows pools by name and the priority of a request. Power policies slow scopes, and a scope is a pool: so whoever wants
to spare the high priority keeps it apart (POLCA, ASPLOS 2024).
"""

from __future__ import annotations

from collections.abc import Sequence

from mypy_extensions import mypyc_attr

from megalith.base.random import splitmix64
from megalith.policy.cluster import InstanceFacts
from megalith.policy.facts import Request
from megalith.policy.router_options import RouterOptions, require
from megalith.policy.routing import RuleRouter


class ByPriorityOptions(RouterOptions):
    """Which pools are whose; the names are those that power policies take."""

    low: tuple[str, ...] = ("low",)
    """Pools for priority 0."""
    high: tuple[str, ...] = ("high",)
    """Pools for anything above."""

    def __post_init__(self) -> None:
        require(bool(self.low) and bool(self.high), "low and high need at least one pool each")


@mypyc_attr(allow_interpreted_subclasses=True)
class ByPriority(RuleRouter):
    """Any instance of the pools of the request's priority, with equal chances, from the seed.

    Where none of those accepts it may be any instance. Each priority has draws of its own, so that requests of one do
    not move those of the other. The draws are those of sim/fluid_load.py.
    """

    name = "by-priority"

    def __init__(self, options: ByPriorityOptions, seed: int = 0) -> None:
        super().__init__(options, seed)
        self._pools = (frozenset(options.low), frozenset(options.high))
        self._streams = (splitmix64(seed, 0), splitmix64(seed, 1))
        self._draws = [0, 0]

    def pick(self, request: Request, instances: Sequence[InstanceFacts]) -> InstanceFacts:
        """One draw of the priority's counter. O(instances)."""
        priority = 1 if request.priority > 0 else 0
        pools = self._pools[priority]
        mine = [facts for facts in instances if facts.pool in pools] or instances
        self._draws[priority] += 1
        return mine[splitmix64(self._streams[priority], self._draws[priority]) * len(mine) >> 64]
