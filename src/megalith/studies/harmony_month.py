"""HARMONY's month: a load that is played request by request on a fleet that scales itself, under one rule or another.

Large and slow requests, so that a month is some 50,000 of them in the exact simulator: answers of about 6,000 tokens
of an 8B model on L4, three at a time on an instance. An instance takes ten minutes to serve. Every rule has one knob,
from tight to generous, so that rules are compared at equal violation of the service level and not at one setting.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from functools import lru_cache

import msgspec

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.base.units import NS_PER_S
from megalith.sim.run import simulate
from megalith.sim.scenario import Scenario
from megalith.sim.sweep import Point, PointResult, summarise
from megalith.specs.arrivals import CountedArrivals, PoissonArrivals
from megalith.specs.fleet import FleetSpec, PolicySpec, PoolSpec
from megalith.specs.lengths import FixedLength, LognormalLength
from megalith.specs.posterior import Posterior, write_posterior
from megalith.specs.slo import parse_slo
from megalith.specs.workload import WorkloadSpec
from megalith.studies.harmony_forecast import HORIZON, drawn, identity, kept, lock, options_of, series_of

MODEL, DEVICE, SLOTS = "llama-3.1-8b", "l4", 3
START_S, PERIOD_S = 600.0, 60.0
"""From asking for an instance to serving with it, an assumption (machine, image, weights); and between decisions."""
MOST = 48
WAIT = "60s"
"""The service level: the first token within this, beside answers of some six minutes."""
KEPT = 0.95
"""The share of requests within the service level that a measured capacity stands for, under a steady Poisson load."""
_MEASURED = (1, 2, 4, 6, 8, 12, 16, 24)
_PROMPT, _MEDIAN, _SIGMA, _LONGEST = 1000, 5500, 0.4, 12_000

KNOBS: Mapping[str, tuple[float, ...]] = {
    "harmony": (0.4, 0.15, 0.05, 0.02, 0.0),
    "gaussian": (0.4, 0.15, 0.05, 0.02, 0.0),
    "point": (0.95, 1.15, 1.35, 1.6, 2.0),
    "oracle": (0.8, 0.95, 1.1, 1.25, 1.4),
    "target": (2.4, 1.9, 1.6, 1.3, 1.0),
    "threshold": (2.4, 1.9, 1.6, 1.3, 1.0),
    "peak": (5.0, 7.0, 9.0, 11.0, 14.0),
}
"""By rule, from tight to generous: eps; a factor on the load; outstanding requests of an instance; instances."""


def scenario(arm: str, load: str, at: int, seed: int, fast: bool) -> Scenario:
    """One rule at one setting on the reporting part of a series (`seasonal` or `white`). The file of the posterior and
    the measured capacity are filled in where it runs."""
    series = series_of(f"{load}:{seed}", fast)
    from megalith.train.forecast_windows import parts

    rows = parts(len(series), options_of(load, "flow", 0, fast).split).test
    counts = tuple(round(value * series.step_s) for value in series.load[rows.start : rows.stop].tolist())
    knob = KNOBS[arm][at]
    fixed = arm == "peak"
    first = int(knob) if fixed else max(2, round(counts[0] / 8))
    return Scenario(
        model=MODEL, seed=seed, sample_s=0, slo=parse_slo(f"ttft={WAIT}"),
        fleet=FleetSpec(
            pools=(_pool(first, None if fixed else MOST),), controllers=() if fixed else (_rule(arm, knob),)
        ),
        workload=_load(CountedArrivals(step_s=series.step_s, counts=counts), f"synthetic, {load}"),
    )  # fmt: skip


def _pool(count: int, most: int | None) -> PoolSpec:
    return PoolSpec(
        name="all", device=DEVICE, count=count, max_count=most, start_s=START_S, max_sequences=SLOTS,
        prefix_cache=False,
    )  # fmt: skip


def _load(arrivals: CountedArrivals | PoissonArrivals, name: str, requests: int | None = None) -> WorkloadSpec:
    return WorkloadSpec(
        name=name, arrivals=arrivals, requests=requests, input=FixedLength(tokens=_PROMPT),
        output=LognormalLength(median=_MEDIAN, sigma=_SIGMA), max_output_tokens=_LONGEST,
    )  # fmt: skip


def _rule(arm: str, knob: float) -> PolicySpec:
    counts: dict[str, float | str | bool] = {"min_count": 1, "max_count": MOST, "period_s": PERIOD_S}
    if arm == "target":
        return PolicySpec(name="target-scaling", options={**counts, "target": knob})
    if arm == "threshold":
        rule = {"by": "outstanding", "up_above": knob, "down_below": 0.5 * knob, "up_cooldown_s": 0.0}
        return PolicySpec(name="threshold-scaling", options={**counts, **rule, "down_cooldown_s": 0.0})
    how = {"margin": knob, "eps": 0.0} if arm in ("point", "oracle") else {"eps": knob}
    return PolicySpec(
        name="posterior-scaling", options={**counts, **how, "start_s": START_S, "point": arm == "point"}
    )  # fmt: skip


def measure(point: Point) -> PointResult:
    """Run it, with what was trained and measured here filled in; violation and GPU-hours beside the plain figures."""
    options: dict[str, float | str] = getattr(point, "options", {})
    fast = bool(options["fast"])
    chosen = _filled(point.scenario, str(options["arm"]), str(options["load"]), int(options["seed"]), fast)
    result = simulate(chosen)
    summary = summarise(point, result)
    figures: dict[str, float | None] = {
        "gpu_hours": result.instance_hours,
        "violation": None if summary.attained is None else 1 - summary.attained,
        "mean_instances": result.instance_hours * 3600 * NS_PER_S / result.end_ns,
        "started": float(result.scaling.started),
    }
    return msgspec.structs.replace(summary, figures=figures)


def _filled(plain: Scenario, arm: str, load: str, seed: int, fast: bool) -> Scenario:
    rules = plain.fleet.controllers
    if not rules or rules[0].name != "posterior-scaling":
        return plain
    more = {"path": posterior_file(arm, load, seed, fast), "capacity_per_s": tuple(capacities(fast))}
    rule = PolicySpec(name=rules[0].name, options={**rules[0].options, **more})
    return msgspec.structs.replace(plain, fleet=msgspec.structs.replace(plain.fleet, controllers=(rule,)))


def posterior_file(arm: str, load: str, seed: int, fast: bool) -> str:
    """The file with the samples of a rule's forecasts over the month; made once. The oracle's is what comes."""
    source = f"{load}:{seed}"
    head = "gaussian" if arm == "gaussian" else "flow"
    series, rows, samples = drawn(source, "last" if arm == "oracle" else head, seed, fast)
    if arm == "oracle":
        places = [[row + step for step in range(HORIZON)] for row in rows]
        samples = series.load[places][:, None, :]
    path = kept("posterior", arm if arm == "oracle" else head, identity(source, fast),
                msgspec.json.encode(options_of(source, head, seed, fast)))  # fmt: skip
    with lock(path):
        if not path.exists():
            values = array("f", samples.astype("float32").tobytes())
            write_posterior(path, Posterior(series.step_s, len(rows), samples.shape[1], HORIZON, values, source))
    return str(path)


class _Capacities(Config):
    """Kept in a file: requests a second of so many instances."""

    measured: dict[int, float]


@lru_cache(maxsize=2)
def capacities(fast: bool) -> list[float]:
    """Requests a second that 1, 2, 3, ... instances carry together within the service level, measured in the simulator
    under a steady Poisson load at a few counts, and straight lines between these."""
    share = 0.3 if fast else 1.0
    probe = steady(1, 1.0, 1, 0)
    path = kept("capacity", msgspec.json.encode(probe), KEPT, share, _MEASURED)
    with lock(path):
        if not path.exists():
            found = {count: _capacity(count, share) for count in _MEASURED}
            path.write_bytes(msgspec.json.encode(_Capacities(measured=found)))
    measured = msgspec.json.decode(path.read_bytes(), type=_Capacities).measured
    line: list[float] = []
    for low, high in zip((0, *_MEASURED), _MEASURED, strict=False):
        start, end = measured.get(low, 0.0), measured[high]
        line += [start + (end - start) * (count - low) / (high - low) for count in range(low + 1, high + 1)]
    return line


def steady(count: int, rate_per_s: float, requests: int, seed: int) -> Scenario:
    """A fixed fleet under a steady Poisson load."""
    return Scenario(
        model=MODEL, seed=seed, sample_s=0, slo=parse_slo(f"ttft={WAIT}"), fleet=FleetSpec(pools=(_pool(count, None),)),
        workload=_load(PoissonArrivals(rate_per_s=rate_per_s), "steady", requests),
    )  # fmt: skip


def _capacity(count: int, share: float) -> float:
    """The highest rate that keeps the share, by halving; within 2 %. At least 1,000 requests and some ten mean
    residence times of all places, so that an overload shows."""
    requests = round(share * max(1500, 40 * SLOTS * count))
    low, high = 0.0, count * SLOTS / 200.0  # answers take longer than 200 s
    while high - low > 0.02 * high:
        rate = (low + high) / 2
        attained = simulate(steady(count, rate, requests, 0)).figures.slo
        if attained is None:
            raise ConfigError("The service level was not judged.", "Give the scenario one.")
        low, high = (rate, high) if attained.attainment >= KEPT else (low, rate)
    return low
