"""Operator tables: the time of a model's step on one kind of device, composed from measured operators.

A table is small: piecewise linear functions of rows, outputs, prompt tokens and (decodes, context), summed over all
layers of one model at one degree of tensor parallelism and one number type, in nanoseconds. benchmarks/fit_operators.py
makes them; catalog/operators holds them. Knows the format and how to find a table. Must not know batches or engines.
"""

from __future__ import annotations

import bisect
import functools
import json
from importlib.resources import files

from megalith.base.config import Config, convert
from megalith.base.errors import ConfigError
from megalith.specs import catalog

NOTICE = (
    "Operator measurements (c) NVIDIA CORPORATION & AFFILIATES, Apache-2.0, from aiconfigurator-core 0.12.0, modified"
)

VLLM = "vllm"
"""The kernels of tables unless others are named: `trtllm`, `trtllm-block`, `sglang`; for experts `marlin`, `mxfp8`."""


class Knots(Config, kw_only=True):
    """A piecewise linear function of a whole number, ascending in both; beyond its ends the last piece goes on."""

    at: tuple[int, ...]
    ns: tuple[int, ...]

    def value(self, x: int) -> float:
        """Nanoseconds at `x`; below the first knot it is the first value."""
        at, ns = self.at, self.ns
        if x <= at[0]:
            return float(ns[0])
        upper = min(bisect.bisect_left(at, x), len(at) - 1)
        low, high = at[upper - 1], at[upper]
        return ns[upper - 1] + (ns[upper] - ns[upper - 1]) * (x - low) / (high - low)


class DenseTable(Config, kw_only=True):
    """All that depends on the rows of a step alone: products, collectives, experts, element-wise work; and the head."""

    tensor_parallel: int
    number: str
    rows: Knots
    outputs: Knots


class AttentionTable(Config, kw_only=True):
    """Attention of all layers of one device of a group."""

    tensor_parallel: int
    kv: str
    """Number type of the cache: bf16 or fp8."""
    decodes: tuple[int, ...]
    contexts: tuple[int, ...]
    """Keys that each decode reads."""
    decode_ns: tuple[tuple[int, ...], ...]
    """[decodes][contexts], every sequence of the same length."""
    alone: Knots
    """A whole prompt by its tokens, alone on the device."""
    packed: Knots
    """Its share where many of them fill the device."""


class OperatorTables(Config, kw_only=True):
    """The tables of one model on one device."""

    notice: str
    model: str
    device: str
    layers: int
    host_ns: int
    """Time of a step outside the device, where the engine does not hide it; engines differ, this is the default."""
    dense: tuple[DenseTable, ...]
    attention: tuple[AttentionTable, ...]
    source: str
    date: str


@functools.cache
def available(kernels: str = VLLM) -> tuple[tuple[str, str], ...]:
    """(device, model) of every table of the catalogue over kernels of that name; others than vLLM's have few."""
    root, ending = files("megalith").joinpath("catalog", "operators"), _ending(kernels)
    found = [
        (folder.name, file.name.removesuffix(ending))
        for folder in root.iterdir()
        if folder.is_dir()
        for file in folder.iterdir()
        if file.name.endswith(ending) and (kernels != VLLM or "@" not in file.name)
    ]
    return tuple(sorted(found))


def _ending(kernels: str) -> str:
    return ".json" if kernels == VLLM else f"@{kernels}.json"


@functools.cache
def _load(device: str, model: str, kernels: str) -> OperatorTables:
    name = f"{model}{_ending(kernels)}"
    text = files("megalith").joinpath("catalog", "operators", device, name).read_text(encoding="utf-8")
    return convert(json.loads(text), OperatorTables, f"catalog/operators/{device}/{name}")


def find_tables(device: str, model: str, kernels: str = VLLM) -> OperatorTables | None:
    """The tables of a catalogue model on a catalogue device (names or aliases), None when there are none."""
    names = catalog.device(device).name, catalog.model(model).name
    return _load(*names, kernels) if names in available(kernels) else None


def tables(device: str, model: str, kernels: str = VLLM) -> OperatorTables:
    """Like `find_tables`, but raises ConfigError that says what there is."""
    found = find_tables(device, model, kernels)
    if found is None:
        on_device = [name for where, name in available(kernels) if where == catalog.device(device).name]
        models = ", ".join(on_device) or "none on that device"
        raise ConfigError(
            f"There are no operator tables of {model} on {device} with the kernels {kernels!r}.",
            f"Models with tables: {models}. The analytic timer does without.",
        )
    return found


def dense_table(tables: OperatorTables, tensor_parallel: int, number: str) -> DenseTable:
    """The table of a degree and number type. Raises ConfigError that lists what there is."""
    for table in tables.dense:
        if (table.tensor_parallel, table.number) == (tensor_parallel, number):
            return table
    known = ", ".join(f"tp {table.tensor_parallel} {table.number}" for table in tables.dense)
    raise ConfigError(
        f"{tables.model} on {tables.device} has no table for tensor parallel {tensor_parallel} in {number}.",
        f"There are {known}.",
    )


def attention_table(tables: OperatorTables, tensor_parallel: int, kv: str) -> AttentionTable:
    """The attention table of a degree and cache type. Raises ConfigError that lists what there is."""
    for table in tables.attention:
        if (table.tensor_parallel, table.kv) == (tensor_parallel, kv):
            return table
    known = ", ".join(f"tp {table.tensor_parallel} {table.kv}" for table in tables.attention)
    raise ConfigError(
        f"{tables.model} on {tables.device} has no attention for tensor parallel {tensor_parallel} and {kv} KV.",
        f"There are {known}.",
    )
