"""The block zoo and the decisions of a fleet that serves blocks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.policy.block_zoo import make_zoo
from megalith.policy.blocks import DeviceFacts, HopFacts, QueueFacts, begins_ahead, hop_cost_ns, next_hop, place, turn
from megalith.specs.blocks import ZooSpec

hops = st.lists(st.builds(HopFacts, *[st.integers(0, 9)] * 5), min_size=1, max_size=6)


@given(st.integers(0, 50))
def test_a_block_below_the_threshold_is_kept_apart(seed: int) -> None:
    spec = ZooSpec()
    zoo = make_zoo(spec, "blocks", seed)
    for application, chain in zip(zoo.applications, zoo.chains, strict=True):
        assert [zoo.units[number].first for number in chain] == list(range(spec.blocks))
        for number, cosine in zip(chain, application.cosines, strict=True):
            assert zoo.units[number].base == application.base
            assert (zoo.units[number].owner == application.id) == (cosine < spec.cosine)


@given(st.integers(0, 50), st.floats(0.0, 3.0))
def test_what_is_stored_shrinks_with_sharing_and_shares_add_up(seed: int, skew: float) -> None:
    zoos = [make_zoo(ZooSpec(skew=skew), sharing, seed) for sharing in ("model", "parameters", "blocks")]
    sizes = [sum(unit.blocks for unit in zoo.units) for zoo in zoos]
    assert sizes[0] == 20 * 4
    assert sizes[0] > sizes[1] >= sizes[2]
    for zoo in zoos:
        assert sum(one.weight for one in zoo.applications) == pytest.approx(1.0)
        assert sum(unit.share * unit.blocks for unit in zoo.units) == pytest.approx(4.0)
    assert zoos[0].pick(0.0) == 0
    assert zoos[0].pick(0.999999) in range(20)


def test_between_two_thresholds_the_base_stands_in() -> None:
    zoo = make_zoo(ZooSpec(merge_cosine=1.0), "blocks", 3)
    own = [unit for unit in zoo.units if unit.owner >= 0 and unit.stand_ins]
    assert own
    for unit in own:
        (other,) = unit.stand_ins
        assert (zoo.units[other].base, zoo.units[other].first, zoo.units[other].owner) == (unit.base, unit.first, -1)
        assert zoo.applications[unit.owner].cosines[unit.first] >= 0.98


@given(hops)
def test_the_next_hop_is_the_cheapest(options: list[HopFacts]) -> None:
    chosen = options[next_hop(options)]
    costs = [one.queue_ns + min(one.transfer_ns, one.recompute_ns) + one.network_ns + one.later_ns for one in options]
    assert hop_cost_ns(chosen) == min(costs)
    assert options[next_hop(options, coordinated=False)].queue_ns == min(one.queue_ns for one in options)


def test_who_has_the_kv_is_next_until_its_queue_is_longer_than_bringing_it() -> None:
    other = HopFacts(0, 50, 90, 5)
    assert next_hop([HopFacts(55, 0, 0, 0), other]) == 0
    assert next_hop([HopFacts(56, 0, 0, 0), other]) == 1


def test_an_instance_goes_near_its_chain_unless_that_is_full_or_busy() -> None:
    near, far = DeviceFacts(100, 0, 5.0, 1.0), DeviceFacts(100, 0, 0.0, 0.0)
    assert place([far, near], 10, 10, 100, 9.0, True) == 1
    assert place([far, near], 10, 10, 100, 9.0, False) == 0
    assert place([far, near], 10, 10, 100, 4.0, True) == 0
    assert place([far, near._replace(free_bytes=19)], 10, 10, 100, 9.0, True) == 0
    assert place([far, near], 101, 0, 200, 9.0, True) is None
    assert place([far, near], 10, 10, 9, 9.0, True) is None


def test_nothing_begins_ahead_in_time_that_somebody_wants() -> None:
    assert begins_ahead(0, 0, False, 1, 4)
    assert not begins_ahead(1, 0, False, 1, 4)
    assert not begins_ahead(0, 1, False, 1, 4)
    assert not begins_ahead(0, 0, True, 1, 4)
    assert not begins_ahead(0, 0, False, 4, 4)


def test_a_device_goes_on_along_a_chain_and_then_to_who_waited_longest() -> None:
    queues = [QueueFacts("a", 2, 7, 0), QueueFacts("a", 1, 6, 90), QueueFacts("b", 3, 9, 50), QueueFacts("b", 0, 8, 60)]
    assert turn(queues, ("a", 0, 5)) == 1
    assert turn(queues, ("a", 1, 6)) == 0
    assert turn(queues, ("b", 3, 9)) == 1
    assert turn(queues[2:], ("a", 3, 1)) == 1


@pytest.mark.parametrize("change", [{"blocks": 9}, {"applications": 0}, {"cosine": 2.0}, {"skew": -1.0}, {"bases": ()}])
def test_a_zoo_that_cannot_be_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        ZooSpec(**change)  # type: ignore[arg-type]
