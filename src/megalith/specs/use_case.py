"""UseCase: what one request of an application brings, and how soon it wants its tokens.

Data only. Must not know models, devices or what any of it costs.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.specs import catalog


class UseCase(Config, kw_only=True):
    """Lengths and limits of one request."""

    title: str
    prompt_tokens: int
    output_tokens: int
    beams: int = 1
    """Answers to one prompt that are written side by side."""
    ttft_ms: float
    tpot_ms: float
    source: str = "given"

    def __post_init__(self) -> None:
        """ConfigError for lengths and limits that mean nothing."""
        for name in ("prompt_tokens", "output_tokens", "beams", "ttft_ms", "tpot_ms"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)} and must be above zero.")


@functools.cache
def use_cases() -> Mapping[str, UseCase]:
    """Every use case of the catalogue by its name."""
    return catalog.entries("use_cases", "use_cases", UseCase)


def use_case(name: str) -> UseCase:
    """The use case of that name. Raises ConfigError with the nearest names."""
    return catalog.named(name, use_cases(), "use case")
