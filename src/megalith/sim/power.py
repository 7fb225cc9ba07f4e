"""A power domain: what its instances draw, telemetry of it, and clocks that take their time to change.

Knows phases, watts and clocks; must not know thresholds, which are a policy's. After POLCA (Patel et al., ASPLOS 2024):
telemetry comes every `telemetry_s` as the mean over that time, a clock that is set takes effect after `actuation_s`
(out-of-band management), and a brake acts at once and ends after `brake_s`.

Energy is counted exactly, in whole femtojoules: watts are rounded to milliwatts, times are picoseconds.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Protocol

from megalith.base.errors import ConfigError
from megalith.base.units import NS_PER_S
from megalith.cost.timer import PS_PER_NS
from megalith.policy.cluster import Command, Event, InstanceFacts, InstanceId, SetClock
from megalith.sim.kernel import Kernel
from megalith.sim.tempo import Tempos
from megalith.specs.fleet import PowerSpec

FJ_PER_J = 1_000_000_000_000_000
MW_PER_W = 1_000


class Powered(Protocol):
    """An instance that draws power."""

    @property
    def id(self) -> InstanceId:
        """Its number."""
        ...

    @property
    def facts(self) -> InstanceFacts:
        """Its pool."""
        ...

    def busy_ps(self, now_ns: int) -> tuple[int, int]:
        """Picoseconds so far in steps with prompt chunks, and in steps of decodes alone, the one under way included."""
        ...


class PowerHost(Protocol):
    """The cluster around a power domain."""

    @property
    def kernel(self) -> Kernel:
        """Time."""
        ...

    def going_on(self) -> bool:
        """Whether requests are live or to come: without any, telemetry ends."""
        ...

    def sampled(self, domain: str, power_w: float) -> None:
        """What policies see as the power of the domain from now on."""
        ...

    def emit(self, event: Event) -> None:
        """Tell the controllers that listen."""
        ...


@dataclass(slots=True)
class PowerCounters:
    """What happened since the start. Only ever rises."""

    samples: int = 0
    violations: int = 0
    """Samples above the budget."""
    brakes: int = 0
    """Brakes that began or were prolonged."""
    clock_changes: int = 0
    """Of scopes, brakes not counted."""
    peak_w: float = 0.0
    """Highest sample."""


class _Meter:
    """Energy of one instance."""

    __slots__ = ("busy_ps", "devices", "energy_fj", "instance", "now_ns", "on", "watts_mw")

    def __init__(self, instance: Powered, devices: int, now_ns: int) -> None:
        self.instance = instance
        self.devices = devices
        self.energy_fj = 0
        self.watts_mw = (0, 0, 0)
        """Idle, prompts, decodes, of the whole instance."""
        self.on = False
        self.now_ns = now_ns
        self.busy_ps = (0, 0)

    def start(self, now_ns: int) -> None:
        """It draws power from now on."""
        self.on, self.now_ns, self.busy_ps = True, now_ns, self.instance.busy_ps(now_ns)

    def advance(self, now_ns: int) -> int:
        """Count up to now. Returns the femtojoules since the last time."""
        if not self.on or now_ns == self.now_ns:
            return 0
        prompt_ps, decode_ps = self.instance.busy_ps(now_ns)
        prompts, decodes = prompt_ps - self.busy_ps[0], decode_ps - self.busy_ps[1]
        idle = (now_ns - self.now_ns) * PS_PER_NS - prompts - decodes
        if min(prompts, decodes, idle) < 0:
            raise RuntimeError(f"instance {self.instance.id}: {prompts} + {decodes} ps busy, {idle} ps idle")
        drawn = self.watts_mw[0] * idle + self.watts_mw[1] * prompts + self.watts_mw[2] * decodes
        self.energy_fj += drawn
        self.now_ns, self.busy_ps = now_ns, (prompt_ps, decode_ps)
        return drawn


class PowerDomain:
    """All instances behind one breaker. A scope is the name of the domain or of a pool in it."""

    def __init__(self, host: PowerHost, tempos: Tempos, spec: PowerSpec) -> None:
        if not (spec.budget_w > 0 and spec.telemetry_s > 0 and spec.actuation_s >= 0 and spec.brake_s > 0):
            raise ConfigError(
                f"A power domain with {spec.budget_w:g} W, telemetry every {spec.telemetry_s:g} s, actuation in "
                f"{spec.actuation_s:g} s and brakes of {spec.brake_s:g} s cannot be.",
                "Only actuation may take 0 s.",
            )
        self._host = host
        self._tempos = tempos
        self._spec = spec
        self._meters: dict[InstanceId, _Meter] = {}
        self._clocks: dict[str, float] = {spec.name: 1.0}
        """As last set and in effect, by scope."""
        self._braked: dict[str, tuple[float, int]] = {}
        """(clock, end of the brake) by scope."""
        self._gone_fj: Counter[str] = Counter()
        """Energy of instances that are gone, by pool."""
        self._window_fj = 0
        self._window_ns = host.kernel.now_ns
        self.counters = PowerCounters()

    # What the cluster tells

    def start(self) -> None:
        """Begin telemetry."""
        self._window_ns = self._host.kernel.now_ns
        self._host.kernel.at(self._window_ns + round(self._spec.telemetry_s * NS_PER_S), self._sample)

    def add(self, instance: Powered, devices: int) -> None:
        """An instance is switched on, with so many devices. It has been added to the tempos."""
        meter = _Meter(instance, devices, self._host.kernel.now_ns)
        self._meters[instance.id] = meter
        self._clocks.setdefault(instance.facts.pool, 1.0)
        self._tempos.clock(instance.id, self._clock(instance.facts.pool))
        self._set_watts(meter)
        meter.start(self._host.kernel.now_ns)

    def remove(self, instance: InstanceId) -> None:
        """An instance is switched off for good."""
        self.switch_off(instance)
        meter = self._meters.pop(instance)
        self._gone_fj[meter.instance.facts.pool] += meter.energy_fj

    def switch_off(self, instance: InstanceId) -> None:
        """An instance is about to fail and then draws nothing."""
        meter = self._meters[instance]
        self._window_fj += meter.advance(self._host.kernel.now_ns)
        meter.on = False

    def switch_on(self, instance: InstanceId) -> None:
        """It is back."""
        self._meters[instance].start(self._host.kernel.now_ns)

    def carry_out(self, command: Command) -> str | None:
        """Begin a SetClock. Returns why it is refused; the end comes as an event of the kind `command`."""
        if not isinstance(command, SetClock):
            raise TypeError(f"{command} sets no clock")
        if command.scope not in self._clocks:
            return f"{command.scope!r} is neither the power domain nor a pool: {', '.join(sorted(self._clocks))}"
        if not 0.0 < command.fraction <= 1.0:
            return f"{command.fraction:g} is not a fraction of the clock"
        now_ns = self._host.kernel.now_ns
        if command.brake:
            self._brake(command)
            self._done(command)
        else:
            self._host.kernel.at(now_ns + round(self._spec.actuation_s * NS_PER_S), self._set_clock, command)
        return None

    # Reading

    def energy_j(self, pool: str | None = None) -> float:
        """Joules of the domain, or of one pool in it, up to now."""
        self._advance()
        gone = sum(fj for name, fj in self._gone_fj.items() if pool in (None, name))
        here = sum(meter.energy_fj for meter in self._meters.values() if pool in (None, meter.instance.facts.pool))
        return (gone + here) / FJ_PER_J

    def instance_energy_j(self, instance: InstanceId) -> float:
        """Joules of an instance that is not gone, up to now."""
        self._advance()
        return self._meters[instance].energy_fj / FJ_PER_J

    # Inside

    def _advance(self) -> None:
        now_ns = self._host.kernel.now_ns
        for meter in self._meters.values():
            self._window_fj += meter.advance(now_ns)

    def _sample(self, _: None) -> None:
        self._advance()
        kernel, name, counters = self._host.kernel, self._spec.name, self.counters
        power_w = self._window_fj / ((kernel.now_ns - self._window_ns) * PS_PER_NS) / MW_PER_W
        self._window_fj, self._window_ns = 0, kernel.now_ns
        counters.samples += 1
        counters.violations += power_w > self._spec.budget_w
        counters.peak_w = max(counters.peak_w, power_w)
        self._host.sampled(name, power_w)
        if self._host.going_on():
            kernel.at(kernel.now_ns + round(self._spec.telemetry_s * NS_PER_S), self._sample)
        data = {"domain": name, "power_w": power_w, "budget_w": self._spec.budget_w}
        self._host.emit(Event("telemetry", kernel.now_ns, data=data))

    def _set_clock(self, command: SetClock) -> None:
        if self._clocks[command.scope] != command.fraction:
            self._clocks[command.scope] = command.fraction
            self.counters.clock_changes += 1
            self._apply(command.scope)
        self._done(command)

    def _brake(self, command: SetClock) -> None:
        end_ns = self._host.kernel.now_ns + round(self._spec.brake_s * NS_PER_S)
        self._braked[command.scope] = (command.fraction, end_ns)
        self.counters.brakes += 1
        self._apply(command.scope)
        self._host.kernel.at(end_ns, self._release, command.scope)

    def _release(self, scope: str) -> None:
        braked = self._braked.get(scope)
        if braked is not None and braked[1] <= self._host.kernel.now_ns:
            del self._braked[scope]
            self._apply(scope)

    def _apply(self, scope: str) -> None:
        """Give the instances of a scope their clocks."""
        for meter in self._meters.values():
            pool = meter.instance.facts.pool
            if scope in (self._spec.name, pool):
                self._window_fj += meter.advance(self._host.kernel.now_ns)
                self._tempos.clock(meter.instance.id, self._clock(pool))
                self._set_watts(meter)

    def _clock(self, pool: str) -> float:
        """The lowest of what is set for the pool, for the domain, and by brakes."""
        scopes = (self._spec.name, pool)
        set_clocks = [self._clocks.get(scope, 1.0) for scope in scopes]
        return min([*set_clocks, *[self._braked[scope][0] for scope in scopes if scope in self._braked]])

    def _set_watts(self, meter: _Meter) -> None:
        watts = self._tempos.power_w(meter.instance.id)
        idle, prompt, decode = [round((self._spec.other_w + meter.devices * each) * MW_PER_W) for each in watts]
        meter.watts_mw = (idle, prompt, decode)

    def _done(self, command: SetClock) -> None:
        data = {"command": command, "outcome": "done", "reason": ""}
        self._host.emit(Event("command", self._host.kernel.now_ns, data=data))
