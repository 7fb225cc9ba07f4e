"""The router by-priority: each priority in its own pools, evenly, and elsewhere only when nobody there accepts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from megalith.base.errors import ConfigError
from megalith.policy.cluster import Defer, Route
from megalith.policy.facts import Request
from megalith.policy.registry import router
from megalith.sim.fluid_load import pick_servers
from megalith.specs.fleet import PolicySpec
from tests.policy.facts import Facts, Seen, many


def request(number: int, priority: int) -> Request:
    return Request(number, 0, 100, 10, priority, ())


VIEW = Seen(many(*[Facts(pool="low") for _ in range(3)], *[Facts(pool="high") for _ in range(5)]))


def placed(view: Seen, priorities: list[int], seed: int = 4) -> list[int]:
    mine = router(PolicySpec(name="by-priority"), seed)
    found = []
    for number, priority in enumerate(priorities):
        placement = mine.route(request(number, priority), view)
        assert isinstance(placement, Route)
        found.append(placement.instance)
    return found


def test_each_priority_is_spread_over_its_own_pool() -> None:
    low, high = Counter(placed(VIEW, [0] * 600)), Counter(placed(VIEW, [1] * 600))
    assert set(low) == {0, 1, 2}
    assert set(high) == {3, 4, 5, 6, 7}
    assert min(low.values()) > 150
    assert min(high.values()) > 80


def test_draws_of_one_priority_do_not_move_those_of_the_other() -> None:
    mixed = placed(VIEW, [0, 1, 1, 0, 1, 0])
    assert [mixed[i] for i in (0, 3, 5)] == placed(VIEW, [0] * 3)
    assert [mixed[i] for i in (1, 2, 4)] == placed(VIEW, [1] * 3)


def test_the_fluid_simulation_draws_the_same_servers() -> None:
    for priority, (first, count) in enumerate([(0, 3), (3, 5)]):
        assert (np.array(placed(VIEW, [priority] * 500)) == first + pick_servers(4, priority, 0, 500, count)).all()


def test_any_instance_helps_when_nobody_of_the_pool_accepts() -> None:
    only_high = Seen(many(Facts(pool="high"), Facts(pool="high")))
    assert set(placed(only_high, [0] * 50)) == {0, 1}
    assert isinstance(router(PolicySpec(name="by-priority"), 0).route(request(0, 0), Seen()), Defer)


def test_pools_must_be_named() -> None:
    with pytest.raises(ConfigError, match="at least one pool"):
        router(PolicySpec(name="by-priority", options={"low": []}), 0)
