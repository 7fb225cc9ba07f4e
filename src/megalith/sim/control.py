"""Controllers in a simulated cluster: who listens to what, and what becomes of their commands.

Knows the words of policy/cluster.py; must not know requests beyond which one a command is about. Outcomes of commands
and preemptions are told in an event of their own in the same nanosecond, so that a controller never acts in the middle
of what it hears about.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from math import inf
from typing import TYPE_CHECKING, Any

from megalith.base.errors import ConfigError
from megalith.policy.cluster import Command, Controller, Event, Headroom, Migrate, Router, SetRole
from megalith.sim.kernel import COMMAND, Kernel
from megalith.sim.parties import Executor

if TYPE_CHECKING:
    from megalith.sim.cluster import Cluster

MOST_COMMANDS = 100_000
"""In one nanosecond. More is a controller that answers its own refusals."""


class Control:
    """The controllers of one cluster. A router that is a controller too takes part as one."""

    def __init__(self, cluster: Cluster, kernel: Kernel, router: Router, controllers: Sequence[Controller]) -> None:
        both: list[Any] = [router] if hasattr(router, "act") else []
        self.controllers: list[Controller] = [*both, *controllers]
        self.listeners: dict[str, list[Controller]] = {}
        """By kind of event."""
        for controller in self.controllers:
            for kind in controller.listens:
                self.listeners.setdefault(kind, []).append(controller)
        self.executors: dict[type[Command], Executor] = {}
        """Who carries out what, beside roles and headroom."""
        self._cluster = cluster
        self._kernel = kernel
        self._burst = (0, 0)

    def start(self) -> None:
        """Set the ticks going."""
        for controller in self.controllers:
            if controller.period_ns is not None:
                self._kernel.at(self._kernel.now_ns + controller.period_ns, self._tick, controller)

    def tell(self, kind: str, subject: int, data: dict[str, Any]) -> None:
        """An event for those who listen, as soon as what happens now is over."""
        if kind in self.listeners:
            self._kernel.at(self._kernel.now_ns, self.emit, Event(kind, self._kernel.now_ns, subject, data))

    def emit(self, event: Event) -> None:
        """Tell the controllers that listen, and do what they want."""
        for controller in self.listeners.get(event.kind, ()):
            self.carry_out(controller.act(event, self._cluster.view), controller.name)

    def carry_out(self, commands: Any, who: str) -> None:
        """Begin what a policy wants; the outcomes come back as `command` events. Raises ConfigError without end."""
        for command in commands:
            now_ns, count = self._kernel.now_ns, self._burst[1] + 1 if self._burst[0] == self._kernel.now_ns else 1
            self._burst = (now_ns, count)
            if count > MOST_COMMANDS:
                raise ConfigError(
                    f"{who} gave {MOST_COMMANDS:,} commands in one nanosecond, the last one {command}.",
                    "A controller that hears of a refusal must not give the same command again at once.",
                )
            self._begin(command)

    def over(self, command: Command, outcome: str, reason: str = "") -> None:
        """A command has ended."""
        trace = self._cluster.trace
        if trace is not None:
            trace.command(self._kernel.now_ns, str(command), outcome, reason)
        self.tell("command", -1, {"command": command, "outcome": outcome, "reason": reason})

    def _begin(self, command: Command) -> None:
        cluster = self._cluster
        self._kernel.log(COMMAND, *_numbers(command))
        executor = self.executors.get(type(command))
        if executor is not None:
            refused = executor.carry_out(command)
            if refused is not None:
                self.over(command, "refused", refused)
            elif isinstance(command, Migrate):
                cluster.moving(command.request_id)
        elif isinstance(command, SetRole | Headroom):
            facts = cluster.facts.get(command.instance)
            if facts is None:
                self.over(command, "refused", "there is no such instance")
                return
            if isinstance(command, SetRole):
                facts.role = command.role
            else:
                facts.headroom_blocks = command.blocks
                facts.accepting = command.blocks != inf
            cluster.view.changed()
            self.over(command, "done")
        else:
            self.over(command, "refused", "nothing here can do that")

    def _tick(self, controller: Controller) -> None:
        self.carry_out(controller.act(Event("tick", self._kernel.now_ns), self._cluster.view), controller.name)
        if self._cluster.busy:
            self._kernel.at(self._kernel.now_ns + (controller.period_ns or 1), self._tick, controller)


def _numbers(command: Command) -> tuple[int, int]:
    """The kind of a command and a hash of all that it says, for the log; the same on every machine."""
    digest = blake2b(repr(command).encode(), digest_size=7).digest()
    return Command.__args__.index(type(command)), int.from_bytes(digest, "little")
