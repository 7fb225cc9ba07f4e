"""Migrations: stages, downtime, every way to be given up, and that no token or block is lost whatever happens."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.policy.cluster import Migrate, MigrationMode, SetRole
from megalith.policy.facts import Request
from megalith.sim.migration import Migrations
from megalith.specs.fleet import HandoffSpec, LinkSpec, MigrationSpec
from tests.sim.small_cluster import BLOCK_TOKENS, STEP_NS, SmallCluster
from tests.sim.test_transfer import handed

BLOCK_BYTES = 40


def decoding(blocks: list[int], prompt: int = 14, output: int = 40, **more: Any) -> SmallCluster:
    """Request 1 decodes on instance 0; its prompt of up to 16 tokens takes the first step."""
    cluster = SmallCluster(blocks, **more)
    cluster.arrive(Request(1, 0, prompt, output), output, 0)
    cluster.until(-(-prompt // 16) * STEP_NS)
    return cluster


def outcomes(cluster: SmallCluster) -> list[tuple[str, str]]:
    return [(event.data["outcome"], event.data["reason"]) for event in cluster.events]


def test_live_copies_in_stages_and_stops_briefly() -> None:
    # 0.1 bytes a nanosecond: a block takes 400 ns.
    cluster = decoding([40, 40], link=LinkSpec(bytes_per_s=0.1e9))
    cluster.migrate(Migrate(1, 0, 1, max_stages=5, last_blocks=1))
    cluster.kernel.run()
    cluster.settled()
    job = cluster.jobs[1]
    assert job.moves == [("migration", 0, 1)]
    # 14 tokens computed at the start: stage 0 takes 3 whole blocks in 1200 ns and leaves one, so the next is the last:
    # it begins at the boundary at 3000 with 16 tokens computed, one block to go.
    assert cluster.events[0].data["stages"] == 2
    assert cluster.events[0].data["downtime_ns"] == 400
    assert job.token_ns[:5] == [1000, 2000, 3000, 3400 + STEP_NS, 3400 + 2 * STEP_NS]
    assert cluster.migrations.counters.num_bytes == cluster.network.received_bytes(1) == 4 * BLOCK_BYTES


def test_every_block_is_copied_once_over_many_stages() -> None:
    cluster = decoding([60, 60], output=120, link=LinkSpec(bytes_per_s=0.05e9))
    cluster.migrate(Migrate(1, 0, 1, max_stages=20, last_blocks=0))
    cluster.kernel.run()
    cluster.settled()
    assert cluster.jobs[1].moves == [("migration", 0, 1)]
    assert cluster.migrations.counters.stages >= 3
    tokens = len([now_ns for now_ns in cluster.jobs[1].token_ns if now_ns <= cluster.events[0].at_ns])
    computed = 14 + tokens - 1
    assert cluster.network.received_bytes(1) == -(-computed // BLOCK_TOKENS) * BLOCK_BYTES


@pytest.mark.parametrize("mode", ["live", "blocking"])
def test_the_downtime_of_live_does_not_depend_on_the_length(mode: MigrationMode) -> None:
    downtimes = []
    for prompt in (64, 2048):
        cluster = decoding([600, 600], prompt=prompt, output=100)
        cluster.migrate(Migrate(1, 0, 1, mode, last_blocks=2))
        cluster.kernel.run()
        cluster.settled()
        downtimes.append(cluster.events[0].data["downtime_ns"])
    if mode == "live":
        assert max(downtimes) <= 2 * min(downtimes)
        assert max(downtimes) <= 2 * BLOCK_BYTES
    else:
        assert downtimes[1] >= 20 * downtimes[0]


def test_after_the_stages_are_used_up_the_rest_is_copied_at_once() -> None:
    cluster = decoding([40, 40], link=LinkSpec(bytes_per_s=0.01e9))
    cluster.migrate(Migrate(1, 0, 1, max_stages=2, last_blocks=0))
    cluster.kernel.run()
    cluster.settled()
    assert cluster.events[0].data["stages"] == 2
    # 3 blocks take 12 steps; 26 tokens, so 4 more blocks, are there at the boundary after it.
    assert cluster.events[0].data["downtime_ns"] == 4 * 4000


def test_a_handshake_costs_every_stage() -> None:
    cluster = decoding([40, 40], migration=MigrationSpec(stage_s=1e-7))
    cluster.migrate(Migrate(1, 0, 1, last_blocks=1))
    cluster.kernel.run()
    assert cluster.events[0].data["downtime_ns"] == 100 + BLOCK_BYTES


def test_tokens_alone_take_less_than_whole_blocks() -> None:
    cluster = decoding([40, 40], prompt=13, migration=MigrationSpec(whole_blocks=False))
    cluster.migrate(Migrate(1, 0, 1, "blocking"))
    cluster.kernel.run()
    assert cluster.network.received_bytes(1) == 140, "13 tokens of prompt and the first one"


def test_recompute_moves_no_bytes() -> None:
    cluster = decoding([40, 40])
    cluster.kernel.at(2500, cluster.migrate, Migrate(1, 0, 1, "recompute"))
    cluster.kernel.run()
    cluster.settled()
    job = cluster.jobs[1]
    assert job.moves == [("recompute", 0, 1)]
    # It leaves at 3000 with three tokens, and 17 known ones are two steps of 16.
    assert job.token_ns[:4] == [1000, 2000, 3000, 5000]
    assert cluster.network.arrived == 0


def test_recompute_that_the_target_refuses_changes_nothing() -> None:
    cluster = decoding([40, 8])
    cluster.migrate(Migrate(1, 0, 1, "recompute"))
    cluster.kernel.run()
    cluster.settled()
    assert cluster.events[0].data["outcome"] == "aborted"
    assert "8" in cluster.events[0].data["reason"]
    assert cluster.jobs[1].token_ns == [STEP_NS * step for step in range(1, 41)]


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (Migrate(1, 0, 0), "source and target are the same"),
        (Migrate(1, 0, 7), "an instance is down or gone"),
        (Migrate(9, 0, 1), "the request has ended"),
        (Migrate(1, 1, 2), "the request is not on the source"),
        (Migrate(1, 0, 3), "the target has no room"),
        (Migrate(2, 0, 1), "the request does not decode"),
        (Migrate(3, 0, 1), "the request is on its way already"),
    ],
)
def test_what_cannot_begin_is_refused(command: Migrate, reason: str) -> None:
    cluster = decoding([40, 40, 40, 3])
    cluster.arrive(Request(2, STEP_NS, 100, 5), 5, 0)
    handed(cluster, 3, 100, 5, "push", STEP_NS)
    cluster.until(STEP_NS + STEP_NS // 2)
    cluster.migrate(command)
    assert cluster.refusals == [(command, reason)]
    assert cluster.migrations.counters.refused == 1
    cluster.kernel.run()
    cluster.settled()


def test_a_target_that_drains_is_refused() -> None:
    cluster = decoding([40, 40])
    cluster.instances[1].facts.accepting = False
    cluster.migrate(Migrate(1, 0, 1))
    assert cluster.refusals[0][1] == "the target accepts no requests"


def test_other_commands_are_a_mistake() -> None:
    with pytest.raises(TypeError, match="no migration"):
        decoding([40]).migrations.carry_out(SetRole(1, "prefill"))


def test_one_at_a_time_for_each_instance() -> None:
    cluster = decoding([40, 40, 40], link=LinkSpec(bytes_per_s=0.01e9))
    cluster.arrive(Request(2, STEP_NS, 14, 40), 40, 0)
    cluster.arrive(Request(3, STEP_NS, 14, 40), 40, 2)
    cluster.until(3 * STEP_NS)
    cluster.migrate(Migrate(1, 0, 1))
    cluster.migrate(Migrate(2, 0, 2))
    cluster.migrate(Migrate(3, 2, 1))
    assert [reason for _, reason in cluster.refusals] == ["an instance takes part in another migration"] * 2
    cluster.kernel.run()
    cluster.settled()
    cluster = decoding([40, 40, 40], migration=MigrationSpec(at_once=2))
    cluster.arrive(Request(2, STEP_NS, 14, 40), 40, 0)
    cluster.until(3 * STEP_NS)
    cluster.migrate(Migrate(1, 0, 1))
    cluster.migrate(Migrate(2, 0, 2))
    assert not cluster.refusals


def test_both_ends_are_slower_meanwhile() -> None:
    cluster = decoding([40, 40], link=LinkSpec(bytes_per_s=0.1e9), migration=MigrationSpec(slowdown=1.5))
    cluster.migrate(Migrate(1, 0, 1, last_blocks=1))
    assert [cluster.instances[number].slowdown for number in (0, 1)] == [1.5, 1.5]
    cluster.kernel.run()
    assert [cluster.instances[number].slowdown for number in (0, 1)] == [1.0, 1.0]
    with pytest.raises(ValueError, match="slow"):
        Migrations(cluster, cluster.handoffs, MigrationSpec(slowdown=1.5))


# Every way to be given up

SLOW = LinkSpec(bytes_per_s=0.02e9, latency_s=3e-7)
"""A block takes 2 steps."""
AT = {"first stage": 2_500, "waiting for the boundary": 7_700, "last stage": 8_500}
"""Stage 0 copies 3 blocks from 1000 to 7300; the source's step ends at 8000; the last stage has 3 blocks."""


