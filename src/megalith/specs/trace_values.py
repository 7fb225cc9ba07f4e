"""The cells of a recorded trace: times in many units, token counts, prefix ids.

Knows text and numbers of one cell; knows nothing of files. Bad cells raise ValueError with what was wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from hashlib import blake2b
from typing import Any, Literal, TypeAlias

from megalith.base.random import splitmix64
from megalith.base.units import NS_PER_S

TimeUnit: TypeAlias = Literal["s", "ms", "us", "ns", "iso"]
_DIGITS = {"s": 9, "ms": 6, "us": 3, "ns": 0}
_SCALES = {"s": 1_000_000_000, "ms": 1_000_000, "us": 1000, "ns": 1}
_EPOCH = datetime(1970, 1, 1)
_ZONE = re.compile(r"(?:\.(\d+))?(?:Z|([+-])(\d\d):?(\d\d))?")
_ID_BITS = 59
"""Ids made here stay below 2**59, so that 16 parts of each still fit in 63 bits."""


def clock(unit: TimeUnit) -> Callable[[str], int]:
    """From the text of an arrival to whole nanoseconds."""
    return _iso_clock() if unit == "iso" else _number_clock(_DIGITS[unit], _SCALES[unit])


def json_clock(unit: TimeUnit) -> Callable[[int | float | str], int]:
    """From a JSON value to whole nanoseconds."""
    of_text = clock(unit)
    scale = None if unit == "iso" else _SCALES[unit]

    def to_ns(value: int | float | str) -> int:
        if isinstance(value, str):
            return of_text(value)
        if scale is None:
            raise ValueError(f"the arrival {value} is a number where a timestamp was expected")
        return value * scale if isinstance(value, int) else round(value * scale)

    return to_ns


def _number_clock(digits: int, scale: int) -> Callable[[str], int]:
    def to_ns(text: str) -> int:
        whole, _, fraction = text.partition(".")
        if whole.isdecimal() and (not fraction or fraction.isdecimal()):
            # Exact, where a float would drop nanoseconds of times since the epoch.
            return int(whole) * scale + int(fraction[:digits].ljust(digits, "0") or 0)
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"the arrival {text!r} is not a number") from None
        if not math.isfinite(value):
            raise ValueError(f"the arrival is {text}")
        return round(value * scale)

    return to_ns


def _iso_clock() -> Callable[[str], int]:
    """Azure writes seven digits of fraction, one more than `datetime` keeps, so the fraction is read apart. The whole
    second of the last row is kept: rows come many to a second."""
    seen, seen_ns = "", 0

    def to_ns(text: str) -> int:
        nonlocal seen, seen_ns
        if text[:19] != seen:
            try:
                elapsed = datetime.fromisoformat(text[:19]) - _EPOCH
            except (ValueError, TypeError):
                raise ValueError(f"the arrival {text!r} is not a timestamp such as 2023-11-16 18:15:46.68") from None
            seen, seen_ns = text[:19], (elapsed.days * 86_400 + elapsed.seconds) * NS_PER_S
        fraction = text[20:]
        if fraction.isdecimal() and text[19] == ".":
            return seen_ns + int(fraction) * 100 if len(fraction) == 7 else seen_ns + int(fraction[:9].ljust(9, "0"))
        return seen_ns + _rest_ns(text)

    return to_ns


def _rest_ns(text: str) -> int:
    """Fraction and offset of a timestamp, from its 20th character on."""
    match = _ZONE.fullmatch(text, 19)
    if match is None:
        raise ValueError(f"the arrival {text!r} is not a timestamp such as 2023-11-16 18:15:46.68")
    fraction, sign, hours, minutes = match.groups()
    offset = timedelta(hours=int(hours), minutes=int(minutes)) if sign else timedelta()
    offset_ns = offset.days * 86_400 * NS_PER_S + offset.seconds * NS_PER_S
    return int((fraction or "")[:9].ljust(9, "0")) + (offset_ns if sign == "-" else -offset_ns)


def parse_count(value: str | int | float) -> int:
    """A token count; `374.0` is one too."""
    try:
        return _whole(value) if isinstance(value, float) else int(value)
    except ValueError:
        try:
            return _whole(float(value))
        except ValueError:
            raise ValueError(f"{value!r} is not a token count") from None


def _whole(value: float) -> int:
    if not value.is_integer():  # False for nan and infinities
        raise ValueError(value)
    return int(value)


def parse_ids(value: Any) -> tuple[int, ...]:
    """Prefix ids from a list, or from text such as `[0, 1, 2]`, `0 1 2` or `a3f;b210`. Names become 59-bit hashes."""
    parts: Iterable[Any] = re.split(r"[\s,;|]+", value.strip(" []")) if isinstance(value, str) else value
    try:
        return tuple(map(int, parts))
    except ValueError:
        return tuple(_id(str(part)) for part in parts if part != "")


def _id(name: str) -> int:
    """Each on its own, so that a name is the same id beside any others."""
    try:
        return int(name)
    except ValueError:
        digest = blake2b(name.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> (64 - _ID_BITS)


def chained(ids: tuple[int, ...]) -> tuple[int, ...]:
    """Ids of contents as ids of prefixes: each depends on all before it."""
    result = []
    before = 0
    for content in ids:
        before = splitmix64(before, content) >> (64 - _ID_BITS)
        result.append(before)
    return tuple(result)
