"""The power domain of a row at the fidelity `fluid`: telemetry in, commands of the policy's own objects out.

The controller is the object of policy/ that an exact run drives, with the same events and commands. Clocks take effect
`actuation_s` after the command, brakes at once and for `brake_s`, both at the next telemetry sample: an interval has
one clock. The clock of a pool is the lowest of what is set for it, for the domain, and by brakes, as in sim/power.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import inf, nan

from megalith.base.errors import ConfigError
from megalith.base.units import NS_PER_S
from megalith.policy.cluster import Command, Controller, Event, InstanceFacts, InstanceId, Role, SetClock
from megalith.sim.power import PowerCounters
from megalith.specs.fleet import PowerSpec


class RowView:
    """The View of a row: its time and its power. It shows no instances."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.powers_w: dict[str, float] = {}

    @property
    def as_of_ns(self) -> int:
        """See View."""
        return self.now_ns

    @property
    def instances(self) -> Sequence[InstanceFacts]:
        """See View: none."""
        return ()

    def by_role(self, role: Role) -> Sequence[InstanceFacts]:  # noqa: ARG002
        """See View: none."""
        return ()

    def by_id(self, instance: InstanceId) -> InstanceFacts:
        """See View."""
        raise KeyError(instance)

    def power_w(self, domain: str) -> float:
        """See View."""
        return self.powers_w.get(domain, nan)


class RowPower:
    """Clocks of the pools of one row, under one controller or none."""

    def __init__(self, spec: PowerSpec, pools: Sequence[str], controller: Controller | None) -> None:
        if controller is not None and not {"telemetry"} <= controller.listens <= {"telemetry", "command"}:
            raise ConfigError(
                f"{controller.name} listens to {', '.join(sorted(controller.listens)) or 'nothing'}: a row of the "
                "fidelity fluid has telemetry and commands only.",
                "Use polca, single-threshold, no-cap or a controller of power; others need `megalith simulate`.",
            )
        self.spec = spec
        self.counters = PowerCounters()
        self.clocks = dict.fromkeys(pools, 1.0)
        """In effect now, by pool."""
        self.slowed = dict.fromkeys(pools, 0)
        """Samples of time in which a pool did not have its full clock."""
        self._controller = controller
        self._view = RowView()
        self._scopes = dict.fromkeys((spec.name, *pools), 1.0)
        self._braked: dict[str, tuple[float, int]] = {}
        self._due: deque[tuple[int, SetClock]] = deque()
        self._actuation_ns = round(spec.actuation_s * NS_PER_S)
        self._brake_ns = round(spec.brake_s * NS_PER_S)

    @property
    def clock(self) -> float:
        """Of what is in the domain and in no pool."""
        name = self.spec.name
        return min(self._scopes[name], self._braked[name][0] if name in self._braked else 1.0)

    def sample(self, now_ns: int, power_w: float) -> bool:
        """A telemetry sample, and what follows from it. True when a pool's clock has changed."""
        counters, spec, view = self.counters, self.spec, self._view
        counters.samples += 1
        counters.violations += power_w > spec.budget_w
        counters.peak_w = max(counters.peak_w, power_w)
        for pool, clock in self.clocks.items():
            self.slowed[pool] += clock < 1.0
        changed = bool(self._braked) and self._release(now_ns)
        if self._due and self._due[0][0] <= now_ns:
            changed |= self._carry_out(now_ns)
        if self._controller is None:
            return changed
        view.now_ns, view.powers_w[spec.name] = now_ns, power_w
        data = {"domain": spec.name, "power_w": power_w, "budget_w": spec.budget_w}
        for command in self._controller.act(Event("telemetry", now_ns, data=data), view):
            changed |= self._begin(now_ns, command)
        return changed and self._apply()

    def _begin(self, now_ns: int, command: Command) -> bool:
        if not isinstance(command, SetClock) or command.scope not in self._scopes or not 0 < command.fraction <= 1:
            self._over(now_ns, command, "refused", f"a row has the scopes {', '.join(self._scopes)} and clocks up to 1")
            return False
        if command.brake:
            self._braked[command.scope] = (command.fraction, now_ns + self._brake_ns)
            self.counters.brakes += 1
            self._over(now_ns, command, "done")
            return True
        self._due.append((now_ns + self._actuation_ns, command))
        return self._carry_out(now_ns) if not self._actuation_ns else False

    def _carry_out(self, now_ns: int) -> bool:
        while self._due and self._due[0][0] <= now_ns:
            _, command = self._due.popleft()
            if self._scopes[command.scope] != command.fraction:
                self._scopes[command.scope] = command.fraction
                self.counters.clock_changes += 1
            self._over(now_ns, command, "done")
        return True

    def _release(self, now_ns: int) -> bool:
        over = [scope for scope, (_, end_ns) in self._braked.items() if end_ns <= now_ns]
        for scope in over:
            del self._braked[scope]
        return bool(over)

    def _over(self, now_ns: int, command: Command, outcome: str, reason: str = "") -> None:
        if self._controller is not None and "command" in self._controller.listens:
            data = {"command": command, "outcome": outcome, "reason": reason}
            for more in self._controller.act(Event("command", now_ns, data=data), self._view):
                self._begin(now_ns, more)

    def _apply(self) -> bool:
        """Whether the clock of any pool is another one now."""
        name, changed = self.spec.name, False
        for pool, before in self.clocks.items():
            brakes = [self._braked[scope][0] for scope in (name, pool) if scope in self._braked]
            clock = min(self._scopes[name], self._scopes[pool], *brakes, inf)
            changed |= clock != before
            self.clocks[pool] = clock
        return changed
