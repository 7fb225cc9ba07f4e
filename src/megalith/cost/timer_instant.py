"""A timer whose steps take next to no time: half of a split fleet is left out, so that the other is measured alone."""

from __future__ import annotations

from megalith.cost.timer_linear import DecodeTerms, LinearTimer, PromptTerms

INSTANT = "instant"
"""Its name where a pool names its timer."""


def instant() -> LinearTimer:
    """One picosecond a step."""
    return LinearTimer(PromptTerms(1, 0), DecodeTerms(1, 0, 0))
