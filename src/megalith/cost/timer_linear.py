"""LinearTimer: steps from a handful of coefficients, exact in integers; for tests, toys and published models.

    with prompts:  step + prompt fixed + token * new + square * ((context + new)**2 - context**2)
    with decodes:  step + decode fixed + decode * decodes + context * tokens in the cache before the step

A step with both pays the larger of the two fixed parts once, for it reads the weights once. A prompt cut into chunks
costs the same squares as whole. A prompt chunk of one token counts as a decode. Knows no model and no device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megalith.base.errors import ConfigError
from megalith.cost.timer import Line, Prompt
from megalith.cost.timer_phases import (
    NO_END,
    POWER_EXPONENT,
    PhasePower,
    at_lower_clock,
    check_clock,
    check_factor,
    memory_slowdown,
    quick_line,
)


class PromptTerms(NamedTuple):
    """What prompts cost, in picoseconds."""

    fixed_ps: int
    token_ps: int
    square_ps: int = 0
    """Per square of a prompt's length: its causal attention is half a square of pairs."""


class DecodeTerms(NamedTuple):
    """What decodes cost, in picoseconds."""

    fixed_ps: int
    decode_ps: int
    context_ps: int
    """Per token in the cache."""


class LinearTimer:
    """See the module. `regimes` are other decode terms from a number of decodes on, ascending."""

    def __init__(
        self,
        prompt: PromptTerms,
        decode: DecodeTerms,
        step_ps: int = 0,
        regimes: Sequence[tuple[int, DecodeTerms]] = (),
        power: PhasePower | None = None,
    ) -> None:
        """Raises ConfigError when a step could take no time or regimes are out of order."""
        starts = [0, *[start for start, _ in regimes]]
        if starts != sorted(set(starts)):
            raise ConfigError(f"Decode regimes start at {starts[1:]}.", "Give them in ascending order, above 0.")
        for terms in (prompt, decode, *[terms for _, terms in regimes]):
            if min(terms) < 0 or step_ps < 0 or step_ps + sum(terms) <= 0:
                raise ConfigError(f"A step would take no time or less with {terms} and {step_ps} ps fixed.")
        self.prompt, self.decode, self.fixed_ps, self.regimes = prompt, decode, step_ps, tuple(regimes)
        self._power = power
        self._nominal, self._factor, self._clock = self, 1.0, 1.0

    def step_ps(self, prompts: Sequence[Prompt], decodes: int, context_sum: int, context_max: int) -> int:  # noqa: ARG002
        """See StepTimer."""
        if not prompts:
            fixed, each, per_token = self._terms(decodes) if self.regimes else self.decode
            return self.fixed_ps + fixed + each * decodes + per_token * context_sum
        tokens = squares = 0
        for new, context, _ in prompts:
            if new == 1:
                decodes += 1
                context_sum += context
            else:
                tokens += new
                squares += new * (new + 2 * context)
        prompt_fixed, token_ps, square_ps = self.prompt
        total = self.fixed_ps + token_ps * tokens + square_ps * squares
        if not decodes:
            return total + prompt_fixed
        fixed, each, per_token = self._terms(decodes) if self.regimes else self.decode
        if tokens and prompt_fixed > fixed:
            fixed = prompt_fixed
        return total + fixed + each * decodes + per_token * context_sum

    def decode_line(self, decodes: int, context_sum: int, context_max: int) -> Line:  # noqa: ARG002
        """See StepTimer; the line never ends."""
        fixed, each, per_token = self._terms(decodes) if self.regimes else self.decode
        return quick_line(
            (self.fixed_ps + fixed + each * decodes + per_token * context_sum, per_token * decodes, NO_END)
        )

    def _terms(self, decodes: int) -> DecodeTerms:
        terms = self.decode
        for start, other in self.regimes:
            if decodes < start:
                break
            terms = other
        return terms

    def scaled(self, factor: float) -> LinearTimer:
        """See DeviceTimer."""
        return self._nominal._slower(self._factor * check_factor(factor), self._clock)

    def at_clock(self, fraction: float) -> LinearTimer:
        """See DeviceTimer: prompts count as compute, decodes as memory, the fixed part of every step as neither."""
        return self._nominal._slower(self._factor, check_clock(fraction))

    def power_w(self, exponent: float = POWER_EXPONENT) -> PhasePower:
        """See DeviceTimer. Raises ConfigError when none was given."""
        if self._power is None:
            raise ConfigError(
                "This linear timer has no power figures.", "Give it a PhasePower, or use a catalogue device."
            )
        return at_lower_clock(self._power, self._clock, exponent)

    def _slower(self, factor: float, clock: float) -> LinearTimer:
        compute, memory = factor / clock, factor * memory_slowdown(clock)
        timer = LinearTimer(
            PromptTerms(*[round(term * compute) for term in self.prompt]),
            _times(self.decode, memory),
            round(self.fixed_ps * factor),
            [(start, _times(terms, memory)) for start, terms in self.regimes],
            self._power,
        )
        timer._nominal, timer._factor, timer._clock = self, factor, clock
        return timer


def _times(terms: DecodeTerms, factor: float) -> DecodeTerms:
    return DecodeTerms(*[round(term * factor) for term in terms])
