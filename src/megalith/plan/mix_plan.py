"""`plan fleet --mix`: whether a mix of instance types is cheaper than the best fleet of one type, and which.

The integer program sizes the mix by predicted throughput, the simulator checks it. Predicted throughput is a mean and
promises are about the slowest, so the load is multiplied by Mélange's over-provisioning factor until the simulator says
that the service level is kept, or the mix is no cheaper than the fleet of one type. Knows questions and plans.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import NamedTuple

import msgspec

from megalith.base.errors import CapacityError, ConfigError, MegalithError
from megalith.plan.fleet_answer import FleetPlan, MixAnswer, MixPart
from megalith.plan.fleet_bounds import Ability, Limits, limits
from megalith.plan.fleet_load import Load, cut
from megalith.plan.fleet_question import FleetQuestion, Shape, Size
from megalith.plan.mix import Mix, Offer, cheapest_mix, check_solver, single
from megalith.plan.mix_table import Knows, loads, most_requests_per_s, sizes
from megalith.plan.mix_trial import MixTrial, run_mix

STEP = 1.05
"""Between two over-provisioning factors."""
_FIRST, _LAST = -7, 15
"""Factors tried are STEP to these powers, 0.71 to 2.08, and 1 first."""
_PAYS = 0.005
"""A mix pays from this saving on."""


class Market(NamedTuple):
    """What may be bought, and what the load would keep busy of it."""

    shapes: list[Shape]
    offers: list[Offer]
    loads: list[list[float]]
    """[group][offer] at the planned rate; predicted."""
    keys: list[tuple[int, ...]]
    """What the router sees of each group."""
    knows: Knows
    passed: list[str]
    """Types that cannot be, and why."""


class _Found(NamedTuple):
    """A mix under a factor, and what the simulator said."""

    factor: float
    mix: Mix
    trial: MixTrial | None


def check(question: FleetQuestion) -> None:
    """Raise what `add_mix` would, before any work: ConfigError for what a mix cannot be asked, MachineError without the
    solver."""
    check_solver()
    if question.minimise == "power":
        raise ConfigError("A mix is found for cost or devices, not for power.", "Use --minimise cost.")
    if any(bound.limit_ns is None or bound.metric == "itl" for bound in question.slo.bounds):
        raise ConfigError(f"A mix cannot be sized for {question.slo}.", "Give times: ttft=400ms,tpot=40ms@p90.")


def market(question: FleetQuestion, load: Load, knows: Knows) -> Market:
    """The types of a question, with the load in groups. CapacityError when too much of it can be served by none."""
    abilities, passed = [], []
    for device in dict.fromkeys(question.devices):
        for degree in sorted(set(question.tensor_parallel)):
            try:
                shape = Shape(device=device, tensor_parallel=degree, setup="mixed")
                abilities.append(Ability(question, shape))
            except MegalithError as error:
                passed.append(f"{device} tp{degree}: {error.what}")
    if not abilities:
        raise CapacityError(f"No type of instance can be: {'; '.join(passed)}.", "Name larger devices or formats.")
    buckets, keys = sizes(load, knows)
    bounds = limits(question.slo)
    table = [
        [_within(ability, size.prompt_tokens, size.answer_tokens, bounds) for size in buckets] for ability in abilities
    ]
    late = 0.0
    for place, size in enumerate(buckets):
        if any(row[place] > 0 for row in table):
            continue
        # Nobody keeps the limits for these: they are the misses that the promise allows, and work all the same.
        late += size.rate_per_s / load.rate_per_s
        for row, ability in zip(table, abilities, strict=True):
            row[place] = most_requests_per_s(ability, size.prompt_tokens, size.answer_tokens) or inf
    if late > 1 - bounds.percent / 100 + 1e-9:
        limit = ", ".join(map(str, question.slo.bounds))
        what = f"{late:.1%} of the requests are of sizes that no type serves within {limit}, even without a queue"
        raise CapacityError(f"{what}; {bounds.percent:g} % must be.", "Name faster devices, or higher degrees.")
    offers = [_offer(question, ability) for ability in abilities]
    return Market([one.shape for one in abilities], offers, loads(buckets, table), keys, knows, passed)


def _within(ability: Ability, prompt: float, answer: float, bounds: Limits) -> float:
    """Requests a second of that size within the limits; 0 where one alone breaks them."""
    tpot_ns = bounds.tpot[0]
    if prompt + answer <= min(ability.max_context, ability.kv_tokens):
        ttft_ns, _, e2e_ns = ability.alone_ns(max(1, round(prompt)), max(1, round(answer)))
        if ttft_ns > bounds.ttft[0] or e2e_ns > bounds.e2e[0]:
            return 0.0
    return most_requests_per_s(ability, prompt, answer, tpot_ns)


def _offer(question: FleetQuestion, ability: Ability) -> Offer:
    devices = ability.shape.tensor_parallel
    price = float(devices) if question.minimise == "devices" else ability.price_per_hour_usd or 0.0
    return Offer(_name(ability.shape), price, devices=devices)


def _name(shape: Shape) -> str:
    return shape.render().partition(",")[0]


def solve(places: Market, factor: float = 1.0, *, slices: int | None = None, most_devices: int | None = None) -> Mix:
    """The cheapest mix for the load times a factor. Groups that no bought type has work with go to the largest one."""
    scaled = [[load * factor for load in row] for row in places.loads]
    mix = cheapest_mix(places.offers, scaled, slices=slices, most_devices=most_devices)
    rows = []
    for row in mix.shares:
        open_to = [share if count else 0.0 for share, count in zip(row, mix.counts, strict=True)]
        total = sum(open_to)
        first = max(range(len(row)), key=lambda place: (mix.counts[place] > 0, places.offers[place].price))
        rows.append(
            tuple(share / total for share in open_to) if total else tuple(float(j == first) for j in range(len(row)))
        )
    return msgspec.structs.replace(mix, shares=tuple(rows))


def best_single(places: Market, factor: float = 1.0, most_devices: int | None = None) -> tuple[Offer, int] | None:
    """The cheapest type that serves all of it alone, and how many; the control of a mix. None: no type does."""
    found = []
    for place, offer in enumerate(places.offers):
        count = single(offer, [row[place] * factor for row in places.loads], most_devices)
        if count is not None:
            found.append((offer.price * max(count, 1), place, max(count, 1)))
    if not found:
        return None
    _, place, count = min(found)
    return places.offers[place], count


def add_mix(
    plan: FleetPlan,
    question: FleetQuestion,
    knows: Knows,
    *,
    slices: int | None = None,
    advance: Callable[[int], object] | None = None,
) -> FleetPlan:
    """The plan with the answer of the integer program beside it: simulated where the plan is, else predicted.

    Raises ConfigError for what a mix cannot be asked, MachineError without the solver.
    """
    check(question)
    part, load, _ = cut(question.workload, question.seed, question.most_requests)
    question = msgspec.structs.replace(question, workload=part)
    try:
        places = market(question, load, knows)
        if plan.nature == "predicted":
            return msgspec.structs.replace(plan, mix=_predicted(places, question, slices))
        answer = _simulated(places, question, plan, slices, advance or (lambda _: None))
    except CapacityError as error:
        answer = MixAnswer(nature=plan.nature, knows=knows, pays=False, why=error.what)
    return msgspec.structs.replace(plan, mix=answer)


def _predicted(places: Market, question: FleetQuestion, slices: int | None) -> MixAnswer:
    """Against the best type by the same table: a queueing formula on one side only would compare two arithmetics."""
    found = _Found(1.0, solve(places, slices=slices, most_devices=question.most_devices), None)
    control = best_single(places, most_devices=question.most_devices)
    if control is None:
        return _answer(places, found, "predicted", None, None, "no single type serves all of it")
    offer, count = control
    return _answer(places, found, "predicted", offer.price * count, f"{count} x {offer.name} by the same table", "")


def _simulated(
    places: Market, question: FleetQuestion, plan: FleetPlan, slices: int | None, advance: Callable[[int], object]
) -> MixAnswer:
    """The least factor whose mix the simulator lets pass and that is cheaper than the plan's winner."""
    limit = plan.winner.objective
    tried: dict[int, _Found] = {}

    def attempt(step: int) -> _Found | None:
        factor = STEP**step
        mix = solve(places, factor, slices=slices, most_devices=question.most_devices)
        if mix.price >= limit * (1 - _PAYS):
            return None
        # Instances that kept it under another factor keep it; ones that did not may share the work in a better way.
        for one in tried.values():
            if one.mix.counts == mix.counts and kept(one):
                return one
        trial = run_mix(question, places.shapes, mix.counts, places.knows, places.keys, mix.shares)
        advance(1)
        tried[step] = _Found(factor, mix, trial)
        return tried[step]

    def kept(found: _Found | None) -> bool:
        return found is not None and found.trial is not None and found.trial.kept

    first = attempt(0)
    best = first if kept(first) else None
    if first is None or best is not None:
        for step in range(-1, _FIRST - 1, -1):
            lower = attempt(step)
            if lower is not None and not kept(lower):
                break
            best = lower or best
    else:
        for step in range(1, _LAST + 1):
            higher = attempt(step)
            if higher is None or kept(higher):
                best = higher
                break
    if best is not None:
        return _answer(places, best, "simulated", limit, f"the winner, {plan.winner.title}", "", len(tried))
    return _none_pays(places, question, plan, tried, slices)


