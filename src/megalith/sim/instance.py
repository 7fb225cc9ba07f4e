"""One simulated instance: a real Scheduler whose steps take the time that a StepTimer says.

It forms a plan, asks how long it takes, and comes back when it is over. A plan of decodes that may be repeated is run
as one leap: the sum of a line, in integers, up to the first request that ends, the end of the plan's repeats or of the
line. Whatever arrives meanwhile cuts the leap at the next step boundary. Tokens, times and decisions are those of
stepping (`leap=False`), to the nanosecond.

Inside, time is integer picoseconds; a boundary is seen from outside at the next whole nanosecond.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from heapq import heapify, heappop, heappush
from math import isqrt
from typing import Final

from megalith.cost.timer import PS_PER_NS, Prompt, StepTimer
from megalith.policy.cluster import InstanceFacts, InstanceId
from megalith.policy.facts import RequestId, StepPlan
from megalith.policy.scheduler import Scheduler
from megalith.sim.kernel import STEP_END, Kernel
from megalith.sim.live import NEVER, Live
from megalith.sim.outlet import Outlet

quick_prompt: Final[Callable[[tuple[int, int, bool]], Prompt]] = partial(tuple.__new__, Prompt)
"""`Prompt(*fields)` without the Python call that a NamedTuple's constructor is."""


