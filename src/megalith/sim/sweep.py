"""Many scenarios on all cores, each result kept as soon as it is there.

A point is a scenario under a key; every point runs in a worker process, and what came of it is appended to a file of
JSON lines. Whoever starts the same points again gets the stored ones back and runs the rest. Knows scenarios and
results; must not know what varies between the points.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable
from hashlib import blake2b
from math import isfinite, nan
from pathlib import Path

import msgspec

from megalith.base.config import Config
from megalith.base.errors import MachineError
from megalith.base.units import NS_PER_S
from megalith.sim.processes import Failed, run_tasks
from megalith.sim.run import SimResult, simulate
from megalith.sim.samples import Distribution
from megalith.sim.scenario import Scenario

_SUMMED = ("ttft_ns", "tpot_ns", "itl_ns", "e2e_ns", "queue_ns", "normalized_ns")


class Point(Config, kw_only=True):
    """One scenario of a sweep."""

    labels: dict[str, str]
    """What sets it apart, such as fleet, rate and seed."""
    scenario: Scenario

    @property
    def key(self) -> str:
        """Equal for equal scenarios only."""
        return blake2b(msgspec.json.encode(self.scenario, order="sorted"), digest_size=12).hexdigest()


class PointResult(Config, kw_only=True):
    """What came of one point; simulated."""

    key: str
    labels: dict[str, str]
    error: str = ""
    """Why there is no result."""
    requests: int = 0
    rejected: int = 0
    latencies: dict[str, Distribution | None] = {}
    """ttft_ns, tpot_ns, itl_ns, e2e_ns, queue_ns, normalized_ns."""
    attained: float | None = None
    """Share of all requests within the service level; None without one."""
    kept: bool | None = None
    """Whether the service level was kept."""
    binding: str = ""
    requests_per_s: float = 0.0
    good_per_s: float | None = None
    output_tokens_per_s: float = 0.0
    preemptions: int = 0
    migrations: int = 0
    devices: int = 0
    price_per_hour_usd: float | None = None
    mean_power_w: float | None = None
    stopped_early: bool = False
    digest: str = ""
    figures: dict[str, float | None] = {}
    """Whatever else a run of one's own found."""


def summarise(point: Point, result: SimResult) -> PointResult:
    """The figures of a run that a comparison needs."""
    figures, slo = result.figures, result.figures.slo
    times = result.series.cluster()["time_ns"]
    # Without samples, or where a device's power is not known, there is no mean power.
    power_w = result.series.energy_j * NS_PER_S / float(times[-1]) if len(times) else nan
    return PointResult(
        key=point.key,
        labels=point.labels,
        requests=result.requests,
        rejected=figures.rejected,
        latencies={name: figures.latencies.get(name) for name in _SUMMED},
        attained=None if slo is None else slo.attainment,
        kept=None if slo is None else slo.kept,
        binding="" if slo is None else slo.binding or "",
        requests_per_s=figures.steady.requests_per_s,
        good_per_s=figures.steady.good_per_s,
        output_tokens_per_s=figures.steady.output_tokens_per_s,
        preemptions=figures.preemptions,
        migrations=figures.migrations,
        devices=sum(pool.devices for pool in point.scenario.fleet.pools),
        price_per_hour_usd=result.price_per_hour_usd,
        mean_power_w=power_w if isfinite(power_w) else None,
        stopped_early=result.stopped_early,
        digest=result.digest,
    )


def run_point(point: Point) -> PointResult:
    """Run one point. Raises MegalithError on what cannot be run."""
    return summarise(point, simulate(point.scenario))


class Store:
    """Results in a file of JSON lines, one written as soon as it is there; a last line cut short is dropped."""

    def __init__(self, path: Path) -> None:
        """Reads what is there. Raises MachineError when the folder cannot be made or written."""
        self._path = path
        self.known: dict[str, PointResult] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            whole = path.read_bytes()
            end = whole.rfind(b"\n") + 1
            if end < len(whole):
                os.truncate(path, end)
        except OSError as error:
            raise MachineError(f"{path} cannot be written ({error.strerror}).", "Name another folder.") from None
        for line in whole[:end].splitlines():
            try:
                result = msgspec.json.decode(line, type=PointResult)
            except (msgspec.DecodeError, UnicodeDecodeError):
                continue  # damaged: its point runs again
            self.known[result.key] = result

    def add(self, result: PointResult) -> None:
        """Keep one result; errors are not kept, so that they are tried again."""
        if result.error:
            return
        self.known[result.key] = result
        try:
            with self._path.open("ab") as file:
                file.write(msgspec.json.encode(result) + b"\n")
        except OSError as error:
            raise MachineError(
                f"{self._path} cannot be written ({error.strerror}); {len(self.known) - 1} results are kept.",
                "Make room and start the same command again: it goes on from there.",
            ) from None


def run_points(
    points: Iterable[Point],
    store: Store | None = None,
    workers: int | None = None,
    run: Callable[[Point], PointResult] = run_point,
) -> Generator[PointResult, None, None]:
    """Results as they come, stored ones first. `workers` processes, by default one a core; 1 runs them here.

    A point that fails, or takes its process with it, gives a result with an `error`; the others go on. Ctrl-C
    (KeyboardInterrupt) passes through: what runs is given up, and what has ended is in the store.
    """
    todo: list[Point] = []
    for point in points:
        known = None if store is None else store.known.get(point.key)
        if known is None:
            todo.append(point)
        else:
            yield msgspec.structs.replace(known, labels=point.labels)
    for place, result in run_tasks(todo, run, workers):
        point = todo[place]
        if isinstance(result, Failed):
            result = PointResult(key=point.key, labels=point.labels, error=str(result))
        if store is not None:
            store.add(result)
        yield result
