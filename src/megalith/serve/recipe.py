"""From a recipe file, flags and `--set a.b=c` to one checked ServeRecipe; and where the result is kept.

Later wins: defaults, the file, the flags, `--set`. Knows TOML and dotted keys; knows no flag by name.
"""

from __future__ import annotations

import contextlib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from megalith.base.config import convert
from megalith.base.errors import ConfigError
from megalith.base.home import home_dir
from megalith.base.units import parse_bytes, parse_duration_ns
from megalith.serve.config import ServeRecipe

_TABLES = ("engine", "server")


def build_recipe(path: str | None, flags: Mapping[str, Mapping[str, Any]], assignments: Iterable[str]) -> ServeRecipe:
    """The recipe. `flags` are {table: {key: value}}, None values mean "not given". Raises ConfigError."""
    data = _read(path) if path is not None else {}
    for table, values in flags.items():
        given = {key: value for key, value in values.items() if value is not None}
        _table(data, table, "the command line").update(given)
    for assignment in assignments:
        _assign(data, assignment)
    for table in _TABLES:
        if table in data:
            data[table] = {key: _with_unit(key, value) for key, value in data[table].items()}
    if "model" not in data.get("engine", {}):
        raise ConfigError("No model is named.", "Say which, for example: megalith serve smollm2")
    return convert(data, ServeRecipe, path or "the command line")


def _read(path: str) -> dict[str, Any]:
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        data = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"The recipe {path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"The recipe {path} is not valid TOML: {error}.") from None
    for table in _TABLES:
        _table(data, table, path)
    return data


def _table(data: dict[str, Any], name: str, origin: str) -> dict[str, Any]:
    table = data.setdefault(name, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{origin}: `{name}` must be a table.", f"Write [{name}] and its keys below it.")
    return table


def _assign(data: dict[str, Any], assignment: str) -> None:
    dotted, equals, text = assignment.partition("=")
    table, dot, key = dotted.strip().partition(".")
    if not (equals and dot and key and table in _TABLES):
        raise ConfigError(
            f"--set {assignment} is not understood.", "Write --set engine.token_budget=512 or --set server.max_n=4."
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    _table(data, table, "--set")[key] = value


def _with_unit(key: str, value: Any) -> Any:
    """`"2GiB"` and `"30s"` may be written where bytes and nanoseconds are meant."""
    if isinstance(value, str) and key.endswith("_bytes"):
        return parse_bytes(value)
    if isinstance(value, str) and key.endswith("_ns"):
        return parse_duration_ns(value)
    return value


def keep(recipe: ServeRecipe) -> None:
    """Store the resolved recipe of the run that begins, as `runs/serve.json` under the Megalith home. Best effort."""
    with contextlib.suppress(OSError):
        folder = home_dir() / "runs"
        folder.mkdir(parents=True, exist_ok=True)
        text = msgspec.json.format(msgspec.json.encode(recipe), indent=2)
        (folder / "serve.json").write_bytes(text + b"\n")
