"""The workloads that ship with the product: synthetic ones, fitted to published statistics.

Knows `catalog/workloads/*.toml` and how to look a name up. Apart from `catalog.py`, because a workload needs NumPy and
whoever looks up a model does not.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from megalith.base.config import Config, convert
from megalith.base.errors import ConfigError
from megalith.specs.catalog import canonical, index_names, nearest, tables
from megalith.specs.workload import WorkloadSpec


class CatalogWorkload(Config, kw_only=True):
    """One built-in workload, and what it was fitted to."""

    title: str
    spec: WorkloadSpec
    aliases: tuple[str, ...] = ()
    source: str
    date: str


@functools.cache
def workloads() -> Mapping[str, CatalogWorkload]:
    """Every built-in workload by its name. None is recorded."""
    result = {}
    for name, (origin, table) in tables("workloads", "workloads").items():
        spec = {"name": name, "source": table.get("source", ""), **table.get("spec", {})}
        result[name] = convert({**table, "spec": spec}, CatalogWorkload, f"catalog/workloads/{origin}, {name}")
    return result


@functools.cache
def _names() -> dict[str, str]:
    return index_names(workloads())


def find_workload(name: str) -> WorkloadSpec | None:
    """The built-in workload called `name`, or an alias of it, in any case; else None."""
    found = _names().get(canonical(name))
    return workloads()[found].spec if found else None


def workload(name: str) -> WorkloadSpec:
    """Like `find_workload`, but raises ConfigError with the nearest names."""
    found = find_workload(name)
    if found is None:
        near = nearest(name, _names()) or list(workloads())
        what = f"There is no built-in workload {name!r} ({len(workloads())} known), and no file of that name."
        raise ConfigError(what, f"Did you mean {', '.join(near)}?")
    return found
