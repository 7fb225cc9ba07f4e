"""Controllers and their commands: outcomes come back, nobody acts in the middle, and nothing goes on without end."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

import pytest

from megalith.base.errors import ConfigError
from megalith.cost.timer_linear import DecodeTerms, LinearTimer, PromptTerms
from megalith.policy import registry
from megalith.policy.batching import by_name
from megalith.policy.cluster import Command, Event, Headroom, Migrate, SetRole, View
from megalith.policy.facts import Request
from megalith.policy.kv import KvAccount
from megalith.policy.scheduler import Limits, Scheduler
from megalith.sim.cluster import Cluster
from megalith.sim.instance import Instance
from megalith.sim.kernel import Kernel
from megalith.sim.live import Live
from megalith.sim.record import Recorder
from megalith.specs.fleet import PolicySpec, PoolSpec


class Script:
    """Gives one command at the first arrival and notes what comes back; may insist."""

    name = "script"
    listens = frozenset({"arrival", "command"})
    period_ns: int | None = None

    def __init__(self, command: Command, insists: bool = False) -> None:
        self.command, self.insists = command, insists
        self.outcomes: list[tuple[str, str]] = []

    def act(self, event: Event, view: View) -> Iterable[Command]:
        if event.kind == "command":
            self.outcomes.append((event.data["outcome"], event.data["reason"]))
            return [self.command] if self.insists else []
        return [] if self.outcomes else [self.command]


def make(instance_id: int, pool: PoolSpec, cluster: Cluster) -> Instance:
    scheduler = Scheduler(by_name("splitfuse", 100), KvAccount(100, 16), Limits(max_sequences=8))
    timer = LinearTimer(PromptTerms(1_000_000, 1_000), DecodeTerms(1_000_000, 0, 10))
    return Instance(instance_id, cluster.kernel, scheduler, timer, cluster)


def run(script: Script) -> Cluster:
    kernel = Kernel()
    cluster = Cluster(kernel, registry.router(PolicySpec(name="round-robin"), 0), [script], Recorder(), make)
    cluster.add_instance(PoolSpec(name="pool", device="toy", count=1))
    cluster.feed(iter([Live(Request(0, 5, 20, 10), 10)]))
    cluster.control.start()
    kernel.run()
    return cluster


def test_roles_and_headroom_are_done() -> None:
    roles, drain = Script(SetRole(0, "decode")), Script(Headroom(0, inf))
    cluster = run(roles)
    assert (roles.outcomes, cluster.facts[0].role, cluster.facts[0].home) == ([("done", "")], "decode", "mixed")
    cluster = run(drain)
    assert (drain.outcomes, cluster.facts[0].accepting) == ([("done", "")], False)


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (SetRole(9, "decode"), "no such instance"),
        (Headroom(9, 1), "no such instance"),
        (Migrate(0, 0, 1), "can do that"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_reason(command: Command, reason: str) -> None:
    script = Script(command)
    run(script)
    ((outcome, told),) = script.outcomes
    assert outcome == "refused"
    assert reason in told


def test_a_controller_that_never_gives_up_is_stopped() -> None:
    with pytest.raises(ConfigError, match="script gave 100,000 commands in one nanosecond"):
        run(Script(SetRole(9, "decode"), insists=True))
