"""`plan fleet --start`: a fleet that follows its load against the same fleet at its full size.

The winner keeps its kind and may have as many instances as before at most; a rule takes them away and starts them
again. Reactive: the proportional rule on unfinished requests of an instance, aimed at what an instance has in the
busiest minutes (Little's law on the simulated times of the fixed fleet). By forecast (HARMONY): samples of the load to
come, from a file, and what an instance carries. Each setting is one simulated run of the whole load; the fewest
instance-hours that keep the service level win. Knows plans; must not know how they are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from megalith.base.units import NS_PER_S
from megalith.plan.fleet_answer import Choice, Contribution, FleetPlan
from megalith.plan.fleet_choice import latency
from megalith.plan.fleet_load import Load, cut
from megalith.plan.fleet_question import FleetQuestion, Shape
from megalith.plan.fleet_trial import Probe, Trial, perform
from megalith.plan.mechanisms import SCALING, WORTH, put
from megalith.sim.processes import Crew, Failed, count_workers

PERIOD_S = 15.0
"""Between two decisions, as Kubernetes has it."""
STABLE_S = 300.0
_TURNS = 10
"""A load shorter than so many starts is nothing to follow."""
_AIMS = (1.0, 0.8, 0.6)
_EPS = (0.2, 0.05, 0.0)
_BUSY_S = 60.0


class _Rule(NamedTuple):
    """A setting, and what is forecast in it."""

    policy: str
    forecast: bool


def follow(
    question: FleetQuestion, plan: FleetPlan, workers: int | None = None,
    advance: Callable[[int], object] | None = None,
) -> FleetPlan:  # fmt: skip
    """The plan with a fleet that scales where that costs less. `plan` was simulated, or only says what it could be."""
    winner, trial = plan.winner, plan.winner.trial
    no = _refusal(question, plan)
    if no or trial is None or question.start_s is None:
        why = no or "only a simulated run tells"
        return put(plan, _made("does not apply" if no else "not asked", plan.nature, why))
    part, load, _ = cut(question.workload, question.seed, question.most_requests)
    asked = msgspec.structs.replace(question, workload=part)
    rules = _rules(question, load, winner)
    shapes = [
        msgspec.structs.replace(winner.shape, extras=(*winner.shape.extras, rule.policy), start_s=question.start_s)
        for rule in rules
    ]
    trials = _run(asked, shapes, winner, load, workers, advance)
    found = [
        (rule, shape, one)
        for rule, shape, one in zip(rules, shapes, trials, strict=True)
        if isinstance(one, Trial) and one.kept
    ]
    if not found:
        why = f"no setting of {len(rules)} keeps the service level: {_failure(trials)}"
        return put(plan, _made("does not pay", "simulated", why, control=winner.objective, runs=len(rules)), len(rules))
    rule, shape, best = min(found, key=lambda one: _objective(question, winner, one[2]))
    return _answer(question, plan, rule, shape, best, len(rules), _why(winner, found))


def _refusal(question: FleetQuestion, plan: FleetPlan) -> str:
    """Why the fleet cannot follow the load, whatever the rule; "" when it can."""
    winner, start_s = plan.winner, question.start_s or 0.0
    if question.minimise == "devices":
        return "devices are bought for the peak: --minimise cost or power counts hours"
    if winner.size.instances <= winner.shape.smallest:
        return f"{winner.title} is the smallest fleet: there is nothing to take away"
    if "polca" in winner.shape.extras:
        return "the fleet shares a power budget under POLCA: both at once are not tried"
    if plan.span_s < _TURNS * (start_s + PERIOD_S):
        return (
            f"the load lasts {plan.span_s / 60:.3g} min and an instance takes {start_s:g} s to serve: it is over first"
        )
    return ""


def _rules(question: FleetQuestion, load: Load, winner: Choice) -> list[_Rule]:
    """Settings to try; each pool has its own count."""
    trial, most = winner.trial, max(winner.size.instances - winner.size.prefill, winner.size.prefill)
    assert trial is not None
    bounds = f"min_count=1:max_count={most}"
    busy = load.rate_per_s * load.peak_over_mean(_BUSY_S) / winner.size.instances
    at_once = busy * (trial.e2e_p50_ns or NS_PER_S) / NS_PER_S
    rules = [
        _Rule(f"target-scaling:{bounds}:target={max(aim * at_once, 0.1):.3g}:stabilise_s={STABLE_S:g}", False)
        for aim in _AIMS
    ]
    if question.posterior is not None and not winner.shape.split:
        how = f"{bounds}:capacity_per_s={busy:.4g}:start_s={question.start_s:g}:period_s={PERIOD_S:g}"
        rules += [_Rule(f"posterior-scaling:{how}:path={question.posterior}:eps={eps:g}", True) for eps in _EPS]
    return rules


def _run(
    question: FleetQuestion, shapes: Sequence[Shape], winner: Choice, load: Load, workers: int | None,
    advance: Callable[[int], object] | None,
) -> list[Trial | Failed]:  # fmt: skip
    tasks = [
        Probe(question=question, shape=shape, size=winner.size, rate_per_s=load.rate_per_s) for shape in shapes
    ]  # fmt: skip
    results: dict[int, Trial | Failed] = {}
    with Crew(perform, min(count_workers(workers), len(tasks))) as crew:
        for place, one in crew.results(tasks):
            assert isinstance(one, Trial | Failed)
            results[place] = one
            if advance is not None:
                advance(1)
    return [results[place] for place in range(len(tasks))]


def _answer(
    question: FleetQuestion, plan: FleetPlan, rule: _Rule, shape: Shape, best: Trial, runs: int, why: str
) -> FleetPlan:
    """Chosen where it saves; else what it would have cost."""
    winner = plan.winner
    objective = _objective(question, winner, best)
    saves = 1 - objective / winner.objective if winner.objective else 0.0
    made = _made(
        "pays" if saves > WORTH else "does not pay", "simulated", why, objective, winner.objective, saves,
        forecast=rule.forecast,
    )  # fmt: skip
    if saves <= WORTH:
        return put(plan, made, runs)
    share = best.mean_instances / winner.size.instances
    price = winner.price_per_hour_usd
    tokens = best.output_tokens_per_s * 3600 / 1e6
    chosen = msgspec.structs.replace(
        winner, shape=shape, flags=shape.flags(winner.size), objective=objective, trial=best, power_w=best.power_w,
        price_per_hour_usd=None if price is None else price * share,
        price_per_million_tokens_usd=None if price is None or tokens <= 0 else price * share / tokens,
        ttft_ns=latency(question.slo, best, "ttft"), tpot_ns=latency(question.slo, best, "tpot"), margin=best.margin,
    )  # fmt: skip
    note = "The fleet scales: money is for the hours of its instances; headroom and risks are those of all of them."
    changed = msgspec.structs.replace(plan, winner=chosen, runner_up=winner, notes=[*plan.notes, note])
    return put(changed, made, runs)


def _objective(question: FleetQuestion, winner: Choice, trial: Trial) -> float:
    if question.minimise == "power":
        return winner.objective if trial.power_w is None else trial.power_w
    return winner.objective * trial.mean_instances / winner.size.instances


def _why(winner: Choice, found: Sequence[tuple[_Rule, Shape, Trial]]) -> str:
    """Mean instances of the best reactive setting and the best one by forecast, against all the time."""
    said = []
    for name, forecast in (("reactive", False), ("by forecast", True)):
        counts = [one.mean_instances for rule, _, one in found if rule.forecast == forecast]
        if counts:
            said.append(f"{min(counts):.3g} {name}")
    return f"{winner.size.instances} instances all the time, {' and '.join(said)} in the mean"


def _failure(trials: Sequence[Trial | Failed]) -> str:
    best = max((one for one in trials if isinstance(one, Trial)), key=lambda one: one.attained, default=None)
    if best is None:
        return str(trials[0])
    return f"the best breaks {best.breaks} ({best.attained:.0%} of the requests are good)"


def _made(
    state: str, nature: str, why: str, objective: float | None = None, control: float | None = None,
    saves: float | None = None, forecast: bool = False, runs: int = 0,
) -> Contribution:  # fmt: skip
    source = "HARMONY" if forecast else "HARMONY; reactive rule"
    if runs:
        why = f"{why}, in {runs} runs"
    return msgspec.convert(
        {"mechanism": SCALING, "source": source, "state": state, "nature": nature, "why": why,
         "objective": objective, "control": control, "saves": saves}, Contribution,
    )  # fmt: skip
