"""Numbers of a specification that must lie between two others."""

from __future__ import annotations

from math import inf

from megalith.base.errors import ConfigError


def bound(name: str, value: float | None, low: float, high: float = inf, where: str = "") -> None:
    """Raises ConfigError unless the value is None or between the two; not a number is not."""
    if value is not None and not low <= value <= high:
        raise ConfigError(f"A {name} of {value:g}{where} cannot be.", f"Give {low:g} to {high:g}.")
