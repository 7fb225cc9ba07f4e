"""Many scenarios on all cores, each result kept as soon as it is there.

A point is a scenario under a key; every point runs in a worker process, and what came of it is appended to a file of
JSON lines. Whoever starts the same points again gets the stored ones back and runs the rest. Knows scenarios and
results; must not know what varies between the points.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from hashlib import blake2b
from math import isfinite, nan
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import cast

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
    count = min(workers or len(os.sched_getaffinity(0)), len(todo))
    results = (_attempt(run, point) for point in todo) if count <= 1 else _in_processes(todo, count, run)
    for result in results:
        if store is not None:
            store.add(result)
        yield result


def _attempt(run: Callable[[Point], PointResult], point: Point) -> PointResult:
    """What came of a point; a failure becomes its `error`, and one that is a bug of ours says where it is."""
    try:
        return run(point)
    except MegalithError as error:
        return PointResult(key=point.key, labels=point.labels, error=str(error))
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        told = f"{type(error).__name__} at {where}: {error} (a fault of Megalith)"
        return PointResult(key=point.key, labels=point.labels, error=told)


class _Worker:
    """One process that runs points one after another."""

    def __init__(self, run: Callable[[Point], PointResult]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, run), daemon=True)
        self.process.start()
        theirs.close()
        self.point: Point | None = None

    def give(self, point: Point) -> None:
        """Start a point; its result, or the end of the process, will make `pipe` readable."""
        self.point = point
        with suppress(OSError):  # the process is gone; reading says so
            self.pipe.send(point)

    def take(self) -> PointResult | None:
        """The result; None when the process has ended without one."""
        try:
            return cast(PointResult, self.pipe.recv())
        except (EOFError, OSError):
            return None

    def end(self) -> str:
        """Stop it, whatever it does; how it ended."""
        self.pipe.close()
        self.process.join(0.05)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        code = self.process.exitcode or 0
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _in_processes(todo: list[Point], count: int, run: Callable[[Point], PointResult]) -> Iterator[PointResult]:
    """Results of the points as they come, from `count` processes."""
    waiting = iter(todo)
    workers: dict[Connection, _Worker] = {}
    try:
        for _ in range(count):
            _give_next(None, run, waiting, workers)
        while workers:
            for pipe in wait(list(workers)):
                worker: _Worker | None = workers.pop(cast(Connection, pipe))
                assert worker is not None
                point, result = cast(Point, worker.point), worker.take()
                if result is None:
                    told = f"Its process ended by itself ({worker.end()}): out of memory? Try fewer workers."
                    result, worker = PointResult(key=point.key, labels=point.labels, error=told), None
                _give_next(worker, run, waiting, workers)
                yield result
    finally:
        for left in workers.values():
            left.end()


def _give_next(
    worker: _Worker | None,
    run: Callable[[Point], PointResult],
    waiting: Iterator[Point],
    workers: dict[Connection, _Worker],
) -> None:
    """The next point for a worker, a new one if there is none; no point: its end."""
    point = next(waiting, None)
    if point is None:
        if worker is not None:
            worker.end()
        return
    worker = _Worker(run) if worker is None else worker
    workers[worker.pipe] = worker
    worker.give(point)


def _serve(pipe: Connection, run: Callable[[Point], PointResult]) -> None:
    """A worker process: points in, results out, until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever gave the points
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    with suppress(EOFError, OSError):  # the pipe is closed: nobody waits for results any more
        while True:
            pipe.send(_attempt(run, pipe.recv()))


def _end_with(sentinel: int) -> None:
    """Leave when the process that started this one is gone, even in the middle of a point."""
    wait([sentinel])
    os._exit(1)
