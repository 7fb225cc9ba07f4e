"""Failures: who fails when, what becomes of requests and moves, and stragglers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.base.units import NS_PER_S
from megalith.policy.cluster import Event, InstanceId, Migrate
from megalith.policy.facts import Request, RequestId
from megalith.sim.faults import NS_PER_H, Faults
from megalith.sim.kernel import Kernel
from megalith.specs.fleet import FaultSpec, LinkSpec
from tests.sim.small_cluster import STEP_NS, SmallCluster
from tests.sim.test_transfer import handed


class Machines:
    """Instances that only fail and come back."""

    def __init__(self, count: int, hours: float) -> None:
        self.kernel = Kernel()
        self.end_ns = round(hours * NS_PER_H)
        self.alive = dict.fromkeys(range(count), True)
        self.events: list[tuple[int, str, int]] = []

    def going_on(self) -> bool:
        return self.kernel.now_ns < self.end_ns

    def up(self) -> Sequence[InstanceId]:
        return [number for number, alive in self.alive.items() if alive]

    def fail(self, instance: InstanceId) -> Sequence[RequestId]:
        assert self.alive[instance]
        self.alive[instance] = False
        return []

    def requeue(self, request_id: RequestId) -> None:
        raise AssertionError("there are none")

    def restore(self, instance: InstanceId) -> bool:
        if instance not in self.alive:
            return False
        assert not self.alive[instance]
        self.alive[instance] = True
        return True

    def emit(self, event: Event) -> None:
        self.events.append((event.at_ns, event.kind, event.subject))

    def run(self, spec: FaultSpec, seed: int = 0) -> Faults:
        faults = Faults(self, None, spec, seed)
        faults.start()
        self.kernel.run()
        return faults


def test_failures_at_given_times_and_repairs() -> None:
    machines = Machines(3, hours=1)
    faults = machines.run(FaultSpec(at_s=(10.0, 20.5), repair_s=30.0))
    assert [(at_ns / NS_PER_S, kind) for at_ns, kind, _ in machines.events] == [
        (10.0, "down"), (20.5, "down"), (40.0, "up"), (50.5, "up")
    ]  # fmt: skip
    assert machines.events[0][2] != machines.events[1][2], "who is down cannot fail"
    assert (faults.counters.failures, faults.counters.repairs, faults.counters.down_ns) == (2, 2, 60 * NS_PER_S)


def test_when_all_are_down_nothing_fails() -> None:
    machines = Machines(1, hours=1)
    assert machines.run(FaultSpec(at_s=(10.0, 20.0), repair_s=30.0)).counters.failures == 1


def test_the_mean_time_between_failures_is_kept() -> None:
    machines = Machines(50, hours=100)
    faults = machines.run(FaultSpec(mtbf_h=2.0, repair_s=3600.0))
    # 50 instances, each fails every 2 + 1 hours on average: 1,667 expected, deviation about 30.
    assert 1500 < faults.counters.failures < 1830
    assert len({number for _, _, number in machines.events}) == 50


def test_the_same_seed_fails_the_same() -> None:
    runs = []
    for seed in (1, 1, 2):
        machines = Machines(5, hours=20)
        machines.run(FaultSpec(mtbf_h=2.0), seed)
        runs.append(machines.events)
    assert runs[0] == runs[1] != runs[2]


def test_a_life_that_another_failure_ended_ends_only_once() -> None:
    """With failures at given times in between, the drawn ones stay as many as their mean says."""
    machines = Machines(20, hours=100)
    at_s = tuple(float(second) for second in range(1000, 300_000, 3000))
    faults = machines.run(FaultSpec(mtbf_h=10.0, repair_s=0.0, at_s=at_s))
    drawn = faults.counters.failures - len(at_s)
    assert 140 < drawn < 260, "20 instances, 100 hours, one in 10 hours each: 200"


def test_nothing_fails_after_the_end_and_the_clock_stops() -> None:
    machines = Machines(5, hours=0.001)
    faults = machines.run(FaultSpec(mtbf_h=1000.0, at_s=(7200.0,)))
    assert faults.counters.failures == 0
    assert machines.kernel.now_ns <= machines.end_ns + NS_PER_S


def test_what_is_gone_is_not_repaired() -> None:
    machines = Machines(2, hours=1)
    faults = Faults(machines, None, FaultSpec(at_s=(10.0,), repair_s=30.0), 0)
    faults.start()
    machines.kernel.at(20 * NS_PER_S, lambda _: machines.alive.pop(machines.events[0][2]))
    machines.kernel.run()
    assert (faults.counters.failures, faults.counters.repairs) == (1, 0)


def test_power_meters_are_told_before_and_after() -> None:
    machines = Machines(1, hours=1)
    faults = Faults(machines, None, FaultSpec(at_s=(10.0,), repair_s=30.0), 0)
    seen: list[tuple[str, bool]] = []
    faults.before_failure = lambda number: seen.append(("before", machines.alive[number]))
    faults.after_repair = lambda number: seen.append(("after", machines.alive[number]))
    faults.start()
    machines.kernel.run()
    assert seen == [("before", True), ("after", True)]


def test_a_share_of_the_instances_are_stragglers_whatever_their_order() -> None:
    slowed = []
    for count in (400, 200):
        slow: dict[int, float] = {}
        machines = Machines(count, hours=1)
        faults = Faults(machines, None, FaultSpec(straggler_share=0.1, straggler_factor=1.5), 7, slow.__setitem__)
        faults.start()
        assert faults.counters.stragglers == len(slow)
        assert set(slow.values()) == {1.5}
        slowed.append(slow)
    assert 20 <= len(slowed[0]) <= 60
    assert slowed[1].keys() == {number for number in slowed[0] if number < 200}


@pytest.mark.parametrize("spec", [{"straggler_share": 1.5}, {"repair_s": -1.0}, {"mtbf_h": 0.0}])
def test_impossible_faults_are_refused(spec: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="cannot be"):
        Faults(Machines(1, 1), None, FaultSpec(**spec), 0)  # type: ignore[arg-type]


def test_stragglers_need_a_brake() -> None:
    with pytest.raises(ValueError, match="slow"):
        Faults(Machines(1, 1), None, FaultSpec(straggler_share=0.5, straggler_factor=2.0), 0)


# With real schedulers and moves


class Fragile:
    """A small cluster as the host of faults."""

    def __init__(self, cluster: SmallCluster, spec: FaultSpec, seed: int = 0) -> None:
        self.cluster = cluster
        self.kernel = cluster.kernel
        self.waiting: list[RequestId] = []
        self.faults = Faults(self, (cluster.handoffs, cluster.migrations), spec, seed)
        self.faults.start()

    def going_on(self) -> bool:
        return any(not job.ended for job in self.cluster.jobs.values()) or self.kernel.now_ns < 100 * STEP_NS

    def up(self) -> Sequence[InstanceId]:
        return [number for number, instance in self.cluster.instances.items() if instance.up]

    def fail(self, instance: InstanceId) -> Sequence[RequestId]:
        return self.cluster.fail(instance)

    def requeue(self, request_id: RequestId) -> None:
        up = self.up()
        if up:
            job = self.cluster.jobs[request_id]
            job.instance = up[request_id % len(up)]
            self.cluster.instances[job.instance].submit(job)
        else:
            self.waiting.append(request_id)

    def restore(self, instance: InstanceId) -> bool:
        self.cluster.restore(instance)
        waiting, self.waiting = self.waiting, []
        for request_id in waiting:
            self.requeue(request_id)
        return True

    def emit(self, event: Event) -> None:
        self.cluster.emit(event)


@given(
    at_us=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    repair_us=st.integers(1, 30),
    seed=st.integers(0, 2**32),
    moves=st.lists(st.tuples(st.integers(0, 80), st.integers(0, 7), st.integers(0, 2)), max_size=8),
)
@settings(max_examples=80, deadline=None)
def test_every_request_ends_with_all_its_tokens_whatever_fails(
    at_us: list[int], repair_us: int, seed: int, moves: list[tuple[int, int, int]]
) -> None:
    cluster = SmallCluster([24, 24, 24], link=LinkSpec(bytes_per_s=0.02e9))
    fragile = Fragile(cluster, FaultSpec(at_s=tuple(at * 1e-6 for at in at_us), repair_s=repair_us * 1e-6), seed)
    for number in range(8):
        at_ns = number * 3 * STEP_NS
        if number % 2:
            handed(
                cluster,
                number,
                12,
                20,
                "push" if number % 4 == 1 else "layerwise",
                at_ns,
                (number % 3, (number + 1) % 3),
            )
        else:
            cluster.kernel.at(at_ns, arrive_anywhere, (fragile, Request(number, at_ns, 12, 20)))
    for at, request_id, target in moves:
        cluster.kernel.at(at * STEP_NS, move, (cluster, request_id, target))
    cluster.kernel.run()
    cluster.settled()
    assert all(job.generated == 20 == len(job.token_ns) for job in cluster.jobs.values())
    counters = fragile.faults.counters
    assert counters.failures == sum(event.kind == "down" for event in cluster.events)
    assert counters.failures - counters.repairs == 3 - len(fragile.up())


def arrive_anywhere(arrival: tuple[Fragile, Request]) -> None:
    fragile, request = arrival
    up = fragile.up()
    if up:
        fragile.cluster.arrive(request, request.max_new_tokens, up[0])


def move(order: tuple[SmallCluster, int, int]) -> None:
    cluster, request_id, target = order
    job = cluster.jobs.get(request_id)
    if job is not None:
        cluster.migrate(Migrate(request_id, job.instance, target, last_blocks=1))
