"""Policies by name: everything that ships can be made from its name alone, and mistakes are told apart."""

from __future__ import annotations

import pytest

from megalith.base.errors import ConfigError
from megalith.policy.cluster import Controller, Router
from megalith.policy.registry import CONTROLLERS, ROUTERS, controller, describe, router
from megalith.specs.fleet import FleetSpec, PolicySpec, PoolSpec


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_is_made_from_its_name(name: str) -> None:
    made: Router = router(PolicySpec(name=name), 7)
    assert made.name == name
    assert callable(made.route)


@pytest.mark.parametrize("name", CONTROLLERS)
def test_a_controller_is_made_from_its_name(name: str) -> None:
    made: Controller = controller(PolicySpec(name=name), 7)
    assert made.name == name
    assert made.listens
    assert ("tick" in made.listens) == (made.period_ns is not None)


def test_two_of_a_name_share_nothing() -> None:
    assert router(PolicySpec(name="round-robin"), 0) is not router(PolicySpec(name="round-robin"), 0)


def test_the_default_router_of_a_fleet_exists() -> None:
    pool = PoolSpec(name="all", device="h100-sxm", count=1)
    assert FleetSpec(pools=(pool,)).router.name in ROUTERS


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("least-outstandng", {}, "Did you mean `least-outstanding`?"),
        ("power-of-two", {"bye": "tokens"}, "Did you mean `by`?"),
        ("power-of-two", {"by": "luck"}, "Options of the router power-of-two"),
        ("prefix-aware", {"overlap_weight": "much"}, "Expected `float`"),
        ("round-robin", {"retry_s": 0}, "retry_s must be above 0"),
        ("round-robin", {"transfer": "pigeon"}, "pigeon"),
    ],
)
def test_a_mistake_is_told_with_the_nearest_thing_that_works(name: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        router(PolicySpec(name=name, options=options), 0)
    assert said in str(error.value)


def test_a_router_among_the_controllers_is_told_apart() -> None:
    with pytest.raises(ConfigError, match="rebalance is a controller, not a router"):
        router(PolicySpec(name="rebalance"), 0)
    with pytest.raises(ConfigError, match="acts as a controller by itself"):
        controller(PolicySpec(name="splitwise"), 0)
    with pytest.raises(ConfigError, match="Did you mean `rebalance`"):
        controller(PolicySpec(name="rebalanced"), 0)
    with pytest.raises(ConfigError, match="Did you mean `threshold`"):
        controller(PolicySpec(name="rebalance", options={"treshold": 3}), 0)


def test_describe_has_a_line_a_source_and_the_options_of_each() -> None:
    described = {entry.name: entry for entry in describe()}
    assert set(described) == set(ROUTERS) | set(CONTROLLERS)
    for entry in described.values():
        assert entry.summary
        assert len(f"{entry.name}  {entry.summary}") <= 100
        assert entry.source
    assert described["power-of-two"].options == {
        "transfer": "push", "retry_s": 0.1, "patience_s": 60.0, "by": "outstanding",
    }  # fmt: skip
