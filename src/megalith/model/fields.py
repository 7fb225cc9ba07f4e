"""Typed access to untrusted key-value data (GGUF metadata, `config.json`): the right type, or an error with the key."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import numpy as np

from megalith.base.errors import ModelFormatError

_N = TypeVar("_N", int, float)


class Fields:
    """One mapping from a file, with the file's name for messages. A null counts as absent."""

    def __init__(self, data: dict[str, Any], origin: str) -> None:
        self._data = data
        self.origin = origin

    def present(self, key: str) -> bool:
        """Whether `key` is there and not null."""
        return self._data.get(key) is not None

    def bad(self, key: str, rule: str) -> ModelFormatError:
        """The error for a value that breaks `rule`."""
        return ModelFormatError(f"{self.origin}: {key} is {self._data.get(key)!r}, but must be {rule}.")

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """An integer of at least `least`. An array that repeats one number (per-layer values) counts as that number."""
        value = self._data.get(key)
        if isinstance(value, np.ndarray) and value.size and value.dtype.kind in "iu" and (value == value.flat[0]).all():
            value = int(value.flat[0])
        if value is None:
            return self._known(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.bad(key, f"an integer of at least {least}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number. A float32 from a file reads as the decimal that was meant: 1e-05, not 9.99999974e-06."""
        value = self._data.get(key)
        if value is None:
            return self._known(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.bad(key, "a number")
        if isinstance(value, float) and abs(value) < 3e38:
            short = np.float32(value)
            return float(str(short)) if float(short) == value else value
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._data.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.bad(key, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self._data.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.bad(key, "a string")
        return value

    def strings(self, key: str) -> list[str] | None:
        """A list of strings, or None when absent."""
        value = self._data.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.bad(key, "a list of strings")
        return value

    def section(self, key: str) -> Fields:
        """The object under `key`; empty when absent."""
        value = self._data.get(key)
        if value is None:
            return Fields({}, self.origin)
        if not isinstance(value, dict):
            raise self.bad(key, "an object")
        return Fields(value, f"{self.origin}: {key}")

    def _known(self, key: str, default: _N | None) -> _N:
        if default is None:
            raise ModelFormatError(f"{self.origin} does not say {key}.")
        return default
