"""The points of a picture of a FleetPlan: winner and runner-up at rates around the planned one.

Knows plans and scenarios; must not run or draw.
"""

from __future__ import annotations

import msgspec

from megalith.plan.fleet_answer import FleetPlan
from megalith.plan.fleet_question import FleetQuestion
from megalith.sim.sweep import Point
from megalith.specs.workload_rate import at_rate

SHARES = (0.5, 0.75, 1.0, 1.25, 1.5)
"""Of the planned rate."""
MOST_REQUESTS = 5_000
"""Of each point: a picture need not be as exact as the plan."""


def fleet_points(plan: FleetPlan, question: FleetQuestion) -> list[Point]:
    """One point a fleet and rate, labelled as sim.sweep_rows reads them."""
    workload = msgspec.structs.replace(question.workload, requests=min(plan.requests, MOST_REQUESTS))
    points = []
    for choice in filter(None, (plan.winner, plan.runner_up)):
        for share in SHARES:
            rate = plan.rate_per_s * share
            scenario = question.scenario(choice.shape.fleet(choice.size), workload=at_rate(workload, rate))
            labels = {"fleet": choice.title, "policy": choice.shape.mechanisms, "rate": f"{rate:.6g}", "seed": "0"}
            points.append(Point(labels=labels, scenario=scenario))
    return points
