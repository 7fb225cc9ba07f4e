"""Whole numbers in one flag: `--tensor-parallel 1,2,4`."""

from __future__ import annotations

from megalith.base.errors import ConfigError


def whole_numbers(flag: str, text: str, example: str, of: str = "whole numbers") -> tuple[int, ...]:
    """The numbers in the order given; `_` may part thousands. Raises ConfigError that shows the example."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{flag} {text!r} is no list of {of}.", f"Write it like {example}.") from None
