"""`plan fleet --power-budget`: a fleet that is provisioned by its rating, or more of it in the budget under POLCA.

By rating, every instance counts with what its devices are rated for and what stands beside them. A fleet that does not
fit the budget so may still draw less: the best fleet without a budget is simulated as one power domain under POLCA's
two thresholds (policy/capping.py). It is chosen when the service level is kept without a brake and it comes before the
best fleet that fits by rating. Knows plans; must not know how they are shown.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from megalith.base.errors import CapacityError
from megalith.plan.fleet import plan_fleet
from megalith.plan.fleet_answer import Choice, Contribution, FleetPlan
from megalith.plan.fleet_choice import latency
from megalith.plan.fleet_question import FleetQuestion
from megalith.plan.fleet_trial import Probe, Trial, probe
from megalith.plan.mechanisms import POLCA, WORTH, put

Plan = Callable[[FleetQuestion], FleetPlan]


def plan_within(question: FleetQuestion, simulate: bool, plan: Plan | None = None) -> FleetPlan:
    """The answer within `power_budget_w`. Raises CapacityError when neither way to provision keeps the service level.

    `plan` answers a question without thinking of POLCA; by default plan_fleet.
    """
    plan = plan or (lambda asked: plan_fleet(asked, simulate=simulate))
    budget_w = question.power_budget_w
    assert budget_w is not None
    free = plan(msgspec.structs.replace(question, power_budget_w=None))
    rated_w = _rated_w(question, free.winner)
    if rated_w <= budget_w:
        why = f"{free.winner.title} is rated for {rated_w:,.0f} W of the {budget_w:,.0f} W: nothing has to be shared"
        return put(free, _made("does not pay", free.nature, why))
    rated, refused = None, ""
    try:
        rated = plan(question)
    except CapacityError as error:
        refused = error.what
    over = f"{free.winner.title} is rated for {rated_w:,.0f} W, the budget is {budget_w:,.0f} W"
    if not simulate:
        if rated is None:
            what = f"By rating no fleet within {budget_w:,.0f} W keeps {question.slo}: {over}."
            raise CapacityError(what, "Ask again without --predict-only: a simulated run tells what POLCA would do.")
        return put(rated, _made("not asked", rated.nature, f"{over}; only a simulated run tells what it draws"))
    return _decide(question, free, rated, over, refused)


def _decide(question: FleetQuestion, free: FleetPlan, rated: FleetPlan | None, over: str, refused: str) -> FleetPlan:
    """The free winner under POLCA against the best fleet that fits by rating."""
    budget_w = question.power_budget_w
    trial = under_polca(question, free)
    fits = question.most(free.winner.shape)
    drawn = f"under POLCA it draws {trial.row_peak_w or 0:,.0f} W at most"
    holds = trial.kept and trial.brakes == 0
    objective = free.winner.objective if question.minimise != "power" else trial.power_w or free.winner.objective
    control = None if rated is None else rated.winner.objective
    saves = None if not control else 1 - objective / control
    if holds and (saves is None or saves > WORTH):
        instead = f"{free.winner.size.instances} instances where {fits} fit by rating"
        if rated is None:
            instead += ", with which no fleet keeps the service level"
        why = f"{over}; {drawn}, without a brake: {instead}"
        chosen = put(free, _made("pays", "simulated", why, objective, control, saves))
        return _chosen(question, chosen, rated, trial, objective)
    failed = f"{drawn}" if holds else f"{drawn}, brakes {trial.brakes} times and {_kept(trial)}"
    if rated is None:
        what = f"No fleet within {budget_w:,.0f} W keeps {question.slo}: {over}; {failed}. {refused}"
        raise CapacityError(what, f"--power-budget {_rated_w(question, free.winner):.0f} holds it by rating.")
    held = _made("does not pay", "simulated", f"{over}; {failed}", objective if holds else None, control, saves)
    return put(rated, held if holds else msgspec.structs.replace(held, saves=None))


def under_polca(question: FleetQuestion, plan: FleetPlan) -> Trial:
    """The winner of a plan as one power domain in the budget; simulated."""
    winner = plan.winner
    shape = msgspec.structs.replace(winner.shape, extras=(*winner.shape.extras, "polca"))
    whole = msgspec.structs.replace(
        question, workload=msgspec.structs.replace(question.workload, requests=plan.requests), power_budget_w=None
    )
    return probe(
        Probe(
            question=whole, shape=shape, size=winner.size, rate_per_s=plan.rate_per_s, early=False,
            budget_w=question.power_budget_w,
        )
    )  # fmt: skip


def _chosen(
    question: FleetQuestion, plan: FleetPlan, rated: FleetPlan | None, trial: Trial, objective: float
) -> FleetPlan:
    shape = msgspec.structs.replace(plan.winner.shape, extras=(*plan.winner.shape.extras, "polca"))
    winner = msgspec.structs.replace(
        plan.winner, shape=shape, flags=shape.flags(plan.winner.size), trial=trial, power_w=trial.power_w,
        objective=objective, ttft_ns=latency(question.slo, trial, "ttft"), tpot_ns=latency(question.slo, trial, "tpot"),
        margin=trial.margin,
    )  # fmt: skip
    beside_w = question.beside_w * shape.devices
    notes = [
        *plan.notes,
        f"The budget in a fleet file: [power] budget_w = {question.power_budget_w:g}, other_w = {beside_w:g}. Headroom "
        "and risks are those of the fleet without a budget.",
        f"POLCA was held against {plan.span_s / 60:.3g} min of this load; `megalith plan power --headroom` looks at "
        "the busiest hours of a week.",
    ]
    return msgspec.structs.replace(
        plan, winner=winner, runner_up=None if rated is None else rated.winner, notes=notes, runs=plan.runs + 1
    )


def _rated_w(question: FleetQuestion, choice: Choice) -> float:
    return choice.size.instances * question.rated_w(choice.shape)


def _kept(trial: Trial) -> str:
    return "keeps the service level" if trial.kept else f"breaks {trial.breaks}"


def _made(
    state: str, nature: str, why: str, objective: float | None = None, control: float | None = None,
    saves: float | None = None,
) -> Contribution:  # fmt: skip
    return msgspec.convert(
        {"mechanism": POLCA, "source": "POLCA", "state": state, "nature": nature, "why": why,
         "objective": objective, "control": control, "saves": saves}, Contribution,
    )  # fmt: skip
