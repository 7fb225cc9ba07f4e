"""Published coefficient models as timers, by name, from catalog/timers/*.toml.

Knows names, units and sources of published figures; computes nothing but units.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from megalith.base.config import Config
from megalith.cost.timer_linear import DecodeTerms, LinearTimer, PromptTerms
from megalith.cost.timer_phases import PhasePower
from megalith.specs import catalog

_PS_PER_MS = 1_000_000_000


class PublishedRegime(Config, kw_only=True):
    """Decode steps from `from_decodes` decodes on, in milliseconds."""

    from_decodes: int
    fixed_ms: float
    per_decode_ms: float
    per_context_token_ms: float

    def terms(self) -> DecodeTerms:
        """In whole picoseconds."""
        return DecodeTerms(in_ps(self.fixed_ms), in_ps(self.per_decode_ms), in_ps(self.per_context_token_ms))


class PublishedTimer(Config, kw_only=True):
    """One published model of step times, in milliseconds as printed; see `timer_linear` for the terms."""

    title: str
    model: str
    """Catalogue name of the model it was measured on or resembles."""
    device: str
    tensor_parallel: int = 1
    step_ms: float = 0.0
    prompt_fixed_ms: float
    prompt_token_ms: float
    prompt_square_ms: float = 0.0
    decode_fixed_ms: float
    per_decode_ms: float = 0.0
    per_context_token_ms: float = 0.0
    regimes: tuple[PublishedRegime, ...] = ()
    kv_tokens: int | None = None
    """KV capacity of one instance in tokens, where it was published."""
    power_w: tuple[float, float, float] | None = None
    """Idle, prompt and decode watts of one device, where they were published."""
    source: str
    date: str

    def timer(self) -> LinearTimer:
        """The timer of these figures, rounded to whole picoseconds."""
        return LinearTimer(
            PromptTerms(in_ps(self.prompt_fixed_ms), in_ps(self.prompt_token_ms), in_ps(self.prompt_square_ms)),
            DecodeTerms(in_ps(self.decode_fixed_ms), in_ps(self.per_decode_ms), in_ps(self.per_context_token_ms)),
            in_ps(self.step_ms),
            [(regime.from_decodes, regime.terms()) for regime in self.regimes],
            PhasePower(*self.power_w) if self.power_w else None,
        )  # fmt: skip


@functools.cache
def published_timers() -> Mapping[str, PublishedTimer]:
    """Every published timer of the catalogue by its name."""
    return catalog.entries("timers", "timers", PublishedTimer)


def published(name: str) -> PublishedTimer:
    """The published timer of that name. Raises ConfigError with the nearest names."""
    return catalog.named(name, published_timers(), "published timer")


def in_ps(milliseconds: float) -> int:
    """Milliseconds as printed, in whole picoseconds."""
    return round(milliseconds * _PS_PER_MS)
