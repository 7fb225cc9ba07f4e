"""Stages of a pipeline and what sending between them takes, for timers that do not know by themselves.

A stage sends one row of hidden values a token, so a message of n rows takes n * hidden * bytes of a value / bandwidth
+ latency. Layers are cut evenly. Knows no cluster and no schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from megalith.base.units import NS_PER_S
from megalith.cost.timer import PS_PER_NS, Line, Prompt, StepTimer
from megalith.cost.timer_around import AroundTimer
from megalith.cost.timer_phases import DeviceTimer

VALUE_BYTES = 2
"""Of a hidden value on its way: 16-bit floats."""


@runtime_checkable
class SendingTimer(StepTimer, Protocol):
    """A timer of a pipeline that tells computing from sending."""

    def parts_ps(
        self, prompts: Sequence[Prompt], decodes: int, context_sum: int, context_max: int
    ) -> tuple[tuple[int, ...], int]:
        """(what each stage computes, in order, what sending from one to the next takes), in picoseconds.

        As for StagedTimer all decodes are counted in `decodes`.
        """
        ...


class LinkedTimer(AroundTimer):
    """A DeviceTimer and SendingTimer: an even cut of another timer's steps, joined by links of one bandwidth."""

    def __init__(self, inner: DeviceTimer, stages: int, row_bytes: int, bytes_per_s: float, latency_ns: float) -> None:
        self.inner, self.stages = inner, stages
        self._link = row_bytes, bytes_per_s, latency_ns

    def parts_ps(
        self, prompts: Sequence[Prompt], decodes: int, context_sum: int, context_max: int
    ) -> tuple[tuple[int, ...], int]:
        """See SendingTimer. A straggler or a lower clock does not slow the links."""
        even, rest = divmod(self.inner.step_ps(prompts, decodes, context_sum, context_max), self.stages)
        rows = decodes + sum([one.new_tokens for one in prompts])
        row_bytes, bytes_per_s, latency_ns = self._link
        send_ps = round((rows * row_bytes * NS_PER_S / bytes_per_s + latency_ns) * PS_PER_NS)
        return (even + rest, *[even] * (self.stages - 1)), send_ps

    def step_ps(self, prompts: Sequence[Prompt], decodes: int, context_sum: int, context_max: int) -> int:
        """See StepTimer: a step that is alone in the pipeline."""
        stages, send_ps = self.parts_ps(prompts, decodes, context_sum, context_max)
        return sum(stages) + (self.stages - 1) * send_ps

    def decode_line(self, decodes: int, context_sum: int, context_max: int) -> Line:
        """See StepTimer."""
        first, slope, steps = self.inner.decode_line(decodes, context_sum, context_max)
        row_bytes, bytes_per_s, latency_ns = self._link
        send_ps = round((decodes * row_bytes * NS_PER_S / bytes_per_s + latency_ns) * PS_PER_NS)
        return Line(first + (self.stages - 1) * send_ps, slope, steps)

    def around(self, inner: DeviceTimer) -> LinkedTimer:
        """See AroundTimer."""
        return LinkedTimer(inner, self.stages, *self._link)
