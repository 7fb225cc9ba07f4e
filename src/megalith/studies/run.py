"""Runs the points of a study: on all cores where they are simulated, one by one where they are not; resumable.

Knows studies and the sweep runner; must not know what a claim says. Every result is kept under a key of all that
decides it, so an interrupted study goes on where it stopped.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from hashlib import blake2b
from typing import Any, NamedTuple

import msgspec

from megalith import __version__
from megalith.base.errors import ConfigError, MegalithError
from megalith.sim.build import Builder
from megalith.sim.sweep import Point, PointResult, Store, run_point, run_points
from megalith.studies.results import Results
from megalith.studies.study import Case, Computed, Simulated, Study


class StudyPoint(Point, kw_only=True):
    """A simulated point whose figures may need a function of the study."""

    measure: str = ""
    options: dict[str, float | str] = {}

    @property
    def key(self) -> str:
        """Equal for equal scenarios, measures and versions of Megalith only."""
        return _key(self.scenario, self.measure, self.options)


class _Place(NamedTuple):
    experiment: str
    case: Case


def run_study(
    study: Study,
    *,
    fast: bool = False,
    seeds: int | None = None,
    store: Store | None = None,
    workers: int | None = None,
    done: Callable[[int], object] = lambda _: None,
) -> Results:
    """All points of a study; `done(1)` after each. A point that fails is in `failures`; Ctrl-C passes through."""
    results = Results(study, fast, seeds)
    points: dict[str, StudyPoint] = {}
    places: dict[str, list[_Place]] = {}
    alone: list[tuple[_Place, Computed]] = []
    for experiment in study.experiments:
        for case in results.cases[experiment.name]:
            task, place = experiment.task(case), _Place(experiment.name, case)
            if isinstance(task, Computed):
                alone.append((place, task))
                continue
            labels = {"study": study.name, "experiment": experiment.name, "arm": case.arm}
            point = _point(task, labels | {"at": f"{case.at:g}", "seed": str(case.seed)})
            points.setdefault(point.key, point)
            places.setdefault(point.key, []).append(place)
    for result in run_points(points.values(), store, workers, run_study_point):
        for place in places[result.key]:
            results.add(*place, result)
            done(1)
    for place, computed in alone:
        results.add(*place, _computed(computed, store))
        done(1)
    return results


def run_study_point(point: Point) -> PointResult:
    """Run one point, in whatever process."""
    if isinstance(point, StudyPoint) and point.measure:
        measured: PointResult = _named(point.measure)(point)
        return measured
    return run_point(point)


def timings(study: Study, results: Results) -> list[str]:
    """How steps were timed: every profile that was used, once."""
    found: dict[str, None] = dict.fromkeys(study.profiles)
    for experiment in study.experiments:
        first: dict[str, Case] = {}
        for case in results.cases[experiment.name]:
            first.setdefault(case.arm, case)
        for case in first.values():
            task = experiment.task(case)
            if isinstance(task, Simulated):
                found |= dict.fromkeys(kind.timing for kind in Builder(task.scenario).kinds.values())
    return list(found)


def _point(task: Simulated, labels: dict[str, str]) -> StudyPoint:
    return StudyPoint(labels=labels, scenario=task.scenario, measure=task.measure, options=task.options)


def _computed(task: Computed, store: Store | None) -> PointResult:
    key = _key(task.call, task.options)
    if store is not None and key in store.known:
        return store.known[key]
    try:
        result = PointResult(key=key, labels={"call": task.call}, figures=_named(task.call)(task.options))
    except MegalithError as error:
        return PointResult(key=key, labels={"call": task.call}, error=str(error))
    if store is not None:
        store.add(result)
    return result


def _named(name: str) -> Callable[[Any], Any]:
    module, _, function = name.partition(":")
    try:
        found: Callable[[Any], Any] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError):
        raise ConfigError(f"There is no function {name}.", "Write it like package.module:function.") from None
    return found


def _key(*parts: object) -> str:
    return blake2b(msgspec.json.encode((__version__, *parts), order="sorted"), digest_size=12).hexdigest()
