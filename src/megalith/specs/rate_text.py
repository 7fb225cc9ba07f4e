"""Several rates as people write them on the command line: `1,2,4,8` or `1..8x0.5`.

Knows numbers; must not know what comes at these rates.
"""

from __future__ import annotations

import re

from megalith.base.errors import ConfigError

MOST_RATES = 10_000
_HINT = "Write rates like 1,2,4,8 or 1..8x0.5 (from 1 to 8 in steps of 0.5)."
_NUMBER = r"(\d+(?:\.\d+)?)"


def parse_rates(text: str) -> tuple[float, ...]:
    """Rates in requests a second, ascending, each once. Raises ConfigError."""
    rates: set[float] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(rf"{_NUMBER}(?:\.\.{_NUMBER}(?:x{_NUMBER})?)?", part)
        if match is None:
            raise ConfigError(f"{part!r} is no rate.", _HINT)
        first = float(match[1])
        last, step = float(match[2] or first), float(match[3] or 1)
        if last < first or step <= 0 or (last - first) / step > MOST_RATES:
            raise ConfigError(f"{part!r} is no range of rates.", _HINT)
        # A step that binary floats cannot hold must not lose the last rate; 12 digits are what a person wrote.
        count = int((last - first) / step + 1e-9) + 1
        rates.update(float(f"{first + i * step:.12g}") for i in range(count))
    if not rates or min(rates) <= 0:
        raise ConfigError(f"{text!r} has {'no rate' if not rates else 'a rate of 0'}.", _HINT)
    return tuple(sorted(rates))
