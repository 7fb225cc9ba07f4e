"""A fleet as people write it on the command line, or in a TOML file.

    4xh100-sxm:tp2                                            one pool of mixed instances, two devices each
    prefill=25xh100-sxm:tp8,decode=15xh100-sxm:tp8            pools by role
    prefill:a=2xh100-sxm,prefill:b=4xa100-80gb,decode=3xh200  pools of one role by name
    8xa100-80gb:tp4:policy=prefill-first:kv_blocks=2000       any key of PoolSpec after a colon
    1xsn40l:tp8:experts.count=150:experts.node=sn40l-node     a dot for a key of a table inside it

Knows the words of FleetSpec; must not know whether devices or policies of these names exist.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Any

from megalith.base.config import convert
from megalith.base.errors import ConfigError
from megalith.specs.fleet import FleetSpec, PolicySpec, PoolSpec

_HINT = "Write a fleet like 4xh100-sxm:tp2, or prefill=2xh100-sxm:tp8,decode=1xh100-sxm:tp8, or name a .toml file."
_POOL = re.compile(
    r"(?:(?P<role>[a-z]+)(?::(?P<name>[\w-]+))?=)?(?P<count>\d+)x(?P<device>[\w.-]+)(?P<options>(?::[^,]+)?)"
)
_ROLES = ("mixed", "prefill", "decode")
_SHORT = {"tp": "tensor_parallel", "pp": "pipeline_parallel", "seqs": "max_sequences", "budget": "token_budget"}


def parse_fleet(text: str) -> FleetSpec:
    """A FleetSpec from the text forms above or from a TOML file of its keys. Raises ConfigError."""
    if text.endswith(".toml"):
        return _from_file(Path(text))
    pools = tuple(_pool(part.strip()) for part in text.split(",") if part.strip())
    if not pools:
        raise ConfigError(f"{text!r} names no pool.", _HINT)
    names = [pool.name for pool in pools]
    if len(set(names)) < len(names):
        raise ConfigError(f"Two pools of {text!r} have the same name.", "Name them: prefill:a=..., prefill:b=...")
    return FleetSpec(pools=pools)


def parse_policy(text: str) -> PolicySpec:
    """A policy by name with options: `power-of-two` or `rebalance:threshold=10:period_s=0.1`. Raises ConfigError."""
    name, *options = text.split(":")
    return PolicySpec(name=name, options=dict(_option(option, text) for option in options))


def render_pool(pool: PoolSpec) -> str:
    """A pool in a few words, for tables."""
    parallel = "".join(
        f" {short}{value}"
        for short, value in (("tp", pool.tensor_parallel), ("pp", pool.pipeline_parallel))
        if value > 1
    )
    role = "" if pool.role == "mixed" else f"{pool.role} "
    attention = "" if pool.attention is None else f" attention on {pool.attention}"
    return f"{role}{pool.count}x{pool.device}{parallel}{attention}"


def _from_file(path: Path) -> FleetSpec:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The fleet {path} cannot be read ({error.strerror}).", _HINT) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"The fleet {path} is not TOML ({error}).", _HINT) from None
    return convert(table, FleetSpec, str(path))


def _pool(text: str) -> PoolSpec:
    match = _POOL.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is no pool of a fleet.", _HINT)
    role = match["role"] or "mixed"
    if role not in _ROLES:
        near = difflib.get_close_matches(role, _ROLES, n=1, cutoff=0.0)[0]
        raise ConfigError(f"There is no role {role!r}.", f"Did you mean {near!r}? Known: {', '.join(_ROLES)}.")
    table: dict[str, Any] = {
        "name": match["name"] or role,
        "device": match["device"],
        "count": int(match["count"]),
        "role": role,
    }
    for option in filter(None, match["options"].split(":")):
        short = re.fullmatch(r"([a-z]+)(\d+)", option)
        if short and short[1] in _SHORT:
            table[_SHORT[short[1]]] = int(short[2])
        else:
            key, value = _option(option, text)
            outer, dot, inner = key.partition(".")
            if dot and isinstance(nested := table.setdefault(outer, {}), dict):
                nested[inner] = value
            else:
                table[_SHORT.get(key, key)] = value
    if 0 in (table[key] for key in ("count", "tensor_parallel", "pipeline_parallel") if key in table):
        raise ConfigError(f"{text!r} has no devices.", "Count and parallel degrees are at least 1.")
    return convert(table, PoolSpec, f"pool {text!r}")


def _option(option: str, text: str) -> tuple[str, Any]:
    key, equals, value = option.partition("=")
    if not equals or not key:
        raise ConfigError(f"{option!r} in {text!r} is no option.", "Write key=value, or tp2 and pp2.")
    for kind in (int, float):
        try:
            return key, kind(value)
        except ValueError:
            continue
    if value in ("true", "false"):
        return key, value == "true"
    return key, value
