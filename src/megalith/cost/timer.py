"""The contract between a simulated instance and whatever knows how long its steps take.

Steps are timed in integer picoseconds, so that a sum over a thousand steps has no rounding in it: leaping and stepping
agree to the last digit. Everything outside an instance is integer nanoseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

PS_PER_NS: Final = 1_000


class Prompt(NamedTuple):
    """One prompt chunk of a step, also a single decode when not all decodes are in."""

    new_tokens: int
    context_tokens: int
    samples: bool


class Line(NamedTuple):
    """Durations of consecutive steps of the same decodes: step j takes first_ps + j * slope_ps, for j below `steps`."""

    first_ps: int
    slope_ps: int
    steps: int

    def total_ps(self, steps: int) -> int:
        """Duration of the first `steps` steps together."""
        return steps * self.first_ps + self.slope_ps * (steps * (steps - 1) // 2)


class StepTimer(Protocol):
    """Times the steps of one instance: one model, one kind of device, one degree of tensor parallelism.

    `decodes` requests each compute one token; before the step they have `context_sum` tokens in the KV cache together
    and the longest has `context_max`. Pure: the same arguments give the same answer on every machine, so integer
    arithmetic, or floats without library functions that differ between machines.
    """

    def step_ps(self, prompts: Sequence[Prompt], decodes: int, context_sum: int, context_max: int) -> int:
        """Duration of one step, in picoseconds, above 0."""
        ...

    def decode_line(self, decodes: int, context_sum: int, context_max: int) -> Line:
        """Durations of the step of these decodes and of those that follow it.

        For every j below `steps`: first_ps + j * slope_ps == step_ps((), decodes, context_sum + j * decodes,
        context_max + j). A timer that has no straight pieces answers steps=1 and the simulator steps.
        """
        ...