def under_way(**more: Any) -> SmallCluster:
    cluster = decoding([40, 40, 40], link=SLOW, **more)
    cluster.migrate(Migrate(1, 0, 1, last_blocks=3))
    return cluster


@pytest.mark.parametrize("stage", AT)
def test_the_moments_are_what_they_are_called(stage: str) -> None:
    cluster = under_way()
    cluster.until(AT[stage])
    held = cluster.instances[0].scheduler.num_held
    assert (held, cluster.network.moving) == {
        "first stage": (0, 1), "waiting for the boundary": (0, 0), "last stage": (1, 1)
    }[stage]  # fmt: skip


@pytest.mark.parametrize("stage", AT)
@pytest.mark.parametrize("end", ["abort", "target dies", "source dies"])
def test_given_up_at_any_stage(stage: str, end: str) -> None:
    cluster = under_way()
    if end == "abort":
        cluster.kernel.at(AT[stage], cluster.abort, 1)
    else:
        cluster.kernel.at(AT[stage], cluster.kill, 1 if end == "target dies" else 0)
    cluster.kernel.run()
    cluster.settled()
    expected = {"abort": "the request ended", "target dies": "the target died", "source dies": "the source died"}[end]
    assert outcomes(cluster) == [("aborted", expected)]
    job = cluster.jobs[1]
    assert job.moves == []
    assert job.ended == ("aborted" if end == "abort" else "finished")
    if end == "target dies" and stage == "last stage":
        # It was out of the batch from 8000 to 8500 and goes on.
        assert job.token_ns[7:9] == [8_000, 9_500]
    elif end == "target dies":
        assert job.token_ns == [STEP_NS * step for step in range(1, 41)]


