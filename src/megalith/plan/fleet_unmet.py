"""When no fleet keeps a service level: how close the best ones come, and the nearest level that one of them keeps.

Knows trials; must not know how the search went beyond its reasons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, floor, log10
from typing import NamedTuple

import msgspec

from megalith.base.errors import CapacityError, MegalithError
from megalith.base.units import format_duration
from megalith.plan.fleet_answer import Passed
from megalith.plan.fleet_bounds import Ability
from megalith.plan.fleet_estimate import Steady
from megalith.plan.fleet_load import Load
from megalith.plan.fleet_question import FleetQuestion, Shape, Size, shapes
from megalith.plan.fleet_trial import Probe, Trial
from megalith.specs.slo import Bound, Slo

_CALM = 0.3
"""Share of its time that an instance may spend on prompts in a fleet with hardly any queue."""
_ROOM = 1.02
_WIDEN = 1.15
_ATTEMPTS = 4
_MOST_KINDS = 12

Runner = Callable[[Sequence[Probe]], list[Trial]]


class _Ample(NamedTuple):
    """A fleet with hardly any queue, or the largest that is allowed."""

    shape: Shape
    size: Size
    trial: Trial


def unmet(question: FleetQuestion, load: Load, passed: Sequence[Passed], run: Runner) -> CapacityError:
    """The error to raise: best figures in numbers, and as a hint the nearest service level that works."""
    what = f"No fleet of up to {question.most_devices:,} devices keeps {question.slo}"
    ample = _ample(question, load, run)
    if not ample:
        return CapacityError(f"{what}: {_reasons(passed)}.", "Name larger devices, degrees or formats.")
    reached = ", ".join(_best(bound, question.slo, ample) for bound in question.slo.bounds if bound.metric != "itl")
    nearest = _nearest(question, load, ample, run)
    if nearest is None:
        return CapacityError(f"{what}; the best is {reached}.", "Raise --max-devices, or ask for a lower --rate.")
    slo, one = nearest
    return CapacityError(f"{what}; the best is {reached}.", f"--slo {slo} is kept by {one.shape.render(one.size)}.")


def _reasons(passed: Sequence[Passed]) -> str:
    return "; ".join(dict.fromkeys(one.why for one in passed))


def _ample(question: FleetQuestion, load: Load, run: Runner) -> list[_Ample]:
    """Every device and degree once, in the plainest set-up, with as many instances as take the queue away."""
    kinds: dict[tuple[str, int], tuple[Shape, Size]] = {}
    for shape in shapes(question):
        key = (shape.device, shape.tensor_parallel)
        most = question.most(shape)
        if key in kinds or len(kinds) >= _MOST_KINDS or most < shape.smallest:
            continue
        try:
            steady = Steady(Ability(question, shape), load, question.slo)
        except MegalithError:
            continue
        count, size = shape.smallest, shape.sizes(shape.smallest, steady.prefill_share, 1)[0]
        while count < most and steady.predict(size).prompt_share > _CALM:
            count = min(2 * count, most)
            size = shape.sizes(count, steady.prefill_share, 1)[0]
        kinds[key] = (shape, size)
    tasks = [_probe(question, load, shape, size) for shape, size in kinds.values()]
    return [_Ample(*kind, trial) for kind, trial in zip(kinds.values(), run(tasks), strict=True)]


def _probe(question: FleetQuestion, load: Load, shape: Shape, size: Size) -> Probe:
    return Probe(question=question, shape=shape, size=size, rate_per_s=load.rate_per_s, early=False)


def _best(bound: Bound, slo: Slo, ample: Sequence[_Ample]) -> str:
    """`ttft p90 612 ms (4 x h100-sxm, mixed)`."""
    found = [(figure, one) for one in ample if (figure := one.trial.figures_ns.get(str(bound))) is not None]
    if not found:
        return f"no {bound.metric} at all"
    figure, one = min(found, key=lambda pair: pair[0])
    percent = slo.attain_percent if bound.percent is None else bound.percent
    return f"{bound.metric} p{percent:g} {format_duration(figure)} ({one.shape.render(one.size)})"


def _nearest(question: FleetQuestion, load: Load, ample: Sequence[_Ample], run: Runner) -> tuple[Slo, _Ample] | None:
    """A service level that is kept, as near as one fleet's figures come; it was simulated."""

    def distance(one: _Ample) -> float:
        known = [ratio for ratio in one.trial.ratios.values() if ratio is not None]
        return max(known) if len(known) == len(one.trial.ratios) else float("inf")

    best = min(ample, key=distance)
    room = _ROOM
    for _ in range(_ATTEMPTS):
        slo = _wider(question.slo, best.trial, room)
        (trial,) = run([_probe(msgspec.structs.replace(question, slo=slo), load, best.shape, best.size)])
        if trial.kept:
            return slo, best
        room *= _WIDEN
    return None


def _wider(slo: Slo, trial: Trial, room: float) -> Slo:
    """The same promises with the limits that were broken widened to what was reached."""

    def widen(bound: Bound) -> Bound:
        if bound.limit_ns is None:
            ratio = trial.ratios.get(str(bound)) or max([one for one in trial.ratios.values() if one], default=1.0)
            wide = _round_up(max(1.0, ratio * room) * (bound.slowdown or 1.0)) if ratio > 1 else bound.slowdown
            return Bound(metric=bound.metric, slowdown=wide, percent=bound.percent)
        figure = trial.figures_ns.get(str(bound))
        if figure is None:
            ratio = trial.ratios.get(str(bound)) or 1.0
            figure = round(ratio * bound.limit_ns)
        # A promise of several bounds together may be broken though each by itself is kept.
        wanted = figure * room if figure > bound.limit_ns or room > _ROOM else bound.limit_ns
        limit = max(bound.limit_ns, int(_round_up(wanted)))
        return Bound(metric=bound.metric, limit_ns=limit, percent=bound.percent)

    return Slo(bounds=tuple(map(widen, slo.bounds)), attain=slo.attain)


def _round_up(value: float) -> float:
    """To two digits."""
    unit = 10.0 ** (floor(log10(value)) - 1)
    return ceil(value / unit - 1e-9) * unit
