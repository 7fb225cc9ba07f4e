"""The whole answer of `plan fleet`: the search, then what goes beyond one kind of fleet of a fixed size.

A power budget decides what may be bought at all, so it comes first; scaling takes away what the chosen fleet does not
need at every hour. Knows the order; must not know how each is decided.
"""

from __future__ import annotations

from collections.abc import Callable

from megalith.plan.fleet import plan_fleet
from megalith.plan.fleet_answer import FleetPlan
from megalith.plan.fleet_power import plan_within
from megalith.plan.fleet_question import FleetQuestion
from megalith.plan.fleet_scaling import follow


def plan_all(
    question: FleetQuestion, *, simulate: bool = True, workers: int | None = None,
    advance: Callable[[int], object] | None = None,
) -> FleetPlan:  # fmt: skip
    """As plan_fleet, and with what `power_budget_w` and `start_s` ask for."""

    def search(asked: FleetQuestion) -> FleetPlan:
        return plan_fleet(asked, simulate=simulate, workers=workers, advance=advance)

    plan = search(question) if question.power_budget_w is None else plan_within(question, simulate, search)
    return plan if question.start_s is None else follow(question, plan, workers, advance)
