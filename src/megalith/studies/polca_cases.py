"""What the points of the study `polca` compute: rows of a week, windows against exact runs, training rows.

Everything with the same seed, load and machine is one batch of rows, run once in a process.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import msgspec
import numpy as np

from megalith.plan.row import RowQuestion, calibrate, lost, policy_for
from megalith.sim.fluid_exact import exact_window
from megalith.sim.fluid_row import POOLS, RowResult, RowSpec, simulate_rows
from megalith.sim.training_row import train_row
from megalith.specs import catalog
from megalith.specs.fleet import PolicySpec, PoolSpec, PowerSpec
from megalith.specs.row_load import BURSTS, POLCA_KINDS, S_PER_DAY, WEEK_S, RequestKind, RowLoad

COUNTS = (44, 48, 50, 52, 54, 56)
"""Servers in the budget of 40."""
SECONDS = (0.85, 0.89, 0.93, 0.97)
"""Second thresholds."""
ACTUATIONS_S = (0.0, 40.0, 120.0)
FAST_DELAY_S = 120.0
PUBLISHED = 52
FAST_COUNTS = (50, PUBLISHED, 54)
BUSY_START_S, BUSY_S = S_PER_DAY + 12 * 3600, 6 * 3600.0
"""The busiest six hours of a Tuesday."""
GRIDS = {"all": COUNTS, "few": FAST_COUNTS, "one": (PUBLISHED,)}
KV_BLOCKS = (8 * 80 * 2**30 - 329_000_000_000) // (16 * 4_014_080)
"""Of a machine: 640 GiB less the weights as splitwise-sim counts them, in blocks of 16 tokens."""
MOST_TOKENS = 4096
"""BLOOM was trained on 2,048, but its positions have no bound."""
_FAST_START_S, _FAST_S = S_PER_DAY + 10 * 3600, 8 * 3600.0
CALIBRATED_ON = 1000
"""Seed of the week that fixes the rate; reported weeks have others."""

Figures = dict[str, float | None]
Options = Mapping[str, float | str]


class _Key(NamedTuple):
    servers: int
    policy: str
    second: float = 0.89
    actuation_s: float = 40.0


def row(options: Options) -> Figures:
    """One row of a week: brakes, power, and latencies against the same row with nobody at the clocks."""
    rows = _batch(_text(options, "bursts"), _number(options, "span_s"), int(_number(options, "seed")),
                  _number(options, "exponent"), _text(options, "grid"))  # fmt: skip
    key = _Key(
        int(_number(options, "servers")), _text(options, "policy"), _number(options, "second"),
        _number(options, "actuation_s"),
    )  # fmt: skip
    return _figures(rows[key], rows[_Key(key.servers, "")])


def busy(options: Options) -> Figures:
    """52 servers in the busiest hours, by second threshold and delay."""
    rows = _busy(_number(options, "calibration_s"), int(_number(options, "seed")))
    key = _Key(
        PUBLISHED, _text(options, "policy"), _number(options, "second"), _number(options, "actuation_s")
    )  # fmt: skip
    return _figures(rows[key], rows[_Key(PUBLISHED, "")])


def agreement(options: Options) -> Figures:
    """Fluid against exact over the same requests: worst relative differences."""
    question, span_s = RowQuestion(), _number(options, "span_s")
    hour, policy = _number(options, "hour"), _text(options, "policy")
    factor = rate_factor("traces", _number(options, "calibration_s"))
    load = msgspec.structs.replace(question.load, start_s=S_PER_DAY + hour * 3600)
    chosen = _row(question, _Key(PUBLISHED, policy), factor, int(_number(options, "seed")))
    chosen = msgspec.structs.replace(chosen, power=msgspec.structs.replace(chosen.power, other_w=question.other_w))
    (fluid,) = simulate_rows([chosen], load, question.machine, span_s)
    spec = msgspec.structs.replace(catalog.model(question.model), max_context=MOST_TOKENS)
    server = PoolSpec(
        name="server", device=question.device, count=1, tensor_parallel=question.devices, policy="prefill-first",
        token_budget=2048, max_sequences=512, kv_blocks=KV_BLOCKS, prefix_cache=False, watermark=0.0,
    )  # fmt: skip
    exact = exact_window(chosen, load, server, spec, question.timer, span_s)
    power = fluid.power_w[: len(exact.power_w)].astype(np.float64)
    alone_s = np.array([question.machine.alone_s(kind) for kind in load.kinds])
    priority = np.array([kind.priority for kind in load.kinds])[exact.kind]
    stretch = exact.e2e_s / alone_s[exact.kind]
    found: Figures = {
        "power": abs(float(power.mean() / exact.power_w.mean()) - 1.0),
        "sample": float(np.abs(power / exact.power_w - 1.0).max()),
        "requests": float(len(exact.kind)),
        "brakes": float(fluid.counters.brakes - exact.brakes),
    }
    for number, pool in enumerate(POOLS):
        for percent in (50, 99):
            ours = fluid.stretch[pool].quantile(percent / 100)
            found[f"{pool}_p{percent}"] = abs(ours / float(np.quantile(stretch[priority == number], percent / 100)) - 1)
    found["p99"] = max(found["low_p99"] or 0.0, found["high_p99"] or 0.0)
    return found


def training(options: Options) -> Figures:
    """A row that trains, for two hours."""
    question = RowQuestion()
    power = PowerSpec(budget_w=question.budget_w)
    name = _text(options, "policy")
    result = train_row(int(_number(options, "servers")), power, PolicySpec(name=name) if name else None, 7200.0)
    swing = np.abs(np.diff(result.power_w)).max() / question.budget_w
    return {
        "brakes": float(result.brakes), "slowdown": result.slowdown, "swing": float(swing),
        "peak": float(result.power_w.max()) / question.budget_w,
    }  # fmt: skip


@functools.cache
def rate_factor(bursts: str, span_s: float) -> float:
    """What the calibration finds for these bursts."""
    return calibrate(_question(bursts, span_s), span_s, CALIBRATED_ON)


def _question(bursts: str, span_s: float, exponent: float = 2.2) -> RowQuestion:
    kinds: tuple[RequestKind, ...] = POLCA_KINDS
    if bursts != "traces":
        kinds = tuple(msgspec.structs.replace(kind, bursts=BURSTS[bursts]) for kind in kinds)
    start_s = _FAST_START_S if span_s == _FAST_S else 0.0
    return RowQuestion(load=RowLoad(rate_per_server=0.1, kinds=kinds, start_s=start_s), exponent=exponent)


def _row(question: RowQuestion, key: _Key, factor: float, seed: int) -> RowSpec:
    timed = msgspec.structs.replace(question, actuation_s=key.actuation_s)
    options = {"second": key.second} if key.policy == "polca" else {}
    policy = policy_for(timed, key.policy, **options) if key.policy else None
    return timed.row(key.servers, policy, factor, seed)


@functools.cache
def _batch(bursts: str, span_s: float, seed: int, exponent: float, grid: str) -> dict[_Key, RowResult]:
    """Rows side by side: counts of the grid by every policy, and POLCA's thresholds and delays unless it is `one`."""
    question = _question(bursts, span_s, exponent)
    policies = ("", "no-cap", "single-threshold", "polca")
    keys = [_Key(count, policy) for count in GRIDS[grid] for policy in policies]
    delays = {"all": ACTUATIONS_S, "few": (FAST_DELAY_S,)}.get(grid, ())
    keys += [_Key(PUBLISHED, "polca", second, delay) for second in SECONDS for delay in delays]
    keys = list(dict.fromkeys(keys))
    factor = rate_factor(bursts, span_s)
    return _run(question, keys, factor, seed, span_s)


