"""Padding: steps as an engine computes them that makes every batch a rectangle, and what that wastes.

The prompt chunks of a step are computed as (number of chunks) x (the longest), the decodes as if each had the longest
context among them. Engines that pack rows compute real tokens only, as all timers here do by themselves. EnergonAI
(Du et al., 2022, arXiv:2209.02341) calls the packing redundant computation elimination: padding goes before the linear
layers and comes back for attention only. Knows no cluster.
"""

from __future__ import annotations

from collections.abc import Sequence

from megalith.cost import parameters as counting
from megalith.cost.timer import Line, Prompt
from megalith.cost.timer_around import AroundTimer
from megalith.cost.timer_phases import DeviceTimer
from megalith.cost.timer_stages import SendingTimer
from megalith.cost.timer_vidur import StagedTimer
from megalith.specs.model import ModelSpec


def padded(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The rectangle that these chunks are computed as: all of the most new tokens behind the longest context."""
    if not prompts:
        return []
    new, context = max(one.new_tokens for one in prompts), max(one.context_tokens for one in prompts)
    return [Prompt(new, context, one.samples) for one in prompts]


def waste(lengths: Sequence[int]) -> float:
    """Computed tokens over real ones in a batch: B * max / sum."""
    return len(lengths) * max(lengths) / sum(lengths)


def linear_flops(spec: ModelSpec, prompts: Sequence[Prompt]) -> int:
    """FLOPs of the linear layers over these chunks, two for a multiply-add; no head."""
    return 2 * counting.layer_macs(spec) * sum(one.new_tokens for one in prompts)


def attention_flops(spec: ModelSpec, prompts: Sequence[Prompt]) -> int:
    """FLOPs of scores and sums of these chunks over what each row sees."""
    pairs = sum(counting.chunk_pairs(spec, one.new_tokens, one.context_tokens) for one in prompts)
    return 2 * 2 * spec.num_heads * spec.head_dim * pairs


class PaddedTimer(AroundTimer):
    """The DeviceTimer of an engine that pads, around the timer of one that does not."""

    def __init__(self, inner: DeviceTimer) -> None:
        self.inner = inner

    def step_ps(self, prompts: Sequence[Prompt], decodes: int, context_sum: int, context_max: int) -> int:  # noqa: ARG002
        """See StepTimer."""
        return self.inner.step_ps(padded(prompts), decodes, decodes * context_max, context_max)

    def decode_line(self, decodes: int, context_sum: int, context_max: int) -> Line:  # noqa: ARG002
        """See StepTimer: all contexts are the longest, and grow with it."""
        return self.inner.decode_line(decodes, decodes * context_max, context_max)

    def around(self, inner: DeviceTimer) -> PaddedTimer:
        """See AroundTimer."""
        return pad(inner)


class PaddedStages(PaddedTimer):
    """The same for a timer that knows the stages of a pipeline, or what sending between them takes."""

    def stages_ps(self, prompts: Sequence[Prompt], decodes: int, context_sum: int, context_max: int) -> tuple[int, ...]:  # noqa: ARG002
        """See StagedTimer."""
        if not isinstance(self.inner, StagedTimer):
            raise TypeError("the timer that is padded knows no stages")
        return self.inner.stages_ps(padded(prompts), decodes, decodes * context_max, context_max)

    def parts_ps(
        self,
        prompts: Sequence[Prompt],
        decodes: int,
        context_sum: int,  # noqa: ARG002
        context_max: int,
    ) -> tuple[tuple[int, ...], int]:
        """See SendingTimer: what is sent is padded too."""
        if not isinstance(self.inner, SendingTimer):
            raise TypeError("the timer that is padded does not know what sending takes")
        return self.inner.parts_ps(padded(prompts), decodes, decodes * context_max, context_max)


def pad(inner: DeviceTimer) -> PaddedTimer:
    """The timer of an engine that pads."""
    return PaddedStages(inner) if isinstance(inner, (StagedTimer, SendingTimer)) else PaddedTimer(inner)
