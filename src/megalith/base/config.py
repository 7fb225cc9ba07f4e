"""Strict configuration: frozen msgspec structs, unknown keys are errors that name the nearest key."""

from __future__ import annotations

import difflib
import re
from typing import Any, TypeVar, dataclass_transform

import msgspec

from megalith.base.errors import ConfigError

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every configuration struct."""


def convert(data: Any, kind: type[T], origin: str) -> T:
    """`data` (plain dicts and lists, as from TOML or JSON) as a `kind`.

    `origin` names where the data came from, for the message. Raises ConfigError with the nearest known key.
    """
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{origin}: {error}.", _nearest_key(str(error), kind)) from None


def _nearest_key(message: str, kind: type) -> str:
    match = re.search(r"unknown field `([^`]+)`", message)
    if match is None:
        return ""
    known = sorted(_field_names(kind, set()))
    near = difflib.get_close_matches(match.group(1), known, n=1, cutoff=0.0)
    return f"Did you mean `{near[0]}`? Known keys: {', '.join(known)}." if near else ""


def _field_names(kind: Any, seen: set[Any]) -> set[str]:
    """All field names of a struct and the structs inside it."""
    if kind in seen:
        return set()
    seen.add(kind)
    names: set[str] = set()
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        for field in msgspec.structs.fields(kind):
            names.add(field.encode_name)
            names |= _field_names(field.type, seen)
    for argument in getattr(kind, "__args__", ()):
        names |= _field_names(argument, seen)
    return names
