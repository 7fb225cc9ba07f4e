"""The catalogue: models and devices by name, from the TOML files under `megalith/catalog`.

Knows how to look a name up and what it is close to. Must not compute anything from what it finds.
"""

from __future__ import annotations

import difflib
import functools
import re
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, TypeVar

from megalith.base.config import Config, convert
from megalith.base.errors import ConfigError, ModelNotFound
from megalith.specs.device import DeviceSpec
from megalith.specs.model import ModelSpec

T = TypeVar("T")

_SUFFIXES = re.compile(r"[-_ ](instruct|chat|base|hf|it|pt|text)$")


class CatalogModel(Config, kw_only=True):
    """One model of the catalogue: its shape, and what its makers say of its size."""

    spec: ModelSpec
    aliases: tuple[str, ...] = ()
    published_parameters: int
    published_resolution: int = 1
    """Unit of the last digit that was published; 1 when the published count is exact."""
    source: str
    date: str


def tables(folder: str, key: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """{entry name: (file name, raw table)} over all TOML files of one folder of the catalogue."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    root = files("megalith").joinpath("catalog", folder)
    for file in sorted(root.iterdir(), key=lambda item: item.name):
        if not file.name.endswith(".toml"):
            continue
        for name, table in tomllib.loads(file.read_text(encoding="utf-8")).get(key, {}).items():
            if name in found:
                raise ConfigError(f"The catalogue has {name!r} twice, in {found[name][0]} and {file.name}.")
            found[name] = (file.name, table)
    return found


@functools.cache
def models() -> Mapping[str, CatalogModel]:
    """Every model of the catalogue by its name."""
    result = {}
    for name, (origin, table) in tables("models", "models").items():
        spec = {"name": name, "source": table.get("source", ""), **table.get("spec", {})}
        result[name] = convert({**table, "spec": spec}, CatalogModel, f"catalog/models/{origin}, {name}")
    return result


@functools.cache
def devices() -> Mapping[str, DeviceSpec]:
    """Every device of the catalogue by its name."""
    return {
        name: convert({"name": name, **table}, DeviceSpec, f"catalog/devices/{origin}, {name}")
        for name, (origin, table) in tables("devices", "devices").items()
    }


def canonical(name: str) -> str:
    """A name without owner, case, punctuation and the suffixes that do not change a model's shape."""
    name = name.strip().rsplit("/", 1)[-1].lower()
    while (shorter := _SUFFIXES.sub("", name)) != name:
        name = shorter
    return re.sub(r"[^a-z0-9]", "", name)


def index_names(entries: Mapping[str, Any]) -> dict[str, str]:
    """{canonical form of every name and alias: name}."""
    index: dict[str, str] = {}
    for name, entry in entries.items():
        for label in (name, *entry.aliases):
            index.setdefault(canonical(label), name)
    for name in entries:
        index[canonical(name)] = name
    return index


@functools.cache
def _model_index() -> dict[str, str]:
    return index_names(models())


@functools.cache
def _device_index() -> dict[str, str]:
    return index_names(devices())


def named(name: str, known: Mapping[str, T], what: str) -> T:
    """The entry of exactly that name. Raises ConfigError, calling it `what`, with the nearest names."""
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.3) or sorted(known)
    raise ConfigError(f"There is no {what} {name!r} ({len(known)} known).", f"Did you mean {', '.join(near)}?")


def entries(folder: str, key: str, kind: type[T]) -> Mapping[str, T]:
    """The tables under `key` in one folder of the catalogue, each as a `kind`."""
    found = tables(folder, key)
    return {name: convert(table, kind, f"catalog/{folder}/{file}, {name}") for name, (file, table) in found.items()}


def nearest(name: str, index: Mapping[str, str], count: int = 3) -> list[str]:
    """The catalogue names closest to `name`, best first, without repeats."""
    close = difflib.get_close_matches(canonical(name), index, n=count * 2, cutoff=0.3)
    return list(dict.fromkeys(index[match] for match in close))[:count]


def find_model(name: str) -> CatalogModel | None:
    """The entry called `name` (or an alias of it, in any case, with or without an owner), else None."""
    found = _model_index().get(canonical(name))
    return models()[found] if found else None


def entry(name: str) -> CatalogModel:
    """Like `find_model`, but raises ModelNotFound with the nearest names."""
    found = find_model(name)
    if found is None:
        near = nearest(name, _model_index())
        hint = f"Did you mean {', '.join(near)}?" if near else f"Known: {', '.join(models())}."
        raise ModelNotFound(f"The catalogue has no model {name!r} ({len(models())} known).", hint)
    return found


def model(name: str) -> ModelSpec:
    """The spec of a catalogue model. Raises ModelNotFound with the nearest names."""
    return entry(name).spec


def find_device(name: str) -> DeviceSpec | None:
    """The catalogue device called `name`, or an alias of it, in any case; else None."""
    found = _device_index().get(canonical(name))
    return devices()[found] if found else None


def device(name: str) -> DeviceSpec:
    """A catalogue device by name or alias. Raises ConfigError with the nearest names."""
    found = _device_index().get(canonical(name))
    if found is None:
        near = nearest(name, _device_index())
        hint = f"Did you mean {', '.join(near)}?" if near else f"Known: {', '.join(devices())}, here."
        raise ConfigError(f"The catalogue has no device {name!r} ({len(devices())} known).", hint)
    return devices()[found]
