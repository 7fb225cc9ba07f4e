"""Transfers share ports max-min fairly; every byte arrives once, and never faster than the ports allow."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.base.units import NS_PER_S
from megalith.sim.kernel import Kernel
from megalith.sim.network import RATE_UNITS, Network, Transfer, _fill, _Line, _Port
from megalith.specs.fleet import LinkSpec, PairSpec
from tests.sim.small_cluster import run_until

GB = 10**9


@dataclass
class Arrivals:
    kernel: Kernel
    network: Network

    def __post_init__(self) -> None:
        self.seen: list[tuple[int, Transfer]] = []

    def send(self, source: int, target: int, num_bytes: int, most: int | None = None) -> Transfer:
        return self.network.send(source, target, num_bytes, self.done, most)

    def done(self, transfer: Transfer) -> None:
        self.seen.append((self.kernel.now_ns, transfer))

    def times(self) -> dict[tuple[int, int], int]:
        return {(transfer.source, transfer.target): now_ns for now_ns, transfer in self.seen}


def made(bytes_per_s: float = GB, latency_s: float = 0.0, **more: object) -> Arrivals:
    kernel = Kernel()
    spec = LinkSpec(bytes_per_s=bytes_per_s, latency_s=latency_s, **more)  # type: ignore[arg-type]
    return Arrivals(kernel, Network(kernel, spec, lambda instance: "near" if instance < 10 else "far"))


def test_one_transfer_takes_bytes_over_rate_plus_latency() -> None:
    net = made(latency_s=10e-6)
    transfer = net.send(0, 1, 3_000_000)
    net.kernel.run()
    assert net.seen == [(3_000_000 + 10_000, transfer)]
    assert transfer.state == "arrived"
    assert net.network.sent_bytes(0) == net.network.received_bytes(1) == 3_000_000 == net.network.delivered_bytes


def test_two_from_one_port_share_it_and_the_second_speeds_up() -> None:
    net = made()
    net.send(0, 1, 1_000_000)
    net.send(0, 2, 3_000_000)
    net.kernel.run()
    # Half a port each for 2 ms, then the longer one has all of it for its last 2 MB.
    assert net.times() == {(0, 1): 2_000_000, (0, 2): 4_000_000}


def test_a_port_that_comes_free_elsewhere_is_used() -> None:
    net = made()
    net.send(0, 1, 2_000_000)
    net.send(2, 1, 2_000_000)
    net.send(2, 3, 2_000_000)
    net.kernel.run()
    assert net.times() == {(0, 1): 4_000_000, (2, 1): 4_000_000, (2, 3): 4_000_000}
    net = made()
    for target in (1, 2, 3):
        net.send(0, target, 10_000_000)
    late = net.send(9, 3, 10_000_000)
    # Three leave 0 with a third each; the one from 9 gets what is left of port 3, two thirds and not half.
    assert net.network.bytes_per_s(late) == pytest.approx(2 / 3 * GB, rel=1e-9)


def test_both_directions_are_apart() -> None:
    net = made()
    net.send(0, 1, 1_000_000)
    net.send(1, 0, 1_000_000)
    net.kernel.run()
    assert net.times() == {(0, 1): 1_000_000, (1, 0): 1_000_000}


def test_without_contention_each_has_the_whole_link() -> None:
    net = made(contention=False)
    for target in range(1, 5):
        net.send(0, target, 1_000_000)
    net.kernel.run()
    assert set(net.times().values()) == {1_000_000}
    assert net.network.sent_bytes(0) == 4_000_000


def test_a_sender_that_has_no_more_to_give_leaves_the_rest_to_others() -> None:
    net = made()
    slow = net.send(0, 1, 1_000_000, most=GB // 10)
    fast = net.send(0, 2, 1_000_000)
    assert net.network.bytes_per_s(slow) == GB // 10
    assert net.network.bytes_per_s(fast) == 9 * GB // 10


def test_ports_are_added_up_but_one_transfer_uses_one() -> None:
    net = made(ports=2)
    net.send(0, 1, 1_000_000)
    net.send(0, 2, 1_000_000)
    net.kernel.run()
    assert set(net.times().values()) == {1_000_000}


def test_a_pair_of_pools_has_its_own_link() -> None:
    net = made(pairs=(PairSpec(source="near", target="near", bytes_per_s=10 * GB),))
    net.send(0, 1, 1_000_000)
    net.send(0, 11, 1_000_000)
    net.kernel.run()
    assert net.times() == {(0, 1): 100_000, (0, 11): 1_000_000}
    assert net.network.sent_bytes(0) == 2_000_000


def test_cancelling_gives_the_port_back_and_says_what_had_left() -> None:
    net = made()
    first = net.send(0, 1, 4_000_000)
    second = net.send(0, 2, 1_000_000)
    net.kernel.at(1_000_000, lambda _: moved.append(net.network.cancel(first)))
    moved: list[int] = []
    net.kernel.run()
    assert moved == [500_000]
    assert net.seen == [(1_500_000, second)]
    assert net.network.sent_bytes(0) == 1_500_000
    assert net.network.cancel(first) == 500_000, "again changes nothing"
    assert (net.network.cancelled, net.network.arrived, net.network.moving) == (1, 1, 0)


def test_cancelled_while_the_latency_runs_does_not_arrive() -> None:
    net = made(latency_s=1.0)
    transfer = net.send(0, 1, 1000)
    run_until(net.kernel, NS_PER_S // 2)
    assert transfer.state == "landing"
    assert net.network.cancel(transfer) == 1000
    net.kernel.run()
    assert not net.seen


def test_no_bytes_take_the_latency() -> None:
    net = made(latency_s=1e-6)
    net.send(0, 1, 0)
    assert not net.seen
    net.kernel.run()
    assert net.times() == {(0, 1): 1000}


@pytest.mark.parametrize("call", [(1, 1, 5, None), (0, 1, -1, None), (0, 1, 5, 0)])
def test_nonsense_is_refused(call: tuple[int, int, int, int | None]) -> None:
    with pytest.raises(ValueError, match="cannot send"):
        made().send(*call)


@pytest.mark.parametrize("spec", [{"bytes_per_s": 0.0}, {"bytes_per_s": 1e9, "ports": 0}])
def test_an_impossible_link_is_refused(spec: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="cannot be"):
        Network(Kernel(), LinkSpec(**spec))  # type: ignore[arg-type]


# Properties

PAIRS = st.tuples(st.integers(0, 5), st.integers(0, 5)).filter(lambda pair: pair[0] != pair[1])


@dataclass(frozen=True)
class Job:
    at_ns: int
    ends: tuple[int, int]
    num_bytes: int
    most: int | None
    cancel_ns: int | None


JOBS = st.lists(
    st.builds(
        Job,
        at_ns=st.integers(0, 50) | st.integers(0, 10**7),
        ends=PAIRS,
        num_bytes=st.integers(0, 3) | st.integers(0, 10**7),
        most=st.none() | st.integers(1, 2 * GB).filter(lambda most: most > 10**6),
        cancel_ns=st.none() | st.integers(0, 10**7),
    ),
    max_size=14,
)


def play(jobs: list[Job], contention: bool, latency_s: float) -> tuple[Arrivals, list[Transfer], list[int]]:
    net = made(latency_s=latency_s, contention=contention)
    transfers: list[Transfer] = []
    moved: list[int] = []

    def start(job: Job) -> None:
        transfer = net.send(*job.ends, job.num_bytes, job.most)
        transfers.append(transfer)
        if job.cancel_ns is not None:
            net.kernel.at(net.kernel.now_ns + job.cancel_ns, lambda _: moved.append(cut(transfer)))

    def cut(transfer: Transfer) -> int:
        return net.network.cancel(transfer) if transfer.live else -1

    for job in jobs:
        net.kernel.at(job.at_ns, start, job)
    net.kernel.run()
    return net, transfers, moved


@given(JOBS, st.booleans(), st.sampled_from([0.0, 3e-6]))
@settings(max_examples=150, deadline=None)
def test_every_byte_arrives_once_and_never_too_fast(jobs: list[Job], contention: bool, latency_s: float) -> None:
    net, transfers, moved = play(jobs, contention, latency_s)
    network = net.network
    arrived = [transfer for _, transfer in net.seen]
    assert len(arrived) == len(set(map(id, arrived))) == network.arrived
    assert {id(t) for t in arrived} == {id(t) for t in transfers if t.state == "arrived"}
    assert network.moving == 0
    assert network.arrived + network.cancelled == len(jobs)
    assert network.delivered_bytes == sum(t.num_bytes for t in arrived)
    partial = sum(bytes_moved for bytes_moved in moved if bytes_moved > 0)
    sent = sum(network.sent_bytes(instance) for instance in range(6))
    received = sum(network.received_bytes(instance) for instance in range(6))
    # A cancelled transfer may have moved a part of a byte, which is counted once a port has a whole one.
    for counted in (sent, received):
        assert 0 <= counted - network.delivered_bytes - partial <= network.cancelled
    last_ns = max((t.ended_ns or 0 for t in transfers), default=0)
    first_ns = min((t.sent_ns for t in transfers), default=0)
    for instance in range(6) if contention else ():
        most = (last_ns - first_ns) * GB // NS_PER_S
        assert network.sent_bytes(instance) <= most
        assert network.received_bytes(instance) <= most
    for transfer in arrived:
        assert transfer.ended_ns is not None
        took_ns = transfer.ended_ns - transfer.sent_ns
        assert took_ns * GB >= transfer.num_bytes * NS_PER_S
        if not contention and transfer.num_bytes and all(job.most is None for job in jobs):
            assert took_ns == -(-transfer.num_bytes * NS_PER_S // GB) + round(latency_s * NS_PER_S)


@given(JOBS)
@settings(max_examples=30, deadline=None)
def test_the_same_calls_give_the_same_times(jobs: list[Job]) -> None:
    first, second = play(jobs, True, 3e-6)[0], play(jobs, True, 3e-6)[0]
    assert [(now, t.source, t.target, t.num_bytes) for now, t in first.seen] == [
        (now, t.source, t.target, t.num_bytes) for now, t in second.seen
    ]


@given(st.lists(st.tuples(PAIRS, st.integers(1, 2000)), min_size=1, max_size=20), st.integers(1, 3))
@settings(max_examples=200, deadline=None)
def test_the_rates_are_max_min_fair(wanted: list[tuple[tuple[int, int], int]], ports_each: int) -> None:
    """The definition: nobody can get more but at the cost of somebody who has no more."""
    line = _Line(1000.0, ports_each, 0.0)
    ports: dict[tuple[int, int], _Port] = {}
    moving: dict[Transfer, int] = {}
    for (source, target), most_bytes in wanted:
        transfer = Transfer(source, target, 1, 0)
        transfer._line = line
        ends = [ports.setdefault(key, _Port(len(ports))) for key in ((source, 0), (target, 1))]
        transfer._ports = (ends[0], ends[1])
        moving[transfer] = min(line.rate, most_bytes * RATE_UNITS)
        for end in ends:
            end.moving[transfer] = moving[transfer]
    rates = dict(_fill(moving, list(ports.values())))
    assert rates.keys() == moving.keys()
    slack = len(moving)
    for port in ports.values():
        assert sum(rates[transfer] for transfer in port.moving) <= line.capacity
    for transfer, rate in rates.items():
        if rate == moving[transfer]:
            continue
        full = [port for port in transfer._ports if sum(rates[o] for o in port.moving) >= line.capacity - slack]
        assert any(rate >= max(rates[other] for other in port.moving) - slack for port in full)


def test_many_at_once_take_as_long_as_one_after_another() -> None:
    net = made()
    for index in range(200):
        net.send(index % 7, 7 + index % 3, 1_000_000)
    net.kernel.run()
    # The three ingress ports carry 66 or 67 MB each.
    assert max(now for now, _ in net.seen) == pytest.approx(67_000_000, abs=500)
    assert sum(net.network.received_bytes(target) for target in (7, 8, 9)) == 200_000_000