def test_given_up_when_it_finishes() -> None:
    cluster = decoding([40, 40], output=4, link=SLOW)
    cluster.migrate(Migrate(1, 0, 1, last_blocks=2))
    cluster.kernel.run()
    cluster.settled()
    assert outcomes(cluster) == [("aborted", "the request ended")]


def test_given_up_when_it_is_preempted() -> None:
    cluster = decoding([15, 40], link=LinkSpec(bytes_per_s=0.002e9))
    cluster.arrive(Request(2, STEP_NS, 14, 40, 1), 40, 0)
    cluster.migrate(Migrate(1, 0, 1, last_blocks=0, max_stages=99))
    cluster.kernel.run()
    cluster.settled()
    assert outcomes(cluster) == [("aborted", "the request was preempted")]


def test_refused_when_the_target_has_no_room_at_first() -> None:
    cluster = decoding([40, 17], link=SLOW)
    cluster.arrive(Request(2, STEP_NS, 16, 50), 50, 1)
    cluster.until(20 * STEP_NS)
    # Request 2 has 9 of 17 blocks, and request 1 needs 9.
    cluster.migrate(Migrate(1, 0, 1))
    assert cluster.refusals[0][1] == "the target has no room"


@pytest.mark.parametrize("last_blocks", [0, 4])
def test_given_up_when_the_target_has_no_room_for_more(last_blocks: int) -> None:
    """While it decodes, and when it is out of the batch already."""
    cluster = decoding([40, 19], link=SLOW)
    cluster.arrive(Request(2, STEP_NS, 44, 20), 20, 1)
    cluster.until(5 * STEP_NS)
    # 12 of 19 blocks are taken and 5 reserved; at 13 us request 2 has 14 and request 1 needs 7.
    cluster.migrate(Migrate(1, 0, 1, last_blocks=last_blocks, max_stages=99))
    cluster.kernel.run()
    cluster.settled()
    assert outcomes(cluster) == [("aborted", "the target has no room")]
    assert cluster.jobs[1].moves == []
    assert cluster.jobs[1].token_ns == [STEP_NS * step for step in range(1, 41)]


