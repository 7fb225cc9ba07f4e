"""Integer nanoseconds and integer bytes, and the text that people write for them.

Names end in their unit (`ttft_ns`, `kv_bytes`). Floats appear only inside cost formulas and on the screen.
"""

from __future__ import annotations

import re

from megalith.base.errors import ConfigError

NS_PER_S = 1_000_000_000
KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

_BYTE_UNITS = {
    "": 1, "b": 1, "k": KIB, "kib": KIB, "kb": 10**3, "m": MIB, "mib": MIB, "mb": 10**6,
    "g": GIB, "gib": GIB, "gb": 10**9, "t": TIB, "tib": TIB, "tb": 10**12,
}  # fmt: skip
_TIME_UNITS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": NS_PER_S, "": NS_PER_S, "m": 60 * NS_PER_S, "h": 3600 * NS_PER_S}


def _parse(text: str, units: dict[str, int], kind: str, example: str) -> int:
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    unit = match.group(2).lower() if match else None
    if match is None or unit not in units:
        raise ConfigError(f"{text!r} is not {kind}.", f"Write it like {example}.")
    return round(float(match.group(1)) * units[unit])


def parse_bytes(text: str) -> int:
    """Bytes from text such as `4GiB`, `512M` (binary) or `4GB` (decimal). Raises ConfigError."""
    return _parse(text, _BYTE_UNITS, "a size", "4GiB, 512MiB or 4GB")


def parse_duration_ns(text: str) -> int:
    """Nanoseconds from text such as `200ms`, `2s` or `1.5` (seconds). Raises ConfigError."""
    return _parse(text, _TIME_UNITS, "a duration", "200ms, 2s or 1.5h")


def format_bytes(num_bytes: float) -> str:
    """Bytes as a person reads them: `512 B`, `1.50 GiB`."""
    value, sign = abs(float(num_bytes)), "-" if num_bytes < 0 else ""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{sign}{value:.0f} {unit}" if unit == "B" else f"{sign}{value:.2f} {unit}"
        value /= 1024
    return f"{sign}{value:.2f} TiB"


def format_duration(duration_ns: float) -> str:
    """Nanoseconds as a person reads them: `2.81 ms`, `1.20 s`."""
    # Limits a little below the next unit, so that 999.6 us does not become `1e+03 us`.
    for limit, scale, unit in ((999.5, 1, "ns"), (999.5e3, 1e3, "us"), (999.5e6, 1e6, "ms"), (119.5e9, 1e9, "s")):
        if abs(duration_ns) < limit:
            return f"{duration_ns / scale:.3g} {unit}"
    minutes = duration_ns / 60e9
    return f"{minutes:.3g} min" if minutes < 120 else f"{minutes / 60:.3g} h"
