"""Pipelines that block and that do not, against a walk that moves one thing at a time."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.cost.timer import PS_PER_NS, Line, Prompt
from megalith.policy import registry
from megalith.policy.batching import by_name
from megalith.policy.facts import Request
from megalith.policy.kv import KvAccount
from megalith.policy.pipelined import PipelinedScheduler
from megalith.policy.scheduler import Limits
from megalith.sim.cluster import Cluster
from megalith.sim.instance import Instance
from megalith.sim.kernel import Kernel
from megalith.sim.live import Live
from megalith.sim.pipelined import PipelinedInstance
from megalith.sim.run import simulate
from megalith.specs.fleet import FleetSpec, PolicySpec, PoolSpec
from megalith.specs.fleet_text import parse_fleet
from tests.sim.test_pipelined import Ledger
from tests.sim.test_run import FLEETS, scenario


class Stages:
    """Stage k of a step with prompts of n tokens takes n * weights[k] ns, sending takes `send` ns."""

    def __init__(self, weights: list[int], send: int) -> None:
        self.weights, self.send = weights, send

    def parts_ps(
        self, prompts: list[Prompt], decodes: int, context_sum: int, context_max: int
    ) -> tuple[tuple[int, ...], int]:
        tokens = sum(one.new_tokens for one in prompts) + decodes
        return tuple(tokens * weight * PS_PER_NS for weight in self.weights), self.send * PS_PER_NS

    def step_ps(self, prompts: list[Prompt], decodes: int, context_sum: int, context_max: int) -> int:
        stages, send = self.parts_ps(prompts, decodes, context_sum, context_max)
        return sum(stages) + send * (len(stages) - 1)

    def decode_line(self, decodes: int, context_sum: int, context_max: int) -> Line:
        return Line(self.step_ps([], decodes, context_sum, context_max), 0, 1)


def run(mode: str, weights: list[int], send: int, prompts: list[int], most: int) -> list[int]:
    """One request a step, all there at 0, one token each: when each has it."""
    kernel, ledger = Kernel(), Ledger()
    timer: Any = Stages(weights, send)

    def make(instance_id: int, _pool: PoolSpec, cluster: Cluster) -> Instance:
        kv, limits = KvAccount(1000, 4), Limits(max_sequences=64)
        scheduler = PipelinedScheduler(by_name("splitfuse", 100), kv, limits, len(weights), 1, most)
        return PipelinedInstance(instance_id, kernel, scheduler, timer, cluster, mode)

    cluster = Cluster(kernel, registry.router(PolicySpec(name="round-robin"), 0), [], ledger, make)
    cluster.add_instance(PoolSpec(name="pool", device="toy", count=1))
    cluster.feed(Live(Request(number, 0, tokens, 1), 1) for number, tokens in enumerate(prompts))
    kernel.run()
    return [live.finish_ns for live in sorted(ledger.ended, key=lambda live: live.request.id)]


def walk(mode: str, weights: list[int], send: int, prompts: list[int], most: int) -> list[int]:
    """Nanosecond by nanosecond: every stage, every link and every step has a state, and at most one thing to do."""
    stages = len(weights)
    where: list[tuple[str, int, int]] = [("outside", 0, 0)] * len(prompts)
    """(computes | done | sends | waits | ended, stage, time left)"""
    ended = [0] * len(prompts)
    now = 0
    while any(state != "ended" for state, _, _ in where):
        moved = True
        while moved:
            moved = False
            for step in range(len(prompts)):
                state, stage, left = where[step]
                if state in ("computes", "sends") and left == 0:
                    if state == "sends":
                        where[step] = ("waits", stage + 1, 0)
                    elif stage == stages - 1:
                        where[step], ended[step] = ("ended", stage, 0), now
                    else:
                        where[step] = ("done", stage, 0)
                    moved = True
                elif state == "done":
                    ahead = where[:step]
                    on_link = any(other[:2] == ("sends", stage) for other in ahead)
                    before = any(other[:2] == ("done", stage) for other in ahead)
                    next_taken = any(
                        other[1] == stage + 1 and other[0] in ("computes", "done", "sends", "waits") for other in ahead
                    )
                    if not on_link and not before and (mode != "blocking" or not next_taken):
                        where[step], moved = ("sends", stage, send), True
                elif state == "waits" or (
                    state == "outside" and sum(other[0] not in ("outside", "ended") for other in where) < most
                ):
                    ahead = where[:step]
                    held = {"computes", "done", "sends"} if mode == "blocking" else {"computes"}
                    taken = any(other[1] == stage and other[0] in held for other in ahead)
                    queue = any(other[1] == stage and other[0] in ("waits", "outside") for other in ahead)
                    if not taken and not queue:
                        where[step], moved = ("computes", stage, prompts[step] * weights[stage]), True
                    elif state == "outside" and not queue:
                        where[step], moved = ("waits", 0, 0), True
        if all(state == "ended" for state, _, _ in where):
            break
        now += 1
        where = [(state, stage, left - 1 if state in ("computes", "sends") else left) for state, stage, left in where]
    return ended


steps = st.lists(st.integers(1, 9), min_size=1, max_size=9)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["blocking", "non-blocking"]), st.lists(st.integers(1, 4), min_size=2, max_size=4),
       st.integers(0, 6), steps, st.integers(1, 6))  # fmt: skip
def test_every_step_leaves_when_a_walk_says(
    mode: str, weights: list[int], send: int, prompts: list[int], most: int
) -> None:
    assert run(mode, weights, send, prompts, most) == walk(mode, weights, send, prompts, most)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.integers(0, 6), steps, st.integers(1, 6))
def test_nobody_leaves_later_without_blocking(weights: list[int], send: int, prompts: list[int], most: int) -> None:
    free, held = (run(mode, weights, send, prompts, most) for mode in ("non-blocking", "blocking"))
    assert all(one <= other for one, other in zip(free, held, strict=True))


def test_a_short_step_that_cannot_be_handed_over_holds_the_stage() -> None:
    # Step 0 is in stage 1 until 200; 1 is done at 110 and stays; 2 can begin at 200 only, and leaves at 300 + 100.
    assert run("blocking", [1, 1], 0, [100, 10, 100], 3) == [200, 210, 400]
    assert run("non-blocking", [1, 1], 0, [100, 10, 100], 3) == [200, 210, 310]


@pytest.mark.parametrize("mode", ["blocking", "non-blocking"])
@pytest.mark.parametrize("name", ["blocking", "push"])
def test_every_kind_of_fleet_runs_in_either_way(name: str, mode: Any) -> None:
    fleet = FLEETS[name]
    change = {"pipeline_parallel": 2, "pipeline": mode, "padding": True}
    pools = tuple(msgspec.structs.replace(pool, **change, device="a100-80gb") for pool in fleet.pools)
    setting = scenario(msgspec.structs.replace(fleet, pools=pools))
    result = simulate(setting)
    assert result.requests == 120
    assert "padded" in next(iter(result.timing.values()))


def test_vidurs_pipeline_sends_in_its_own_time() -> None:
    def rate(mode: Any) -> int:
        pool = PoolSpec(
            name="all", device="a100", count=1, tensor_parallel=2, pipeline_parallel=2, pipeline=mode, steps_under_way=2
        )
        return simulate(scenario(FleetSpec(pools=(pool,)), model="llama-2-70b", timer="vidur")).end_ns

    assert rate("blocking") > rate("non-blocking")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("1xa100:pipeline=blocking", "one stage"),
        ("1xa100:steps_under_way=4", "one stage"),
        ("1xa100:pp2:pipeline=blokking", "blokking"),
        ("1xa100:peer_layers=-1", "peer_layers"),
    ],
)
def test_what_cannot_be_is_refused(text: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        parse_fleet(text)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"peer_layers": 99}, "at most 32"),
        ({"peer_layers": 3, "pipeline_parallel": 2}, "multiple of 2"),
        ({"peer_layers": 4, "device": "nowhere"}, "nowhere"),
    ],
)
def test_loans_that_cannot_be_are_refused(change: dict[str, Any], what: str) -> None:
    pool = msgspec.structs.replace(PoolSpec(name="all", device="a100-80gb", count=1, kv_blocks=2000), **change)
    with pytest.raises(ConfigError, match=what):
        simulate(scenario(FleetSpec(pools=(pool,)), model="llama-3.1-8b"))


def test_borrowed_layers_leave_room_for_kv_and_take_time() -> None:
    def figures(**change: Any) -> tuple[int, int]:
        pool = PoolSpec(name="all", device="a100-80gb", count=1, **change)
        setting = scenario(FleetSpec(pools=(pool,)), model="llama-3.1-8b", timer="analytic")
        from megalith.sim.build import Builder

        return Builder(setting).kinds["all"].kv_blocks, simulate(setting).end_ns

    plain, peer, host = figures(), figures(peer_layers=16), figures(host_layers=16)
    assert peer[0] == host[0] > plain[0]
    assert plain[1] < peer[1] < host[1]
