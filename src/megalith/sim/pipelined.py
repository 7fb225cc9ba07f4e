"""A simulated instance that is a pipeline: several steps of one scheduler under way, each in one stage.

Every stage takes the steps in the order in which they were planned, one at a time; tokens are there when a step leaves
the last stage. A step begins in a stage when it has left the one before and the stage is free. Nothing is leapt over:
with several groups of requests under way, each step is an event of its own.

How a stage sends (`PoolSpec.pipeline`): with `queue` what is sent waits at the next stage, and sending takes the
sender's time where the timer knows it. With `blocking` both ends meet: the sender waits until the next stage has let go
of the step before, and both are held while the bytes go. With `non-blocking` bytes go beside the work of both ends, one
message at a time on each link, and wait at the next stage.

The time between two tokens of a request is not the time of a step here: it is what lies between two steps that it was
in, so that is what is told of steps of decodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from megalith.cost.timer import PS_PER_NS, Prompt, StepTimer
from megalith.cost.timer_stages import SendingTimer
from megalith.cost.timer_vidur import StagedTimer
from megalith.policy.cluster import InstanceId
from megalith.policy.facts import Chunk, RequestId, StepPlan
from megalith.policy.pipelined import PipelinedScheduler
from megalith.policy.scheduler import Scheduler
from megalith.sim.instance import Instance
from megalith.sim.kernel import STEP_END, Kernel
from megalith.sim.live import Live
from megalith.sim.outlet import Outlet


class _Passage:
    """One step on its way through the stages."""

    __slots__ = ("begun_ps", "decoding", "end_ps", "last_ps", "plan", "prompts")

    def __init__(self, plan: StepPlan, decoding: list[RequestId], times_ps: tuple[int, int, int]) -> None:
        self.plan = plan
        self.decoding = decoding
        """Decodes that are listed, because not all were in the step."""
        self.prompts = [chunk for chunk in plan.listed if chunk.request_id not in decoding]
        self.begun_ps, self.last_ps, self.end_ps = times_ps
        """When it enters the first stage and the last, and when it leaves that."""


class PipelinedInstance(Instance):
    """See the module and Instance."""

    __slots__ = ("_begun", "_due", "_epoch", "_free_ps", "_link_ps", "_passages", "_tokens_ps", "mode", "pipeline")

    def __init__(
        self,
        instance_id: InstanceId,
        kernel: Kernel,
        scheduler: PipelinedScheduler,
        timer: StepTimer,
        out: Outlet,
        mode: str = "queue",
    ) -> None:
        super().__init__(instance_id, kernel, scheduler, timer, out, leap=False)
        self.pipeline = scheduler
        self.mode = mode
        self._link_ps = [0] * scheduler.stages
        """When the link behind each stage has sent all, where sending is beside computing."""
        self._free_ps = [0] * scheduler.stages
        """When each stage has taken all that was sent into it."""
        self._passages: list[_Passage] = []
        self._tokens_ps: dict[RequestId, int] = {}
        """When each decoding request got its last token."""
        self._due = False
        """The event that plans is due in this nanosecond."""
        self._epoch = 0
        """Events of an earlier life are void."""
        self._begun = 0

    # From outside

    def changed(self) -> None:
        """See Instance."""
        if not self.down and not self._due and len(self._passages) < self.pipeline.most_flights:
            self._due = True
            self.kernel.at(self.kernel.now_ns, self._wake, self._epoch, STEP_END + self.id)

    def sync(self, now_ns: int) -> None:
        """See Instance: it always is at a boundary, for nothing is leapt over."""

    def interrupt(self, now_ns: int) -> None:
        """See Instance."""

    @property
    def begun_ps(self) -> int:
        """See Instance: when the decodes that are being told of got their token before this one."""
        return self._begun

    def free_blocks(self) -> int:
        """See Instance."""
        return self.scheduler.kv.free_blocks

    def busy_ps(self, now_ns: int) -> tuple[int, int]:
        """See Instance; the last stage speaks for all."""
        prompt_ps, decode_ps, now_ps = self.busy_prompt_ps, self.busy_decode_ps, now_ns * PS_PER_NS
        for passage in self._passages:
            under_way = max(0, min(now_ps, passage.end_ps) - passage.last_ps)
            if passage.prompts:
                prompt_ps += under_way
            else:
                decode_ps += under_way
        return prompt_ps, decode_ps

    def at_boundary(self, call: Callable[[], object]) -> None:
        """See Instance: when the next step ends."""
        if self._passages:
            self._at_boundary.append(call)
        else:
            call()

    def joined(self, live: Live) -> None:
        """See Instance."""
        self.lives[live.request.id] = live
        live.generated = self.scheduler.progress(live.request.id).known - live.request.prompt_tokens
        self._tokens_ps[live.request.id] = self.kernel.now_ns * PS_PER_NS
        self.changed()

    def left(self, live: Live) -> None:
        """See Instance."""
        self._tokens_ps.pop(live.request.id, None)

    def fail(self) -> list[Live]:
        """See Instance."""
        self._passages.clear()
        self._tokens_ps.clear()
        self._epoch += 1
        self._due = False
        return super().fail()

    def restart(self, scheduler: Scheduler) -> None:
        """See Instance."""
        if not isinstance(scheduler, PipelinedScheduler):
            raise TypeError("a pipeline needs a scheduler for pipelines")
        super().restart(scheduler)
        self.pipeline = scheduler
        self._free_ps = [0] * scheduler.stages
        self._link_ps = [0] * scheduler.stages

    # Steps

    def _wake(self, epoch: int) -> None:
        if epoch == self._epoch and self._due:
            self.kernel.turn_ns, self.kernel.turn = self.kernel.now_ns, self.id
            self._due = False
            self._fill(self.kernel.now_ns * PS_PER_NS)

    def _fill(self, now_ps: int) -> None:
        """Plan steps while a stage has none, from `now_ps` on."""
        while len(self._passages) < self.pipeline.most_flights:
            plan = self.scheduler.plan()
            if plan.preempts:
                self._count_preempts(plan)
            if plan.empty:
                break
            self._send(plan, now_ps)
        if not self._passages:
            self._out.idle(self)

    def _send(self, plan: StepPlan, now_ps: int) -> None:
        decoding = [chunk.request_id for chunk in plan.listed if self._is_decode(chunk)]
        copies_ps = plan.copied_blocks * self.swap_block_ps
        stages_ps, send_ps = self._parts_ps(plan, decoding)
        begun_ps = at_ps = last_ps = max(now_ps, self._free_ps[0])
        if self.mode == "blocking":
            last_ps, at_ps = self._meet(begun_ps, [stage_ps + copies_ps for stage_ps in stages_ps], send_ps)
        else:
            for stage, duration_ps in enumerate(stages_ps):
                last_ps = max(at_ps, self._free_ps[stage])
                at_ps = left_ps = self._free_ps[stage] = last_ps + duration_ps + copies_ps
                if send_ps:
                    at_ps = self._link_ps[stage] = max(left_ps, self._link_ps[stage]) + send_ps
            at_ps = self._free_ps[-1]
        passage = _Passage(plan, decoding, (begun_ps, last_ps, at_ps))
        self._passages.append(passage)
        end_ns = -(-at_ps // PS_PER_NS)
        for request_id, new, context, _ in plan.listed:
            live = self.lives[request_id]
            if live.scheduled_ns < 0:
                live.scheduled_ns = self.kernel.now_ns
                live.cached_tokens = context
            if live.decode_instance >= 0:
                self._out.prompt_begins(self, live, new, end_ns)
        self.kernel.at(end_ns, self._leave, (self._epoch, passage), STEP_END + self.id)

    def _meet(self, begun_ps: int, stages_ps: list[int], send_ps: int) -> tuple[int, int]:
        """A step that every stage hands to the next one: when it enters the last stage, and when it leaves that."""
        free, at_ps = self._free_ps, begun_ps
        for stage in range(len(stages_ps) - 1):
            at_ps = free[stage] = max(at_ps + stages_ps[stage], free[stage + 1]) + send_ps
        free[-1] = at_ps + stages_ps[-1]
        return at_ps, free[-1]

    def _parts_ps(self, plan: StepPlan, decoding: list[RequestId]) -> tuple[tuple[int, ...], int]:
        """How long each stage takes, and sending where that is apart. Decodes that are listed count with the others."""
        decodes, contexts = plan.decodes, plan.decode_context_sum
        longest = self.pipeline.decodes_of(plan).context_max() if decodes else 0
        prompts = []
        for chunk in plan.listed:
            if chunk.request_id in decoding:
                context = chunk.context_tokens
                decodes, contexts, longest = decodes + 1, contexts + context, max(longest, context)
            else:
                prompts.append(Prompt(chunk.new_tokens, chunk.context_tokens, chunk.samples))
        timer, stages = self.timer, self.pipeline.stages
        if self.mode != "queue" and isinstance(timer, SendingTimer):
            return timer.parts_ps(prompts, decodes, contexts, longest)
        if isinstance(timer, StagedTimer):
            return timer.stages_ps(prompts, decodes, contexts, longest), 0
        # Layers are cut evenly; what sending between stages costs is not known to such a timer.
        even, rest = divmod(timer.step_ps(prompts, decodes, contexts, longest), stages)
        return (even + rest, *[even] * (stages - 1)), 0

    def _is_decode(self, chunk: Chunk) -> bool:
        """Whether a listed row is a decode, and not the end of a prompt or of what is computed again."""
        return chunk.new_tokens == 1 and chunk.request_id in self._tokens_ps

    def _leave(self, event: tuple[int, _Passage]) -> None:
        """A step leaves the last stage: its tokens are there."""
        epoch, passage = event
        if epoch != self._epoch:
            return
        plan, now_ns = passage.plan, self.kernel.now_ns
        self.kernel.turn_ns, self.kernel.turn = now_ns, self.id
        self._passages.remove(passage)
        finished: list[RequestId] = []
        decoding = [member.request.id for member in self.pipeline.decodes_of(plan).members] if plan.decodes else []
        decoding += [request_id for request_id in passage.decoding if request_id in self._tokens_ps]
        gaps = self._count_tokens(decoding, passage.end_ps, finished)
        sampled = self._count_sampled(passage, finished)
        self.scheduler.complete(plan, finished)
        self._tell(passage, gaps)
        for live in sampled:
            if live.first_ns < 0:
                live.first_ns = now_ns
                self._out.first_token(self, live)
            elif live.decode_instance >= 0:
                self._out.recomputed(self, live)
        for request_id in finished:
            live = self.lives.pop(request_id)
            self._tokens_ps.pop(request_id, None)
            live.finish_ns = now_ns
            self._out.finished(self, live)
        if self._at_boundary:
            calls, self._at_boundary = self._at_boundary, []
            for call in calls:
                call()
        if not self.down:
            self._due = False
            self._fill(passage.end_ps)

    def _count_tokens(self, decoding: list[RequestId], end_ps: int, finished: list[RequestId]) -> Counter[int]:
        """One token for each decode. Returns how many waited how long for it."""
        gaps: Counter[int] = Counter()
        tokens_ps, lives = self._tokens_ps, self.lives
        for request_id in decoding:
            live = lives[request_id]
            gaps[end_ps - tokens_ps[request_id]] += 1
            tokens_ps[request_id] = end_ps
            live.generated += 1
            if live.generated == live.output_tokens:
                finished.append(request_id)
        return gaps

    def _count_sampled(self, passage: _Passage, finished: list[RequestId]) -> list[Live]:
        """The requests whose prompts are done."""
        sampled = []
        for request_id, new, context, samples in passage.prompts:
            live = self.lives.get(request_id)
            if samples and live is not None:
                live.generated = context + new + 1 - live.request.prompt_tokens
                self._tokens_ps[request_id] = passage.end_ps
                sampled.append(live)
                if live.generated == live.output_tokens:
                    finished.append(request_id)
        return sampled

    def _tell(self, passage: _Passage, gaps: Counter[int]) -> None:
        last_ps = passage.end_ps - passage.last_ps
        self.steps += 1
        self.decode_tokens += sum(gaps.values())
        if passage.prompts:
            prompt_tokens = sum([chunk.new_tokens for chunk in passage.prompts])
            self.busy_prompt_ps += last_ps
            self.prompt_tokens += prompt_tokens
            self._begun = passage.begun_ps
            self._out.prompt_stepped(self, passage.end_ps - passage.begun_ps, prompt_tokens, 0)
        else:
            self.busy_decode_ps += last_ps
        for gap_ps, count in sorted(gaps.items()):
            self._begun = passage.end_ps - gap_ps
            self._out.stepped(self, gap_ps, 0, 1, count)