def _none_pays(
    places: Market, question: FleetQuestion, plan: FleetPlan, tried: dict[int, _Found], slices: int | None
) -> MixAnswer:
    against = f"the winner, {plan.winner.title}"
    if tried:
        found = tried[max(tried)]
        assert found.trial is not None
        broken, number = found.trial.breaks, len(tried)
        which = "the one cheaper mix that was tried breaks" if number == 1 else f"all {number} that were tried break"
        why = f"{which} {broken}, which {found.trial.shares[broken]:.1%} of the requests keep with this one"
    else:
        found = _Found(1.0, solve(places, slices=slices, most_devices=question.most_devices), None)
        why = "it is no cheaper by arithmetic already"
    answer = _answer(places, found, "simulated", plan.winner.objective, against, why, len(tried))
    return msgspec.structs.replace(answer, pays=False)


def _answer(
    places: Market, found: _Found, nature: str, control: float | None, against: str | None, why: str, runs: int = 0
) -> MixAnswer:
    mix, trial = found.mix, found.trial
    saves = None if not control else 1 - mix.price / control
    got = trial.part if trial is not None else (None,) * len(mix.counts)
    parts = [
        MixPart(name=offer.name, flags=shape.flags(Size(count)), count=count, busy=busy / found.factor, requests=number)
        for offer, shape, count, busy, number in zip(
            places.offers, places.shapes, mix.counts, mix.busy, got, strict=True
        )
        if count
    ]
    several = len(parts) > 1
    if not several and not why:
        why = "one type serves everything best"
    return MixAnswer(
        nature=nature, knows=places.knows, pays=several and saves is not None and saves > _PAYS, why=why, parts=parts,  # type: ignore[arg-type]
        objective=mix.price, control=control, against=against, saves=saves, factor=found.factor, proven=mix.proven,
        good=None if trial is None else trial.good, shares={} if trial is None else trial.shares, runs=runs,
    )  # fmt: skip
