"""An instance that lends KV memory to others or borrows from them: its steps wait for theirs, or do their attention.

As long as it does neither, it is an Instance and leaps. While it does, it steps: what a step takes is asked for when it
begins (sim/pooled_steps.py), for it depends on what the other instances do at that time.
"""

from __future__ import annotations

from collections.abc import Callable

from megalith.cost.timer import PS_PER_NS, StepTimer
from megalith.policy.cluster import InstanceId
from megalith.policy.facts import StepPlan
from megalith.policy.pooled_memory import PooledScheduler
from megalith.policy.scheduler import Scheduler
from megalith.sim.instance import Instance
from megalith.sim.kernel import STEP_END, Kernel
from megalith.sim.outlet import Outlet


class PooledInstance(Instance):
    """See the module and Instance."""

    __slots__ = ("_leaps", "coupled", "memory", "rested", "stretch")

    def __init__(
        self,
        instance_id: InstanceId,
        kernel: Kernel,
        scheduler: PooledScheduler,
        timer: StepTimer,
        out: Outlet,
        leap: bool = True,
    ) -> None:
        super().__init__(instance_id, kernel, scheduler, timer, out, leap)
        self.memory = scheduler
        """The scheduler, as one that lends and borrows."""
        self._leaps = leap
        self.coupled = False
        """It holds KV of others, or others hold KV of its requests."""
        self.rested = True
        """No step ran before the one that begins now."""
        self.stretch: Callable[[PooledInstance, StepPlan, int], int] | None = None
        """(instance, plan, duration by itself) -> how much longer (ps) the step takes; below 0 where attention that is
        done elsewhere is more than is waited for."""

    @property
    def resting(self) -> bool:
        """No step is under way or about to begin."""
        return not self._running

    def restart(self, scheduler: Scheduler) -> None:
        """See Instance."""
        if not isinstance(scheduler, PooledScheduler):
            raise TypeError("an instance that lends memory needs a scheduler that does")
        super().restart(scheduler)
        self.memory = scheduler

    def _begin(self) -> None:
        self._leap = self._leaps and not self.coupled
        super()._begin()
        plan = self._plan
        if plan is None or not self._steps:
            self.rested = True
            return
        if self.coupled and self._steps == 1 and self.stretch is not None:
            longer = self.stretch(self, plan, self._first_ps)
            if longer:
                self._first_ps += longer
                self._end_ps += longer
                self._version = version = self._version + 1
                self.kernel.at(-(-self._end_ps // PS_PER_NS), self._end, version, STEP_END + self.id)
        self.rested = False
