"""One window of a row at the fidelity `exact`: the same requests, step by step, for holding `fluid` against it.

The requests, their servers and the telemetry times are those of simulate_rows(); every server is an instance with its
own scheduler, and the power domain is that of sim/power.py under the same policy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec
import numpy as np

from megalith.base.config import Config
from megalith.base.units import NS_PER_S
from megalith.policy.cluster import Command, Event, View
from megalith.sim.build import Builder
from megalith.sim.fluid_load import RowArrivals
from megalith.sim.fluid_row import POOLS, RowSpec
from megalith.sim.record import Columns, Recorder
from megalith.sim.run import Run
from megalith.sim.scenario import Scenario
from megalith.specs.arrivals import PoissonArrivals
from megalith.specs.draws import Floats, Ints
from megalith.specs.fleet import FleetSpec, PolicySpec, PoolSpec
from megalith.specs.lengths import FixedLength
from megalith.specs.model import ModelSpec
from megalith.specs.row_load import RowLoad, rates
from megalith.specs.shape import RequestShape
from megalith.specs.workload import WorkloadSpec


class Window(NamedTuple):
    """What an exact run of a window gave."""

    power_w: Floats
    """Telemetry samples, of the same times as in a fluid run."""
    kind: Ints
    """Of each request that ended in the window."""
    e2e_s: Floats
    brakes: int


class Telemetry:
    """A controller that keeps the samples and does nothing."""

    name = "telemetry"
    listens = frozenset({"telemetry"})
    period_ns: int | None = None

    def __init__(self, options: Config, seed: int = 0) -> None:  # noqa: ARG002
        self.power_w: list[float] = []

    def act(self, event: Event, view: View) -> Iterable[Command]:  # noqa: ARG002
        """Keep it."""
        self.power_w.append(float(event.data["power_w"]))
        return ()


def exact_window(
    row: RowSpec, load: RowLoad, server: PoolSpec, spec: ModelSpec, timer: str, duration_s: float
) -> Window:
    """Run a row from empty for so long. `server` is one server (name and count do not matter), `spec` its model.

    Takes about a second of one core for 400 requests. Raises ConfigError and DoesNotFit as simulate() does.
    """
    arrivals = RowArrivals(load.kinds, row.low, row.servers - row.low, 0, row.seed)
    step_s = row.power.telemetry_s
    steps = round(duration_s / step_s)
    at_s, _, kind = arrivals.take(rates(load, row.seed, steps, step_s) * row.rate_factor, 0, step_s)
    order = np.argsort(at_s, kind="stable")
    at_s, kind = at_s[order], kind[order]
    ended: list[Columns] = []
    scenario = _scenario(row, server, spec.name, timer)
    builder = Builder(scenario, spec)
    run = _Fed(scenario, builder, builder.recorder(ended.append), _shapes(at_s, kind, load))
    while run.advance() and run.progress.now_ns < duration_s * NS_PER_S:
        pass
    run.interrupt()
    result = run.result()
    keeper = run.cluster.control.controllers[0]
    assert isinstance(keeper, Telemetry)
    assert result.power is not None
    columns = {name: np.concatenate([part[name] for part in ended]) for name in ("id", "arrival_ns", "finish_ns")}
    inside = (columns["finish_ns"] >= 0) & (columns["finish_ns"] <= duration_s * NS_PER_S)
    e2e_s = (columns["finish_ns"] - columns["arrival_ns"])[inside] / NS_PER_S
    return Window(np.array(keeper.power_w[:steps]), kind[columns["id"][inside]], e2e_s, result.power.brakes)


class _Fed(Run):
    """A run of requests that are here already."""

    def __init__(
        self, scenario: Scenario, builder: Builder, recorder: Recorder, shapes: Iterator[RequestShape]
    ) -> None:
        self._shapes = shapes
        super().__init__(scenario, builder, recorder)

    def _feed(self) -> None:
        self.cluster.feed(self._lives(self._shapes, closed=False))


def _shapes(at_s: Floats, kind: Ints, load: RowLoad) -> Iterator[RequestShape]:
    for index, (time_s, number) in enumerate(zip(at_s.tolist(), kind.tolist(), strict=True)):
        one = load.kinds[number]
        at_ns = round(time_s * NS_PER_S)
        yield RequestShape(index, at_ns, one.input_tokens, one.output_tokens, priority=one.priority)


def _scenario(row: RowSpec, server: PoolSpec, model: str, timer: str) -> Scenario:
    counts = (row.low, row.servers - row.low)
    pools = [msgspec.structs.replace(server, name=name, count=n) for name, n in zip(POOLS, counts, strict=True)]
    keep = PolicySpec(name=f"{__name__}:{Telemetry.__name__}")
    fleet = FleetSpec(
        pools=tuple(pools), router=PolicySpec(name="by-priority"), power=row.power,
        controllers=(keep,) if row.policy is None else (keep, row.policy),
    )  # fmt: skip
    # Lengths and times are handed over; all that is read here is that schedulers are told the true lengths.
    load = WorkloadSpec(
        input=FixedLength(tokens=1), output=FixedLength(tokens=1), arrivals=PoissonArrivals(rate_per_s=1.0),
        requests=1, max_new="true",
    )  # fmt: skip
    return Scenario(model=model, fleet=fleet, workload=load, timer=timer, seed=row.seed, sample_s=0.0)
