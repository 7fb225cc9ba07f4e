"""The timers of instances under everything that slows them: stragglers, moves, a lower clock.

Knows device timers and factors; must not know why an instance is slow. A step under way keeps its length; the steps
after it take the new one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from megalith.cost.timer import StepTimer
from megalith.cost.timer_phases import DeviceTimer, PhasePower, check_clock, check_factor
from megalith.policy.cluster import InstanceFacts, InstanceId
from megalith.sim.kernel import Kernel


class Paced(Protocol):
    """An instance whose timer can be changed."""

    timer: StepTimer
    """Asked whenever a step or leap begins."""

    @property
    def id(self) -> InstanceId:
        """Its number."""
        ...

    @property
    def facts(self) -> InstanceFacts:
        """Its clock is told to policies."""
        ...

    def interrupt(self, now_ns: int) -> None:
        """Let a leap end with the step under way."""
        ...


@dataclass(slots=True)
class _Tempo:
    instance: Paced
    nominal: DeviceTimer
    factors: dict[str, float] = field(default_factory=dict)
    """By cause."""
    clock: float = 1.0


class Tempos:
    """Sets the timers of instances. One is made for each speed and shared, for timers remember what they found."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._tempos: dict[InstanceId, _Tempo] = {}
        self._timers: dict[tuple[DeviceTimer, float, float], DeviceTimer] = {}

    def add(self, instance: Paced, timer: DeviceTimer) -> None:
        """An instance exists, and has this timer at full speed."""
        self._tempos[instance.id] = _Tempo(instance, timer)

    def remove(self, instance: InstanceId) -> None:
        """It is gone."""
        self._tempos.pop(instance, None)

    def slow(self, instance: InstanceId, factor: float, cause: str = "moving") -> None:
        """For this cause its steps take `factor` times as long from now on; causes multiply, and 1 ends one."""
        tempo = self._tempos.get(instance)
        if tempo is not None and tempo.factors.get(cause, 1.0) != check_factor(factor):
            tempo.factors[cause] = factor
            self._set(tempo)

    def clock(self, instance: InstanceId, fraction: float) -> None:
        """It runs at this fraction of its highest clock from now on."""
        tempo = self._tempos.get(instance)
        if tempo is not None and tempo.clock != check_clock(fraction):
            tempo.clock = fraction
            self._set(tempo)
            tempo.instance.facts.clock = fraction

    def clock_of(self, instance: InstanceId) -> float:
        """Its clock now. KeyError when it was not added."""
        return self._tempos[instance].clock

    def power_w(self, instance: InstanceId) -> PhasePower:
        """What one of its devices draws at its clock. KeyError when it was not added."""
        tempo = self._tempos[instance]
        return self._timer(tempo.nominal, 1.0, tempo.clock).power_w()

    def _set(self, tempo: _Tempo) -> None:
        factor = 1.0
        for cause in sorted(tempo.factors):
            factor *= tempo.factors[cause]
        tempo.instance.interrupt(self._kernel.now_ns)
        tempo.instance.timer = self._timer(tempo.nominal, factor, tempo.clock)

    def _timer(self, nominal: DeviceTimer, factor: float, clock: float) -> DeviceTimer:
        if factor == 1.0 and clock == 1.0:
            return nominal
        timer = self._timers.get((nominal, factor, clock))
        if timer is None:
            timer = nominal if clock == 1.0 else nominal.at_clock(clock)
            timer = timer if factor == 1.0 else timer.scaled(factor)
            self._timers[nominal, factor, clock] = timer
        return timer
