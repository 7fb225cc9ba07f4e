"""Many scenarios on all cores, each result kept as soon as it is there.

A point is a scenario under a key; the runner gives every point to a process of its own pool and appends what came of it
to a file of JSON lines. Whoever starts the same points again gets the stored ones back and runs the rest. Knows
scenarios and results; must not know what varies between the points.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from hashlib import blake2b
from multiprocessing import get_context
from pathlib import Path

import msgspec

from megalith.base.config import Config
from megalith.base.errors import MachineError, MegalithError
from megalith.base.units import NS_PER_S
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


def summarise(point: Point, result: SimResult) -> PointResult:
    """The figures of a run that a comparison needs."""
    figures, slo = result.figures, result.figures.slo
    powers = result.series.cluster()["power_w"]
    energy_w = float(powers.mean()) if len(powers) else float("nan")
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
        mean_power_w=None if energy_w != energy_w else energy_w,
        stopped_early=result.stopped_early,
        digest=result.digest,
    )


def run_point(point: Point) -> PointResult:
    """Run one point; an expected failure becomes its `error`."""
    try:
        return summarise(point, simulate(point.scenario))
    except MegalithError as error:
        return PointResult(key=point.key, labels=point.labels, error=str(error))


class Store:
    """Results in a file of JSON lines, one written as soon as it is there; a last line cut short is dropped."""

    def __init__(self, path: Path) -> None:
        """Reads what is there. Raises MachineError when the folder cannot be made or written."""
        self._path = path
        self.known: dict[str, PointResult] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = path.read_bytes() if path.exists() else b""
            for line in whole.splitlines():
                try:
                    result = msgspec.json.decode(line, type=PointResult)
                except msgspec.DecodeError:
                    continue
                self.known[result.key] = result
            if whole and not whole.endswith(b"\n"):
                path.write_bytes(whole[: whole.rfind(b"\n") + 1])
            path.touch()
        except OSError as error:
            raise MachineError(f"{path} cannot be written ({error.strerror}).", "Name another folder.") from None

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
) -> Iterator[PointResult]:
    """Results as they come, stored ones first. `workers` processes, by default one a core; 1 runs them here.

    Ctrl-C (KeyboardInterrupt) passes through; what runs is given up, and what has ended is in the store.
    """
    todo: list[Point] = []
    for point in points:
        known = None if store is None else store.known.get(point.key)
        if known is None:
            todo.append(point)
        else:
            yield msgspec.structs.replace(known, labels=point.labels)
    count = min(workers or len(os.sched_getaffinity(0)), len(todo))
    if count <= 1:
        for point in todo:
            result = run(point)
            if store is not None:
                store.add(result)
            yield result
        return
    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"))
    try:
        waiting = iter(todo)
        running: dict[Future[PointResult], Point] = {}
        while True:
            for point in waiting:
                running[pool.submit(run, point)] = point
                if len(running) >= 2 * count:
                    break
            if not running:
                return
            ended, _ = wait(running, timeout=3600, return_when=FIRST_COMPLETED)
            for future in ended:
                point = running.pop(future)
                error = future.exception()
                if error is not None:
                    failed = f"{type(error).__name__}: {error}"
                    yield PointResult(key=point.key, labels=point.labels, error=failed)
                    continue
                result = future.result()
                if store is not None:
                    store.add(result)
                yield result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(getattr(pool, "_processes", {}).values() if pool is not None else []):
            process.terminate()


def seconds(distribution: Distribution | None, percent: str) -> float | None:
    """A percentile (`p50`, `p99`, `mean`) in seconds; None without samples."""
    return None if distribution is None else getattr(distribution, percent) / NS_PER_S
