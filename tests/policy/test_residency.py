"""Any policy of residency, driven by any order: what is needed is there, the cap holds, loads and drops balance."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.base.errors import ConfigError, DoesNotFit
from megalith.policy.residency import (
    Change,
    LayerWindow,
    LruParts,
    NeuronWindow,
    ResidencyPolicy,
    SlidingWindow,
    TracedPrefetch,
)  # fmt: skip


class Near:
    """Near memory that does what it is told and complains."""

    def __init__(self, policy: ResidencyPolicy, size: Callable[[int], int], cap: int) -> None:
        self.policy, self.size, self.cap = policy, size, cap
        self.parts: set[int] = set()
        self.loads = self.drops = 0

    def need(self, *parts: int) -> Change:
        change = self.policy.need(*parts)
        assert set(change.drop) <= self.parts
        assert len(set(change.drop)) == len(change.drop)
        self.parts -= set(change.drop)
        for part in change.load:
            assert part not in self.parts
            self.parts.add(part)
            assert sum(map(self.size, self.parts)) <= self.cap
        assert set(parts) <= self.parts
        now = [part for part in change.load if part in parts]
        assert change.load[: len(now)] == tuple(now), "what is needed now comes first"
        assert self.parts == set(self.policy.resident)
        self.loads += len(change.load)
        self.drops += len(change.drop)
        assert self.loads - self.drops == len(self.parts)
        return change


def one(_: int) -> int:
    return 1


@given(data=st.data())
def test_layer_windows(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 9))
    k = data.draw(st.integers(1, 12))
    keep = data.draw(st.sets(st.integers(0, count - 1)))
    policy = LayerWindow(count, k, data.draw(st.integers(1, k)), keep)
    near = Near(policy, one, policy.cap)
    for _ in range(3):
        for part in range(count):
            near.need(part)
    for part in data.draw(st.lists(st.integers(0, count - 1), max_size=20)):
        near.need(part)


@given(data=st.data())
def test_windows_that_walk_up_and_down(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 9))
    k = data.draw(st.integers(1, 12))
    keep = data.draw(st.sets(st.integers(0, count - 1)))
    policy = LayerWindow(count, k, data.draw(st.integers(1, k)), keep, turns=True)
    near = Near(policy, one, policy.cap)
    moving = count - len(keep)
    for _ in range(3):
        begun = near.loads
        for part in [*range(count), *reversed(range(count))]:
            near.need(part)
    if moving:
        assert near.loads - begun == 2 * max(0, moving - policy.k), "at both ends nothing is loaded"
    for part in data.draw(st.lists(st.integers(0, count - 1), max_size=20)):
        near.need(part)


def test_superpipelines_window_walks_down_again() -> None:
    near = Near(LayerWindow(8, k=4, k_prime=2, turns=True), one, 4)
    loads = [near.need(part).load for part in [*range(8), *reversed(range(8)), *range(3)]]
    assert loads[:8] == [(0, 1, 2, 3), (), (4, 5), (), (6, 7), (), (), ()]
    assert loads[8:] == [(), (), (3, 2), (), (1, 0), (), (), (), (), (), (4, 5)]


def test_superpipelines_window_moves_k_prime_layers_at_a_time() -> None:
    near = Near(LayerWindow(8, k=4, k_prime=2), one, 4)
    changes = [near.need(part) for part in [*range(8), 0]]
    assert changes[0] == Change((), (0, 1, 2, 3))
    assert changes[1] == Change()
    assert changes[2] == Change((0, 1), (4, 5))
    assert changes[4] == Change((2, 3), (6, 7))
    assert changes[6] == Change((4, 5), (0, 1)), "the next step begins while this one ends"
    assert changes[8] == Change((6, 7), (2, 3))


def test_a_window_as_long_as_its_stride_loads_everything_when_it_is_needed() -> None:
    near = Near(LayerWindow(4, k=2, k_prime=2), one, 2)
    assert [near.need(part).load for part in [0, 1, 2, 3, 0]] == [(0, 1), (), (2, 3), (), (0, 1)]


def test_a_sliding_window_streams_only_what_is_not_kept() -> None:
    near = Near(SlidingWindow(6, 2, keep=(0, 3)), one, 4)
    for _ in range(5):
        for part in range(6):
            near.need(part)
    assert near.loads == 2 + 2 + 5 * 4 - 1, "kept ones once; the others once a step, less those not yet needed"


def test_a_model_that_fits_is_loaded_once() -> None:
    near = Near(LayerWindow(5, k=9), one, 5)
    for part in [*range(5), *range(5)]:
        near.need(part)
    assert near.loads == 5


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=8), min_size=1, max_size=6),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_traced_prefetch_in_any_orders(steps: list[list[int]], near_ahead: int, more: int) -> None:
    policy = TracedPrefetch(near_ahead, near_ahead + more)
    near, staged = Near(policy, one, policy.cap), set[int]()
    for step in steps:
        policy.begin()
        for part in step:
            change = near.need(part)
            assert set(change.unstage) <= staged
            staged -= set(change.unstage)
            assert not staged & set(change.stage)
            staged |= set(change.stage)
            assert staged == set(policy.staged)
            assert len(staged) <= policy.cap_staged
            assert near.parts <= staged, "what is near came through the middle"


def test_a_traced_order_is_prefetched_and_a_new_one_traced_anew() -> None:
    policy = TracedPrefetch(near=1, far=2)
    order = [3, 1, 2, 0]

    def step(parts: list[int]) -> list[Change]:
        policy.begin()
        return [policy.need(part) for part in parts]

    assert [change.load for change in step(order)] == [(3,), (1,), (2,), (0,)], "on demand"
    second = step(order)
    assert [change.load for change in second] == [(3, 1), (2,), (0,), (3,)], "one ahead"
    assert [change.stage for change in second] == [(3, 1, 2), (0,), (3,), (1,)], "two ahead, from disk"
    assert [change.load for change in step([3, 2, 1, 0])] == [(1,), (2,), (1,), (0,)], (
        "another order: on demand from there"
    )
    assert step([3, 2, 1, 0])[1].load == (1,)


@given(st.lists(st.sets(st.integers(0, 20), max_size=6), max_size=30), st.integers(1, 5), st.integers(6, 12))
def test_neuron_windows(tokens: list[set[int]], window: int, cap: int) -> None:
    near = Near(NeuronWindow(window, cap), one, cap)
    for at, active in enumerate(tokens):
        near.need(*active)
        recent = set[int]().union(*tokens[max(0, at - window + 1) : at + 1])
        assert near.parts <= recent
        if len(recent) <= cap:
            assert near.parts == recent


def test_a_neuron_window_reads_only_what_is_new() -> None:
    near = Near(NeuronWindow(2, 10), one, 10)
    assert near.need(1, 2, 3).load == (1, 2, 3)
    assert near.need(2, 3, 4) == Change((), (4,))
    assert near.need(3, 4) == Change((1,), ())
    with pytest.raises(DoesNotFit, match="11 neurons are active, and 10 fit"):
        near.need(*range(11))


@given(
    st.lists(st.integers(0, 5), min_size=6, max_size=6), st.lists(st.sets(st.integers(0, 5), max_size=4), max_size=30)
)
def test_lru_of_sizes(sizes: list[int], asked: list[set[int]]) -> None:
    near = Near(LruParts(sizes, 11), sizes.__getitem__, 11)
    for parts in asked:
        before = set(near.parts)
        if sum(sizes[part] for part in parts) > 11:
            with pytest.raises(DoesNotFit):
                near.need(*parts)
            assert set(near.policy.resident) == before
        else:
            near.need(*parts)


def test_lru_drops_the_longest_unused() -> None:
    near = Near(LruParts([1] * 9, 3), one, 3)
    near.need(0, 1, 2)
    near.need(0)
    assert near.need(5) == Change((1,), (5,))


@pytest.mark.parametrize(
    "build",
    [
        lambda: LayerWindow(4, 2, 3), lambda: LayerWindow(0, 1), lambda: LayerWindow(2, 1, keep=[5]),
        lambda: TracedPrefetch(3, 2), lambda: NeuronWindow(0, 1),
    ],
)  # fmt: skip
def test_windows_that_cannot_be_are_refused(build: Callable[[], object]) -> None:
    with pytest.raises(ConfigError, match="cannot be"):
        build()


def test_without_a_window_every_layer_is_loaded_in_every_step() -> None:
    """The control. A larger window loads no less as long as it slides, only earlier; one that holds all loads once."""
    for k, loads in [(1, 32), (4, 35), (7, 38), (8, 8)]:
        near = Near(LayerWindow(8, k), one, k)
        for part in [*range(8)] * 4:
            near.need(part)
        assert near.loads == loads
