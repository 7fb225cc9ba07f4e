"""A simulated instance with many models: before a step whose model is not on the device comes the copy of it.

Everything else is Instance: the wait lies between two steps, in integer picoseconds, so that leaps stay exact.
"""

from __future__ import annotations

from megalith.cost.timer import PS_PER_NS, Prompt, StepTimer
from megalith.policy.cluster import InstanceId
from megalith.policy.expert_turns import NO_MODEL, ExpertScheduler
from megalith.policy.scheduler import Scheduler
from megalith.sim.expert_weights import ExpertWeights
from megalith.sim.instance import Instance
from megalith.sim.kernel import STEP_END, Kernel
from megalith.sim.live import Live
from megalith.sim.outlet import Outlet


class ExpertInstance(Instance):
    """See the module and Instance."""

    __slots__ = ("_counted_turns", "_loaded", "_turns", "router_ps", "weights")

    def __init__(
        self,
        instance_id: InstanceId,
        kernel: Kernel,
        scheduler: ExpertScheduler,
        timer: StepTimer,
        out: Outlet,
        weights: ExpertWeights,
        leap: bool = True,
    ) -> None:
        super().__init__(instance_id, kernel, scheduler, timer, out, leap)
        self._turns = scheduler
        self.weights = weights
        self._loaded = NO_MODEL
        """The model that was waited for last."""
        self._counted_turns = 0
        self.router_ps = 0
        """Time in which the router read prompts."""

    def submit(self, live: Live) -> None:
        """See Instance."""
        super().submit(live)
        self._prefetch(self.kernel.now_ns * PS_PER_NS)

    def restart(self, scheduler: Scheduler) -> None:
        """See Instance. Device and host memory are filled as at the start by then."""
        if not isinstance(scheduler, ExpertScheduler):
            raise TypeError("an instance of many models needs a scheduler that takes turns")
        super().restart(scheduler)
        self._turns = scheduler
        self.weights = ExpertWeights(self.weights.shape, self.weights.counters)
        self._loaded, self._counted_turns = NO_MODEL, 0

    def _begin(self) -> None:
        model = self._turns.turn() if self.lives else NO_MODEL
        if model == NO_MODEL:
            super()._begin()
            return
        delay_ps, counters = 0, self.weights.counters
        if fresh := self._turns.fresh():
            counters.requests += len(fresh)
            counters.turns += self._turns.turns - self._counted_turns
            self._counted_turns = self._turns.turns
            if self.weights.shape.options.router:
                delay_ps = self.timer.step_ps([Prompt(one.prompt_tokens, 0, True) for one in fresh], 0, 0, 0)
                self.router_ps += delay_ps
        if model != self._loaded:
            self._loaded = model
            delay_ps += self.weights.need(model, self._begun_ps + delay_ps)
        self._prefetch(self._begun_ps + delay_ps)
        if not delay_ps:
            super()._begin()
            return
        self._running, self._steps, self._plan = True, 0, None
        self._begun_ps += delay_ps
        self._version = version = self._version + 1
        self.kernel.at(-(-self._begun_ps // PS_PER_NS), self._end, version, STEP_END + self.id)

    def _prefetch(self, now_ps: int) -> None:
        """Begin to copy the model whose turn comes next, if a turn is on."""
        if self.weights.shape.options.prefetch and self._loaded != NO_MODEL:
            model = self._turns.next_model()
            if model not in (NO_MODEL, self._loaded):
                self.weights.prefetch(model, now_ps, (self._loaded,))
