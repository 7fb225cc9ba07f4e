"""A kind of fleet that may answer, with what the arithmetic says of it: what it can do, the least size, a first guess.

Knows bounds and predictions; must not simulate.
"""

from __future__ import annotations

from typing import NamedTuple

from megalith.base.errors import MegalithError
from megalith.plan.fleet_bounds import Ability, Least, discard, least_instances, least_power_w
from megalith.plan.fleet_estimate import Prediction, Steady
from megalith.plan.fleet_load import Load
from megalith.plan.fleet_question import FleetQuestion, Shape, Size


class Kind(NamedTuple):
    """A kind of fleet that may do."""

    shape: Shape
    ability: Ability
    least: Least
    guess: tuple[Size, Prediction] | None
    """The smallest size that does by prediction; None when none is predicted to."""
    prefill_share: float


class Unfit(NamedTuple):
    """Why a kind of fleet will not do, whatever its size."""

    why: str
    instances: int | None = None
    """What it would need at least."""


def find_kind(question: FleetQuestion, load: Load, shape: Shape) -> Kind | Unfit:
    """What arithmetic says of a shape under a load."""
    try:
        ability = Ability(question, shape)
    except MegalithError as error:
        return Unfit(error.what)
    if shape.pipeline_parallel > 1:
        # Steps overlap in a pipeline, which the bounds below know nothing of: only runs judge it.
        return Kind(shape, ability, Least(1, "the work of one pipeline"), None, 0.0)
    no = discard(ability, load, question.slo)
    if no is not None:
        return Unfit(f"{no.resource}: {no.why}")
    if question.minimise == "power" and ability.power is None:
        return Unfit("nobody published what this device draws")
    least = least_instances(ability, load, question.slo)
    most = question.most(shape)
    if least.instances > most:
        return Unfit(f"{least.resource}: more than {question.most_devices:,} devices", least.instances)
    steady = Steady(ability, load, question.slo)
    return Kind(shape, ability, least, steady.smallest(least.instances, most), steady.prefill_share)


def least_objective(question: FleetQuestion, load: Load, kind: Kind, instances: int) -> float:
    """No fleet of so many instances of that kind is better than that, in USD an hour, watts or devices."""
    match question.minimise:
        case "devices":
            return float(instances * kind.shape.devices)
        case "cost":
            return instances * (kind.ability.price_per_hour_usd or 0.0)
        case "power":
            return least_power_w(kind.ability, load, question.slo, instances)