@functools.cache
def _busy(calibration_s: float, seed: int) -> dict[_Key, RowResult]:
    question = _question("traces", calibration_s)
    question = msgspec.structs.replace(
        question, load=msgspec.structs.replace(question.load, start_s=BUSY_START_S)
    )  # fmt: skip
    keys = [_Key(PUBLISHED, ""), _Key(PUBLISHED, "no-cap")]
    keys += [_Key(PUBLISHED, "polca", second, delay) for second in SECONDS for delay in ACTUATIONS_S]
    return _run(question, keys, rate_factor("traces", calibration_s), seed, BUSY_S)


def _run(question: RowQuestion, keys: list[_Key], factor: float, seed: int, span_s: float) -> dict[_Key, RowResult]:
    rows = [_row(question, key, factor, seed) for key in keys]
    return dict(zip(keys, simulate_rows(rows, question.load, question.machine, span_s), strict=True))


def _figures(found: RowResult, free: RowResult) -> Figures:
    less = lost(found, free)
    samples_40_s = round(40.0 / found.spec.power.telemetry_s)
    return {
        "brakes": float(found.counters.brakes), "over": float(found.counters.violations), "peak": found.peak_share,
        "mean": found.mean_share, "changes": float(found.counters.clock_changes),
        "capped_low": found.capped["low"], "capped_high": found.capped["high"],
        "high_p50": less.high_p50, "high_p99": less.high_p99, "low_p50": less.low_p50, "low_p99": less.low_p99,
        "rise_2": found.rise(1), "rise_40": found.rise(samples_40_s), "requests": float(found.requests),
        "free_peak": free.peak_share, "free_rise_2": free.rise(1), "free_rise_40": free.rise(samples_40_s),
        "peak_tokens": found.peak_tokens, "served": found.requests / free.requests - 1.0,
        "factor": found.spec.rate_factor,
    }  # fmt: skip


def span_s(fast: bool, days: float = 7.0) -> float:
    """How long rows are run."""
    return _FAST_S if fast else min(days * S_PER_DAY, WEEK_S)


def _number(options: Options, name: str) -> float:
    return float(options[name])


def _text(options: Options, name: str) -> str:
    return str(options[name])
