"""What `plan fleet` decides after its search: a shared power budget (POLCA), and a fleet that follows its load."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import pytest

from megalith.base.errors import CapacityError, ConfigError
from megalith.plan.fleet import plan_fleet
from megalith.plan.fleet_all import plan_all
from megalith.plan.fleet_answer import Contribution, FleetPlan
from megalith.plan.fleet_power import plan_within, under_polca
from megalith.plan.fleet_question import FleetQuestion, Shape, Size
from megalith.plan.fleet_scaling import follow
from megalith.plan.fleet_trial import Probe, probe
from megalith.plan.mechanisms import POLCA, SCALING, pipelines
from megalith.specs.arrivals import CountedArrivals
from megalith.specs.lengths import FixedLength
from megalith.specs.posterior import Posterior, write_posterior
from megalith.specs.slo import parse_slo
from megalith.specs.workload import WorkloadSpec
from megalith.specs.workload_text import parse_workload

ASKED: dict[str, Any] = {
    "model": "llama-3.1-8b", "workload": parse_workload("poisson:rate=12,input=50,output=400,requests=300"),
    "slo": parse_slo("ttft=1s,tpot=15ms"), "devices": ("a100-80gb",), "tensor_parallel": (1,), "setups": ("mixed",),
    "most_devices": 6, "beside_w": 100.0,
}  # fmt: skip
COUNTS = (20,) * 3 + (350,) + (20,) * 6
WAVE = WorkloadSpec(
    name="a busy ten minutes", arrivals=CountedArrivals(step_s=600.0, counts=COUNTS), requests=sum(COUNTS),
    input=FixedLength(tokens=4000), output=FixedLength(tokens=20),
)  # fmt: skip
VARYING: dict[str, Any] = ASKED | {
    "workload": WAVE, "slo": parse_slo("ttft=5s@p90,tpot=2s@p90"), "devices": ("l4",), "start_s": 60.0
}  # fmt: skip


@pytest.fixture(scope="module")
def fixed() -> FleetPlan:
    return plan_fleet(FleetQuestion(**VARYING), workers=1)


def said(plan: FleetPlan, mechanism: str) -> Contribution:
    return next(one for one in plan.contributions if one.mechanism == mechanism)


def asked(**more: Any) -> FleetQuestion:
    return FleetQuestion(**(ASKED | more))


def test_a_fleet_beyond_its_rating_is_chosen_under_polca_as_a_run_of_its_own_says() -> None:
    """Two A100 are rated for 1,000 W with what stands beside them and draw 771 W; a dear H100 is rated for 800 W."""
    dear = asked(devices=("a100-80gb", "h100-sxm"), prices_usd={"h100-sxm": 9.0}, power_budget_w=900.0)
    plan = plan_all(dear, workers=1)
    one = said(plan, POLCA)
    assert (one.state, one.nature) == ("pays", "simulated")
    assert plan.winner.shape.extras == ("polca",)
    assert plan.winner.objective == one.objective == pytest.approx(2 * 3.67)
    assert plan.runner_up is not None
    assert plan.runner_up.objective == one.control == pytest.approx(9.0)
    assert one.saves == pytest.approx(1 - 2 * 3.67 / 9)
    trial = plan.winner.trial
    assert trial is not None
    assert trial.kept
    assert trial.brakes == 0
    assert trial.row_peak_w is not None
    assert 0 < trial.row_peak_w <= 900
    assert f"{trial.row_peak_w:,.0f} W at most" in one.why
    assert any("budget_w = 900, other_w = 100" in note for note in plan.notes)


def test_a_budget_that_holds_the_fleet_by_rating_changes_nothing_and_one_too_small_says_so() -> None:
    free = plan_fleet(asked(), workers=1)
    ample = plan_within(asked(power_budget_w=1000.0), True, lambda _: free)
    assert ample.winner == free.winner
    assert said(ample, POLCA).state == "does not pay"
    assert "rated for 1,000 W of the 1,000 W" in said(ample, POLCA).why

    tight = asked(power_budget_w=700.0)
    trial = under_polca(tight, free)
    assert trial.brakes > 0

    def by_rating(question: FleetQuestion) -> FleetPlan:
        if question.power_budget_w is not None:
            raise CapacityError("No fleet of one.", "Ask for less.")
        return free

    with pytest.raises(CapacityError, match=rf"No fleet within 700 W .* brakes {trial.brakes} times") as error:
        plan_within(tight, True, by_rating)
    assert "--power-budget 1000" in str(error.value.hint)
    with pytest.raises(CapacityError, match="By rating no fleet within 700 W"):
        plan_within(tight, False, by_rating)


def test_a_search_with_a_budget_never_goes_beyond_the_rating() -> None:
    question = asked(power_budget_w=1499.0)
    shape = Shape(device="a100-80gb", tensor_parallel=1, setup="mixed")
    assert question.rated_w(shape) == 500
    assert question.most(shape) == 2
    with pytest.raises(CapacityError):
        plan_fleet(asked(power_budget_w=499.0), simulate=False)


def test_a_fleet_follows_its_load_where_that_saves_hours(fixed: FleetPlan) -> None:
    plan = follow(FleetQuestion(**VARYING), fixed, workers=1)
    one, winner = said(plan, SCALING), plan.winner
    assert one.state == "pays"
    assert one.control == fixed.winner.objective
    assert plan.runner_up == fixed.winner
    assert winner.trial is not None
    again = probe(
        Probe(question=FleetQuestion(**VARYING), shape=winner.shape, size=winner.size, rate_per_s=plan.rate_per_s)
    )
    assert again.kept
    assert again.mean_instances == pytest.approx(winner.trial.mean_instances)
    share = again.mean_instances / winner.size.instances
    assert 0.5 <= share < 1
    assert one.objective == winner.objective == pytest.approx(fixed.winner.objective * share)
    assert one.saves == pytest.approx(1 - share)
    assert winner.price_per_hour_usd == pytest.approx(winner.objective)
    assert ":start_s=60 --policy target-scaling:min_count=1" in winner.flags


def test_by_forecast_the_fleet_is_there_before_the_load(fixed: FleetPlan, tmp_path: Path) -> None:
    """Samples that are right: three all alike, of the minutes that come."""
    steps = [float(count) / 600 for count in COUNTS for _ in range(10)]
    rows = [[steps[min(at + ahead, len(steps) - 1)] for ahead in range(5)] for at in range(len(steps))]
    values = array("f", [value for row in rows for _ in range(3) for value in row])
    path = tmp_path / "load.posterior"
    write_posterior(path, Posterior(60.0, len(steps), 3, 5, values, "what comes"))
    question = FleetQuestion(**(VARYING | {"posterior": str(path)}))
    plan = follow(question, fixed, workers=1)
    one = said(plan, SCALING)
    assert "by forecast in the mean" in one.why
    assert one.state == "pays"
    assert plan.runs == fixed.runs + 6


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"start_s": 600.0}, "it is over first"),
        ({"minimise": "devices"}, "bought for the peak"),
    ],
)
def test_what_cannot_follow_says_why(fixed: FleetPlan, more: dict[str, Any], told: str) -> None:
    plan = follow(FleetQuestion(**(VARYING | more)), fixed, workers=1)
    assert plan.winner == fixed.winner
    assert said(plan, SCALING).state == "does not apply"
    assert told in said(plan, SCALING).why


def test_without_a_run_or_a_start_scaling_is_only_bounded(fixed: FleetPlan) -> None:
    assert "--start SECONDS tries it" in said(fixed, SCALING).why
    long = parse_workload("poisson:rate=12,input=50,output=400,requests=3000")
    predicted = plan_all(asked(workload=long, start_s=1.0), simulate=False)
    assert predicted.winner.size.instances > 1
    assert said(predicted, SCALING).state == "not asked"


@pytest.mark.parametrize(
    "wrong", [{"power_budget_w": 0.0}, {"beside_w": -1.0}, {"start_s": -1.0}, {"posterior": "a.posterior"}]
)
def test_questions_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        asked(**wrong)


def test_pipelines_that_do_not_block_are_tried_where_an_instance_has_several_devices() -> None:
    """On the measured tables of H100, which say nothing of sending between stages."""
    big = asked(
        model="llama-2-70b", devices=("h100-sxm",), tensor_parallel=(4,), weight_format="fp8", max_context=4096,
        slo=parse_slo("ttft=2s,tpot=50ms"),
        workload=parse_workload("poisson:rate=2,input=400,output=60,requests=40"), most_devices=16,
    )  # fmt: skip
    plan = plan_fleet(big, workers=1)
    one = said(plan, "non-blocking pipeline")
    assert (one.nature, one.source) == ("simulated", "EnergonAI")
    assert one.state in ("pays", "does not pay")
    base = Shape(device="h100-sxm", tensor_parallel=4, setup="mixed")
    ways = pipelines(base)
    assert [(way.devices, way.pipeline) for way in ways] == [(4, "non-blocking"), (4, "blocking")]
    assert ":tp2:pp2:pipeline=non-blocking" in ways[0].flags(Size(1))
    assert one.objective is not None
    price = big.price_usd("h100-sxm")
    assert price is not None
    count = round(one.objective / (4 * price))
    kept = [
        probe(Probe(question=big, shape=ways[0], size=Size(number), rate_per_s=plan.rate_per_s)).kept
        for number in (count - 1, count)
        if number > 0
    ]
    assert kept == [False, True][-len(kept) :]
    assert pipelines(Shape(device="h100-sxm", tensor_parallel=1, setup="mixed")) == []