class Instance:
    """See the module. `id` is its number in the cluster; `leap=False` runs one step at a time."""

    __slots__ = (
        "_at_boundary", "_begun_ps", "_cohort", "_end_ps", "_finishes", "_first_ps", "_leap", "_listed_decodes",
        "_out", "_plan", "_prompt_tokens", "_running", "_slope_ps", "_steps", "_version", "busy_decode_ps",
        "busy_prompt_ps", "decode_tokens", "down", "facts", "id", "kernel", "lives", "prompt_steps_to",
        "prompt_tokens", "scheduler", "stalled", "steps", "steps_to", "swap_block_ps",
        "timer",
    )  # fmt: skip

    def __init__(
        self,
        instance_id: InstanceId,
        kernel: Kernel,
        scheduler: Scheduler,
        timer: StepTimer,
        out: Outlet,
        leap: bool = True,
    ) -> None:
        self.id = instance_id
        self.kernel = kernel
        self.scheduler = scheduler
        self.timer = timer
        self.lives: dict[RequestId, Live] = {}
        """All requests that are here."""
        self.busy_prompt_ps = self.busy_decode_ps = 0
        """Time in steps with prompt chunks and in steps of decodes alone, as of the last boundary that was counted."""
        self.steps = self.prompt_tokens = self.decode_tokens = 0
        """Steps run, prompt tokens computed and tokens given to decodes, as of that boundary."""
        self.stalled = 0
        """Requests that decode here and get no token from the step with prompts that is under way or just over."""
        self.down = False
        self.facts: InstanceFacts
        """What policies see of it; the cluster sets it."""
        self.steps_to: Callable[[int, int, int, int], object] | None = None
        self.prompt_steps_to: Callable[[int, int, int], object] | None = None
        """Where steps are recorded (sim/gaps.py, StepSink) as long as nobody stalls and nothing else needs to hear of
        them; None: the outlet is told."""
        self.swap_block_ps = 0
        """What copying one block between device and host takes; a step waits for the copies before it."""
        self._out = out
        self._leap = leap
        self._cohort = scheduler.cohort
        self._finishes: list[tuple[int, RequestId, Live]] = []
        """A heap of (clock of the cohort, id, request): who of those that decode has its last token when."""
        self._at_boundary: list[Callable[[], object]] = []
        self._version = 0
        """Of the event that ends the step or leap; an older one is void."""
        self._running = False
        """A step is under way, or the event that begins one is due."""
        self._plan: StepPlan | None = None
        self._begun_ps = self._end_ps = self._first_ps = self._slope_ps = self._steps = self._prompt_tokens = 0
        self._listed_decodes = 0

    # From outside

    def submit(self, live: Live) -> None:
        """A request comes now. Raises what Scheduler.add raises, and then nothing has changed."""
        self.scheduler.add(live.request, live.generated)
        self.lives[live.request.id] = live
        self.changed()

    def changed(self) -> None:
        """The scheduler was given something: see to it at the next step boundary, or at once."""
        if not self._running:
            if not self.down:
                self._running = True
                self._version += 1
                self._plan = None
                self._begun_ps = self.kernel.now_ns * PS_PER_NS
                self.kernel.at(self.kernel.now_ns, self._end, self._version, STEP_END + self.id)
        elif self._steps > 1:
            self._cut()

    def sync(self, now_ns: int) -> None:
        """Bring the scheduler to the last step boundary before `now_ns`; the step under way goes on."""
        if self._steps > 1 and (done := self._boundaries_before(now_ns)) > 0:
            plan = self._plan
            if plan is None:
                raise RuntimeError("a leap without a plan")
            self.scheduler.complete(plan, (), done, under_way=True)
            duration = self._leap_ps(done)
            self._count_leap(plan.decodes, done, duration)
            self._begun_ps += duration
            self._first_ps += self._slope_ps * done
            self._steps -= done

    @property
    def begun_ps(self) -> int:
        """When the step or leap under way began; while the outlet is told of steps, when those began."""
        return self._begun_ps

    def free_blocks(self) -> int:
        """Blocks that can be had at once, as of the last step boundary before now."""
        done = self._boundaries_before(self.kernel.now_ns) if self._steps > 1 else 0
        return self._cohort.free_after(done)

    def spent(self) -> tuple[int, int, int, int]:
        """Up to the last boundary before now: ps in steps with prompts, ps in steps of decodes, prompt tokens computed,
        tokens given to decodes."""
        plan, done = self._plan, self._boundaries_before(self.kernel.now_ns) if self._steps > 1 else 0
        if plan is None or not done:
            return self.busy_prompt_ps, self.busy_decode_ps, self.prompt_tokens, self.decode_tokens
        decode_ps = self.busy_decode_ps + self._leap_ps(done)
        return self.busy_prompt_ps, decode_ps, self.prompt_tokens, self.decode_tokens + done * plan.decodes

    def busy_ps(self, now_ns: int) -> tuple[int, int]:
        """Up to now, the step under way included: ps in steps with prompts, ps in steps of decodes alone."""
        plan, prompt_ps, decode_ps = self._plan, self.busy_prompt_ps, self.busy_decode_ps
        if plan is not None:
            under_way = max(0, min(now_ns * PS_PER_NS, self._end_ps) - self._begun_ps)
            if plan.listed or plan.preempts or plan.resumes:
                prompt_ps += under_way
            else:
                decode_ps += under_way
        return prompt_ps, decode_ps

    def interrupt(self, now_ns: int) -> None:
        """sync(), and let a leap end with the step under way: to be called before requests come or go by other ways."""
        self.sync(now_ns)
        if self._steps > 1:
            self._cut()

    def at_boundary(self, call: Callable[[], object]) -> None:
        """Call `call` when the step under way ends, before the next is planned; at once when none is."""
        if self._running and self._plan is not None:
            self._at_boundary.append(call)
            if self._steps > 1:
                self._cut()
        else:
            call()

    def joined(self, live: Live) -> None:
        """A request whose KV came from elsewhere was committed: it decodes here, after the step under way."""
        self.lives[live.request.id] = live
        if live.finish_clock != NEVER:
            self._forget(live)
        live.generated = self.scheduler.progress(live.request.id).known - live.request.prompt_tokens
        ahead = self._steps if self._plan is not None and self._plan.decodes else 0
        self._follow(live, live.generated - ahead)
        self.changed()

    def wake(self, now_ns: int) -> None:  # noqa: ARG002 - the name that movers know
        """changed(), for those who move KV."""
        self.changed()

    def left(self, live: Live) -> None:
        """A request was held, departed or aborted: its end is not to be waited for here."""
        if live.finish_clock != NEVER:
            live.generated = live.output_tokens - (live.finish_clock - self._cohort.clock)
            self._forget(live)

    def fail(self) -> list[Live]:
        """The instance dies: its KV is lost, the step under way never ends. Returns all requests that were here."""
        self.sync(self.kernel.now_ns)
        self.down = True
        self._running = False
        self._version += 1
        self._plan = None
        self._steps = 0
        self._at_boundary.clear()
        lost = list(self.lives.values())
        for live in lost:
            self.left(live)
        self.lives.clear()
        return lost

    def restart(self, scheduler: Scheduler) -> None:
        """It is up again, with an empty KV cache."""
        self.scheduler, self._cohort, self.down = scheduler, scheduler.cohort, False

    # Steps

    def _begin(self) -> None:
        if not self.lives:
            self._rest()
            return
        cohort, heap = self._cohort, self._finishes
        most = heap[0][0] - cohort.clock if heap else 1
        self._plan = plan = self.scheduler.plan(most - 1)
        decodes = plan.decodes
        if plan.listed or (decodes and (plan.preempts or plan.resumes)):
            self._begin_prompts(plan)
        elif decodes:
            first, slope, steps = self.timer.decode_line(decodes, plan.decode_context_sum, cohort.context_max())
            if steps > most:
                steps = most
            if steps > plan.repeats:
                steps = plan.repeats + 1
            if not self._leap:
                steps = 1
            self._first_ps, self._slope_ps, self._steps = first, slope, steps
            self._end_ps = self._begun_ps + self._leap_ps(steps)
        else:
            # Preempts alone: KV on its way here holds the blocks that the last one running needs; its coming wakes us.
            self._count_preempts(plan)
            self._rest()
            return
        self._version = version = self._version + 1
        self.kernel.at(-(-self._end_ps // PS_PER_NS), self._end, version, STEP_END + self.id)

    def _begin_prompts(self, plan: StepPlan) -> None:
        """A step with prompt chunks, or one before which somebody stepped aside."""
        if plan.preempts:
            self._count_preempts(plan)
        cohort, decodes, lives, now_ns = self._cohort, plan.decodes, self.lives, self.kernel.now_ns
        prompts: list[Prompt] = []
        parted: list[tuple[Live, int]] = []
        tokens = listed_decodes = 0
        for request_id, new, context, samples in plan.listed:
            prompts.append(quick_prompt((new, context, samples)))
            live = lives[request_id]
            if new == 1 and context >= live.request.prompt_tokens:
                listed_decodes += 1
            else:
                tokens += new
            if live.scheduled_ns < 0:
                live.scheduled_ns = now_ns
                live.cached_tokens = context
            if live.decode_instance >= 0:
                parted.append((live, new))
        longest = cohort.context_max() if decodes else 0
        duration = self.timer.step_ps(prompts, decodes, plan.decode_context_sum, longest)
        if plan.preempts or plan.resumes:
            duration += plan.copied_blocks * self.swap_block_ps
        self._first_ps, self._slope_ps, self._steps, self._prompt_tokens = duration, 0, 1, tokens
        self._listed_decodes = listed_decodes
        self._end_ps = end_ps = self._begun_ps + duration
        self.stalled = 0 if decodes else len(cohort.members)
        for live, new in parted:
            self._out.prompt_begins(self, live, new, -(-end_ps // PS_PER_NS))

    def _rest(self) -> None:
        self._running, self._steps, self._plan = False, 0, None
        self._out.idle(self)

    def _count_preempts(self, plan: StepPlan) -> None:
        for preempt in plan.preempts:
            live = self.lives[preempt.request_id]
            self.left(live)
            live.preemptions += 1
            self._out.preempted(self, live)

    def _end(self, version: int) -> None:
        """The step or leap is over: count it, let requests go, and begin the next."""
        if version != self._version:
            return
        kernel = self.kernel
        kernel.turn_ns, kernel.turn = kernel.now_ns, self.id
        plan = self._plan
        if plan is not None:
            decodes, steps, heap = plan.decodes, self._steps, self._finishes
            finished: list[Live] = []
            ids: list[RequestId] = []
            if decodes and heap:
                clock = self._cohort.clock + steps
                while heap and heap[0][0] <= clock:
                    _, request_id, live = heappop(heap)
                    finished.append(live)
                    ids.append(request_id)
            if plan.listed or plan.preempts or plan.resumes:
                self._end_prompts(plan, finished, ids)
            else:
                self.scheduler.complete(plan, ids, steps)
                self._count_leap(decodes, steps, self._end_ps - self._begun_ps)
                self._begun_ps = self._end_ps
                self._steps, self._plan = 0, None
            if finished:
                self._let_go(finished)
            if self._at_boundary:
                calls, self._at_boundary = self._at_boundary, []
                for call in calls:
                    call()
        if not self.down:
            self._begin()

    def _end_prompts(self, plan: StepPlan, finished: list[Live], ids: list[RequestId]) -> None:
        """A step with prompt chunks is over; adds those to `finished` and their `ids` that have all their tokens."""
        lives, sampled = self.lives, []
        for request_id, new, context, samples in plan.listed:
            if samples and (live := lives.get(request_id)) is not None:
                if live.finish_clock != NEVER:  # it decodes, and not all decodes are in the step
                    self._forget(live)
                live.generated = generated = context + new + 1 - live.request.prompt_tokens
                if generated == live.output_tokens:
                    finished.append(live)
                    ids.append(request_id)
                sampled.append(live)
        self.scheduler.complete(plan, ids)
        duration, tokens, decodes = self._first_ps, self._prompt_tokens, plan.decodes + self._listed_decodes
        self.steps += 1
        self.busy_prompt_ps += duration
        self.prompt_tokens += tokens
        self.decode_tokens += decodes
        if self.prompt_steps_to is None or self.stalled:
            self._out.prompt_stepped(self, duration, tokens, decodes)
        else:
            self.prompt_steps_to(duration, tokens, decodes)
        self._begun_ps, self._steps, self._plan = self._end_ps, 0, None
        clock, now_ns = self._cohort.clock, self.kernel.now_ns
        for live in sampled:
            left = live.output_tokens - live.generated
            if left > 0:
                live.finish_clock = finish = clock + left
                heappush(self._finishes, (finish, live.request.id, live))
            if live.first_ns < 0:
                live.first_ns = now_ns
                self._out.first_token(self, live)
            elif live.decode_instance >= 0:
                self._out.recomputed(self, live)

    def _let_go(self, finished: list[Live]) -> None:
        now_ns = self.kernel.now_ns
        for live in finished:
            del self.lives[live.request.id]
            live.finish_clock = NEVER
            live.generated = live.output_tokens
            live.finish_ns = now_ns
            self._out.finished(self, live)

    def _follow(self, live: Live, generated: int) -> None:
        """Wait for the end of a request that has `generated` tokens and decodes from the next step on."""
        live.finish_clock = clock = self._cohort.clock + live.output_tokens - generated
        heappush(self._finishes, (clock, live.request.id, live))

    def _forget(self, live: Live) -> None:
        """Do not wait for its end any more. O(batch); rare, for most stay until their end."""
        live.finish_clock = NEVER
        self._finishes = [entry for entry in self._finishes if entry[2] is not live]
        heapify(self._finishes)

    def _count_leap(self, decodes: int, steps: int, duration_ps: int) -> None:
        self.steps += steps
        self.decode_tokens += steps * decodes
        self.busy_decode_ps += duration_ps
        if self.steps_to is None:
            self._out.stepped(self, self._first_ps, self._slope_ps, steps, decodes)
        else:
            self.steps_to(self._first_ps, self._slope_ps, steps, decodes)

    def _cut(self) -> None:
        """End a leap at the first boundary that is not before now."""
        steps = self._boundaries_before(self.kernel.now_ns) + 1
        if steps < self._steps:
            self._steps = steps
            self._end_ps = end_ps = self._begun_ps + self._leap_ps(steps)
            self._version = version = self._version + 1
            self.kernel.at(-(-end_ps // PS_PER_NS), self._end, version, STEP_END + self.id)

    def _leap_ps(self, steps: int) -> int:
        """Duration of the next `steps` steps of the leap under way; `Line.total_ps` without a Line, for speed."""
        return steps * self._first_ps + self._slope_ps * (steps * (steps - 1) // 2)

    def _boundaries_before(self, now_ns: int) -> int:
        """Steps of the leap that are over before `now_ns`: the largest k < steps with
        k * first + slope * k * (k - 1) / 2 <= time, in integers."""
        kernel = self.kernel
        # Steps that end in one nanosecond end by instance: ours was over before that of a later one.
        over_ns = now_ns if kernel.turn_ns == now_ns and kernel.turn > self.id else now_ns - 1
        time_ps = over_ns * PS_PER_NS - self._begun_ps
        first, slope = self._first_ps, self._slope_ps
        if time_ps < first:
            return 0
        if slope:
            # k = (sqrt(b**2 + 2 slope time) - b) / slope with b = first - slope / 2, all doubled to stay whole.
            b = 2 * first - slope
            k = (isqrt(b * b + 8 * slope * time_ps) - b) // (2 * slope)
        else:
            k = time_ps // first
        return min(k, self._steps - 1)
