"""Hand-offs: when the KV is over, what shows of the copy, who waits, and that nothing leaks whatever breaks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.policy.cluster import TransferMode
from megalith.policy.facts import Request
from megalith.specs.fleet import HandoffSpec, LinkSpec
from tests.sim.small_cluster import BLOCK_TOKENS, KV, STEP_NS, Job, SmallCluster

GB = 1e9


def handed(
    cluster: SmallCluster,
    number: int,
    prompt: int,
    output: int,
    mode: TransferMode,
    at_ns: int = 0,
    ends: tuple[int, int] = (0, 1),
) -> None:
    """A request that arrives at a time, with its prompt on one end and its decodes on the other."""

    def arrive(_: None) -> None:
        request = Request(number, at_ns, prompt, output)
        if cluster.find(ends[0]) is not None and cluster.find(ends[1]) is not None:
            cluster.handoffs.expect(request, ends[0], ends[1], mode)
            cluster.arrive(request, output, ends[0])

    cluster.kernel.at(at_ns, arrive)


def run(cluster: SmallCluster) -> None:
    cluster.kernel.run()
    cluster.settled()


def test_push_sends_the_blocks_when_the_prompt_is_done() -> None:
    cluster = SmallCluster([20, 20])
    handed(cluster, 1, prompt=10, output=3, mode="push")
    run(cluster)
    job = cluster.jobs[1]
    assert job.moves == [("handoff", 0, 1)]
    # One step for the prompt, 3 blocks of 40 bytes at 1 byte a nanosecond, then two decodes on the other side.
    assert job.token_ns == [STEP_NS, 2 * STEP_NS + 120, 3 * STEP_NS + 120]
    assert cluster.handoffs.counters.exposed_ns == 120
    assert cluster.handoffs.counters.num_bytes == 120


def test_tokens_alone_and_a_hidden_share_take_less() -> None:
    cluster = SmallCluster([20, 20], handoff=HandoffSpec(whole_blocks=False))
    handed(cluster, 1, prompt=10, output=2, mode="push")
    run(cluster)
    assert cluster.handoffs.counters.exposed_ns == 100
    cluster = SmallCluster([20, 20], handoff=HandoffSpec(hidden=0.9))
    handed(cluster, 1, prompt=10, output=2, mode="push")
    run(cluster)
    assert cluster.handoffs.counters.exposed_ns == 12


def test_a_request_that_ends_with_its_first_token_is_not_sent() -> None:
    cluster = SmallCluster([20, 20])
    for mode in ("push", "pull", "layerwise"):
        handed(cluster, len(cluster.jobs) + {"push": 1, "pull": 2, "layerwise": 3}[mode], 9, 1, mode)  # type: ignore[arg-type]
    run(cluster)
    assert cluster.handoffs.counters.done == 0


@pytest.mark.parametrize("bytes_per_s", [0.02e9, 0.05e9, 0.1e9, 0.16e9, 0.2e9, 0.5e9, 1e9, 5e9])
def test_layers_hide_under_the_prompt(bytes_per_s: float) -> None:
    """exposed = max(t / n, t - T (n - 1) / n), with the transfer taking t, the prompt step T, and n layers."""
    cluster = SmallCluster([20, 20], link=LinkSpec(bytes_per_s=bytes_per_s))
    handed(cluster, 1, prompt=16, output=2, mode="layerwise")
    run(cluster)
    whole_ns = 16 * KV.bytes_per_token / bytes_per_s * 1e9
    expected = max(whole_ns / KV.layers, whole_ns - STEP_NS * (KV.layers - 1) / KV.layers)
    assert cluster.handoffs.counters.exposed_ns == pytest.approx(expected, abs=2 / (bytes_per_s / 1e9) + 2)
    assert cluster.network.received_bytes(1) == 160, "no byte twice"


def test_chunks_of_a_long_prompt_go_while_the_next_is_computed() -> None:
    exposed = {}
    for mode in ("push", "layerwise"):
        cluster = SmallCluster([40, 40], link=LinkSpec(bytes_per_s=0.2e9))
        handed(cluster, 1, prompt=64, output=2, mode=mode)  # type: ignore[arg-type]
        run(cluster)
        exposed[mode] = cluster.handoffs.counters.exposed_ns
        assert cluster.network.received_bytes(1) == 640
    # 160 bytes a chunk, 800 ns of a step of 1000: only the last layer of the last chunk, 40 bytes, is left.
    assert exposed == {"push": 3200, "layerwise": 200}


def test_layerwise_holds_blocks_at_the_decode_side_while_the_prompt_runs() -> None:
    cluster = SmallCluster([40, 40])
    handed(cluster, 1, prompt=64, output=2, mode="layerwise")
    cluster.until(STEP_NS // 2)
    assert cluster.instances[1].scheduler.kv.used_blocks == 16
    cluster.kernel.run()
    cluster.settled()


def test_whoever_is_refused_waits_on_the_prefill_side_in_order() -> None:
    cluster = SmallCluster([40, 7])
    for number in (1, 2, 3):
        handed(cluster, number, prompt=16, output=5, mode="push", at_ns=number)
    cluster.until(4 * STEP_NS)
    # 4 or 5 blocks of 7 go to the first; the others wait and keep theirs.
    assert cluster.handoffs.waiting(0) == 2
    assert cluster.instances[0].scheduler.kv.used_blocks == 8
    cluster.kernel.run()
    cluster.settled()
    ends = {number: cluster.jobs[number].token_ns[-1] for number in (1, 2, 3)}
    assert ends[1] < ends[2] < ends[3]
    assert cluster.handoffs.counters.waited == 2
    assert cluster.handoffs.counters.done == 3


@pytest.mark.parametrize("spec", [HandoffSpec(refused="local"), HandoffSpec(max_waiting=0)])
def test_or_it_decodes_where_its_prompt_ran(spec: HandoffSpec) -> None:
    cluster = SmallCluster([40, 7], handoff=spec)
    for number in (1, 2):
        handed(cluster, number, prompt=16, output=5, mode="push", at_ns=number)
    run(cluster)
    assert cluster.jobs[1].moves == [("handoff", 0, 1)]
    assert cluster.jobs[2].moves == [("kept", 0, 0)]
    assert cluster.handoffs.counters.kept == 1


def test_a_wait_has_an_end() -> None:
    cluster = SmallCluster([40, 7], handoff=HandoffSpec(max_wait_s=5e-6))
    handed(cluster, 1, prompt=16, output=12, mode="push")
    handed(cluster, 2, prompt=16, output=5, mode="push", at_ns=1)
    run(cluster)
    assert cluster.jobs[2].moves == [("kept", 0, 0)]


def test_what_can_never_fit_does_not_wait() -> None:
    cluster = SmallCluster([40, 7])
    handed(cluster, 1, prompt=32, output=5, mode="push")
    run(cluster)
    assert cluster.jobs[1].moves == [("kept", 0, 0)]


def test_two_sides_that_hand_to_each_other_get_on() -> None:
    cluster = SmallCluster([9, 9], handoff=HandoffSpec(max_wait_s=1e-5))
    for number in range(4):
        handed(cluster, number, prompt=16, output=12, mode="push", ends=(number % 2, 1 - number % 2))
    run(cluster)
    assert [cluster.jobs[number].moves for number in range(4)] == 2 * [[("handoff", 0, 1)], [("handoff", 1, 0)]]
    assert cluster.handoffs.counters.waited == 1


def test_two_sides_that_wait_for_each_other_get_on() -> None:
    """Each holds 7 of its 9 blocks and wants 7 of the other: nobody can move, so after the wait both stay."""
    cluster = SmallCluster([9, 9], handoff=HandoffSpec(max_wait_s=1e-5))
    for number in range(2):
        handed(cluster, number, prompt=28, output=4, mode="push", ends=(number % 2, 1 - number % 2))
    run(cluster)
    assert [cluster.jobs[number].moves for number in range(2)] == [[("kept", 0, 0)], [("kept", 1, 1)]]
    assert cluster.handoffs.counters.waited == 2


def test_pull_fetches_only_while_little_is_on_its_way() -> None:
    """At most 5 % of 100 blocks: the second fetch begins when the first has arrived, though there is room for all."""
    seen = {}
    for mode in ("push", "pull"):
        cluster = SmallCluster([40, 100], link=LinkSpec(bytes_per_s=0.01e9))
        for number in (1, 2, 3):
            handed(cluster, number, prompt=20, output=2, mode=mode, at_ns=number)  # type: ignore[arg-type]
        cluster.until(6 * STEP_NS)
        seen[mode] = (cluster.network.moving, cluster.handoffs.waiting(0))
        cluster.kernel.run()
        cluster.settled()
    assert seen == {"push": (3, 0), "pull": (1, 2)}


def test_the_prefill_side_dies() -> None:
    cluster = SmallCluster([20, 20], link=LinkSpec(bytes_per_s=0.01e9))
    handed(cluster, 1, prompt=10, output=3, mode="push")
    cluster.kernel.at(2 * STEP_NS, lambda _: cluster.kill(0))
    run(cluster)
    assert cluster.jobs[1].moves == []
    assert cluster.handoffs.counters.lost == 1
    assert len(cluster.jobs[1].token_ns) == 3, "it is computed again elsewhere, and keeps the token that it had"


@pytest.mark.parametrize("spare", [None, 2])
@pytest.mark.parametrize("mode", ["push", "pull", "layerwise"])
@pytest.mark.parametrize("at_ns", [STEP_NS // 2, 2 * STEP_NS])
def test_the_decode_side_dies(spare: int | None, mode: TransferMode, at_ns: int) -> None:
    cluster = SmallCluster([20, 20, 20], link=LinkSpec(bytes_per_s=0.01e9))
    cluster.spare = spare
    handed(cluster, 1, prompt=10, output=3, mode=mode)
    cluster.kernel.at(at_ns, lambda _: cluster.kill(1))
    run(cluster)
    assert cluster.jobs[1].moves == [("kept", 0, 0) if spare is None else ("handoff", 0, 2)]
    if spare is not None:
        assert cluster.network.received_bytes(2) == 120, "all of it is sent again"


def test_nonsense_is_refused() -> None:
    cluster = SmallCluster([20, 20])
    request = Request(1, 0, 10, 3)
    with pytest.raises(ValueError, match="cannot be handed"):
        cluster.handoffs.expect(request, 1, 1, "push")
    cluster.handoffs.expect(request, 0, 1, "push")
    with pytest.raises(ValueError, match="cannot be handed"):
        cluster.handoffs.expect(request, 0, 1, "push")


# Whatever breaks, whenever


@dataclass(frozen=True)
class Wish:
    at_ns: int
    prompt: int
    output: int
    mode: TransferMode
    ends: tuple[int, int]
    abort_ns: int | None


TIMES = st.integers(0, 30 * STEP_NS)
ENDS = st.tuples(st.integers(0, 2), st.integers(0, 2)).filter(lambda ends: ends[0] != ends[1])
WISHES = st.lists(
    st.builds(
        Wish,
        at_ns=TIMES | st.just(0),
        prompt=st.integers(1, 40),
        output=st.integers(1, 16),
        mode=st.sampled_from(["push", "pull", "layerwise"]),
        ends=ENDS,
        abort_ns=st.none() | st.none() | TIMES,
    ),
    min_size=1,
    max_size=10,
)
SPECS = st.builds(
    HandoffSpec,
    refused=st.sampled_from(["wait", "local"]),
    max_waiting=st.integers(0, 4),
    max_wait_s=st.sampled_from([2e-6, 2e-5]),
    whole_blocks=st.booleans(),
)


@given(
    wishes=WISHES,
    spec=SPECS,
    blocks=st.lists(st.integers(15, 30), min_size=3, max_size=3),
    bytes_per_s=st.sampled_from([0.01e9, 0.1e9, 1e9]),
    deaths=st.lists(st.tuples(TIMES, st.integers(0, 2)), max_size=2),
    spare=st.none() | st.integers(0, 2),
)
@settings(max_examples=200, deadline=None)
def test_nothing_leaks_and_nobody_is_lost(
    wishes: list[Wish],
    spec: HandoffSpec,
    blocks: list[int],
    bytes_per_s: float,
    deaths: list[tuple[int, int]],
    spare: int | None,
) -> None:
    cluster = SmallCluster(blocks, link=LinkSpec(bytes_per_s=bytes_per_s, latency_s=1e-7), handoff=spec)
    cluster.spare = spare
    for number, wish in enumerate(wishes):
        if wish.prompt + wish.output - 1 <= min(blocks) * BLOCK_TOKENS:
            handed(cluster, number, wish.prompt, wish.output, wish.mode, wish.at_ns, wish.ends)
            if wish.abort_ns is not None:
                cluster.kernel.at(
                    wish.at_ns + wish.abort_ns, lambda n: cluster.abort(n) if n in cluster.jobs else None, number
                )
    for at_ns, number in deaths:
        cluster.kernel.at(at_ns, cluster.kill, number)
    run(cluster)
    counters = cluster.handoffs.counters
    handed_off = [job for job in cluster.jobs.values() if any(move[0] == "handoff" for move in job.moves)]
    assert counters.done == sum(1 for job in cluster.jobs.values() for move in job.moves if move[0] == "handoff")
    assert counters.kept == sum(1 for job in cluster.jobs.values() for move in job.moves if move[0] == "kept")
    if not deaths:
        assert all(ended(job) for job in handed_off)


def ended(job: Job) -> bool:
    kinds: list[Literal["finished", "aborted"]] = ["finished", "aborted"]
    return job.ended in kinds