# Whatever happens, whenever

TIMES = st.integers(0, 60 * STEP_NS)
COMMANDS = st.builds(
    Migrate,
    request_id=st.integers(0, 7),
    source=st.integers(0, 2),
    target=st.integers(0, 2),
    mode=st.sampled_from(["live", "live", "blocking", "recompute"]),
    max_stages=st.integers(1, 6),
    last_blocks=st.integers(0, 4),
)


@st.composite
def runs(draw: st.DrawFn) -> tuple[SmallCluster, list[Migrate]]:
    blocks = draw(st.lists(st.integers(15, 32), min_size=3, max_size=3))
    cluster = SmallCluster(
        blocks,
        link=LinkSpec(bytes_per_s=draw(st.sampled_from([0.01e9, 0.1e9, 1e9])), latency_s=1e-7),
        handoff=HandoffSpec(max_wait_s=2e-5),
        migration=MigrationSpec(
            stage_s=draw(st.sampled_from([0.0, 3e-7])),
            at_once=draw(st.integers(1, 2)),
            slowdown=draw(st.sampled_from([1.0, 1.3])),
        ),
    )
    cluster.spare = draw(st.none() | st.integers(0, 2))
    homes = {}
    for number in range(draw(st.integers(1, 8))):
        prompt, output = draw(st.integers(1, 24)), draw(st.integers(1, 36))
        at_ns, home = draw(TIMES | st.just(0)), draw(st.integers(0, 2))
        homes[number] = home
        request = Request(number, at_ns, prompt, output, draw(st.sampled_from([0, 0, 0, 1])))
        if draw(st.integers(0, 5)) == 0:
            ends = (home, draw(st.sampled_from([other for other in range(3) if other != home])))
            handed(cluster, number, prompt, output, draw(st.sampled_from(["push", "layerwise"])), at_ns, ends)
        else:
            cluster.kernel.at(at_ns, arrive_if_up, (cluster, request, draw(st.integers(1, output)), home))
        if draw(st.integers(0, 5)) == 0:
            cluster.kernel.at(at_ns + draw(TIMES), lambda n: cluster.abort(n) if n in cluster.jobs else None, number)
    given_commands = []
    for at_ns, command in draw(st.lists(st.tuples(TIMES, COMMANDS), min_size=1, max_size=16)):
        cluster.kernel.at(at_ns, send, (cluster, command, given_commands))
    for at_ns, number in draw(st.lists(st.tuples(TIMES, st.integers(0, 2)), max_size=2)):
        cluster.kernel.at(at_ns, cluster.kill, number)
    return cluster, given_commands


def arrive_if_up(arrival: tuple[SmallCluster, Request, int, int]) -> None:
    cluster, request, wanted, home = arrival
    if cluster.find(home) is not None:
        cluster.arrive(request, wanted, home)


def send(order: tuple[SmallCluster, Migrate, list[Migrate]]) -> None:
    """Mostly from where the request is, which a policy would know."""
    cluster, command, commands = order
    job = cluster.jobs.get(command.request_id)
    if job is not None and command.max_stages > 1:
        command = Migrate(
            command.request_id, job.instance, command.target, command.mode, command.max_stages, command.last_blocks
        )
    commands.append(command)
    cluster.migrate(command)


@given(runs())
@settings(max_examples=250, deadline=None)
def test_no_token_and_no_block_is_lost(run: tuple[SmallCluster, list[Migrate]]) -> None:
    cluster, commands = run
    cluster.kernel.run()
    cluster.settled()
    counters = cluster.migrations.counters
    told = [event.data["outcome"] for event in cluster.events]
    assert len(told) + len(cluster.refusals) == len(commands), "every command has one outcome"
    assert (told.count("done"), told.count("aborted"), len(cluster.refusals)) == (
        counters.done, counters.aborted, counters.refused
    )  # fmt: skip
    moves = [move for job in cluster.jobs.values() for move in job.moves]
    assert counters.done == sum(kind in ("migration", "recompute") for kind, _, _ in moves)
    assert all(instance.slowdown == 1.0 for instance in cluster.instances.values() if instance.up)
