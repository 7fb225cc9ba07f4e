"""`plan fleet` with decode attention on other devices: layouts by arithmetic, confirmed or refuted by runs."""

from __future__ import annotations

from typing import Any

import pytest

from megalith.base.errors import ConfigError
from megalith.plan.fleet import plan_fleet
from megalith.plan.fleet_answer import Contribution, FleetPlan
from megalith.plan.fleet_bounds import Ability
from megalith.plan.fleet_elsewhere import layouts
from megalith.plan.fleet_explain import passed_table
from megalith.plan.fleet_load import cut
from megalith.plan.fleet_question import FleetQuestion, Shape, Size
from megalith.plan.fleet_trial import Probe, probe
from megalith.specs.fleet_text import parse_fleet
from megalith.specs.slo import parse_slo
from megalith.specs.workload_text import parse_workload

ASKED: dict[str, Any] = {
    "model": "llama-3.1-70b", "workload": parse_workload("poisson:rate=1,input=6000,output=300,requests=60"),
    "slo": parse_slo("ttft=20s,tpot=200ms"), "devices": ("h100-sxm", "h20"), "tensor_parallel": (2, 4),
    "setups": ("mixed",), "most_devices": 32, "timer": "analytic",
}  # fmt: skip


def said(plan: FleetPlan) -> Contribution:
    return next(one for one in plan.contributions if one.mechanism == "attention on other devices")


def test_what_a_layout_is_worth_is_what_runs_of_its_own_say() -> None:
    question = FleetQuestion(**ASKED)
    plan = plan_fleet(question, workers=1)
    one = said(plan)
    assert (one.nature, one.source) == ("simulated", "Lamina, InstInfer")
    assert one.control is not None
    tried = [each for each in (plan.winner, plan.runner_up) if each is not None and each.shape.attention]
    shapes = [each.shape for each in tried] + [each.shape for each in plan.passed if each.shape.attention]
    assert shapes
    rows = passed_table(plan).rows
    assert all(any(str(shape.attention) in str(row) for row in rows) for shape in shapes if shape != plan.winner.shape)
    if one.objective is None:
        assert one.state == "does not pay"
        return
    assert (one.state == "pays") == (one.objective < 0.995 * one.control)
    prices = {shape: question.instance_price_usd(shape) for shape in shapes}
    sizes = [
        (shape, round(one.objective / price))
        for shape, price in prices.items()
        if price and one.objective / price == pytest.approx(round(one.objective / price))
    ]
    assert any(
        [
            probe(Probe(question=question, shape=shape, size=Size(number), rate_per_s=plan.rate_per_s)).kept
            for number in (count - 1, count)
            if number > 0
        ][-2:]
        in ([False, True], [True])
        for shape, count in sizes
    )
    if one.state == "pays":
        assert plan.winner.shape.attention is not None


def test_where_attention_devices_are_cheap_the_fleet_with_them_wins_and_the_runner_up_is_other_hardware() -> None:
    cheap: dict[str, Any] = {"devices": ("h100-sxm",), "attention_devices": ("h20",), "tensor_parallel": (2,)}
    plan = plan_fleet(FleetQuestion(**(ASKED | cheap | {"prices_usd": {"h20": 0.2}})), workers=1)
    assert said(plan).state == "pays"
    winner = plan.winner
    assert winner.shape.attention is not None
    assert "h20" in winner.shape.attention
    price = 2 * plan.winner.size.instances * FleetQuestion(**ASKED).price_usd("h100-sxm")  # type: ignore[operator]
    count = winner.devices - 2 * winner.size.instances
    assert winner.price_per_hour_usd == pytest.approx(price + 0.2 * count)
    assert plan.runner_up is not None
    assert plan.runner_up.shape.attention is None
    assert plan.headroom is not None
    assert plan.headroom.power is None


def test_a_layout_is_told_bought_and_paid_for_with_all_its_devices() -> None:
    question = FleetQuestion(**(ASKED | {"prices_usd": {"h20": 1.5, "h100-sxm": 4.0}}))
    shape = Shape(device="h100-sxm", tensor_parallel=2, setup="mixed", attention="4xh20/batches=3")
    assert shape.devices == 2 * 2 + 4
    assert question.instance_price_usd(shape) == pytest.approx(4 * 4.0 + 4 * 1.5)
    fleet = shape.fleet(Size(3))
    assert sum(pool.devices for pool in fleet.pools) == 3 * shape.devices
    text = shape.flags(Size(3)).removeprefix("--fleet ")
    assert [pool.attention for pool in parse_fleet(text).pools] == ["4xh20/batches=3"]
    assert "4xh20" in shape.render(Size(3))


def test_measured_operators_are_not_compared_with_data_sheet_rates() -> None:
    """On the measured tables of H100, which do not part attention from the rest of a step."""
    tables = {"timer": "auto", "model": "llama-2-70b", "weight_format": "fp8", "max_context": 4096}
    question = FleetQuestion(**(ASKED | tables))
    load = cut(question.workload, 0, 100)[1]
    plain = Ability(question, Shape(device="h100-sxm", tensor_parallel=4, setup="mixed"))
    found, why = layouts(question, load, plain.timer)
    assert not found
    assert "--timer analytic" in why
    alike = FleetQuestion(**(ASKED | tables | {"timer": "analytic"}))
    rates = Ability(alike, Shape(device="h100-sxm", tensor_parallel=4, setup="mixed"))
    assert layouts(alike, load, rates.timer)[0]


def test_power_is_not_searched_for_two_kinds_of_devices() -> None:
    quick = {"minimise": "power", "model": "llama-3.1-8b", "tensor_parallel": (1,)}
    plan = plan_fleet(FleetQuestion(**(ASKED | quick)), workers=1)
    assert said(plan).nature == "predicted"
    assert all(one.shape.attention is None for one in plan.passed)


def test_an_unknown_attention_device_is_refused_before_the_work() -> None:
    with pytest.raises(ConfigError):
        FleetQuestion(**(ASKED | {"attention_devices": ("h21",)}))


def test_a_drive_may_hold_attention_and_nothing_else() -> None:
    question = FleetQuestion(**(ASKED | {"devices": ("h100-sxm",), "attention_devices": ("instcsd",)}))
    assert question.attention_devices == ("instcsd",)
    plan = plan_fleet(question, simulate=False)
    assert said(plan).state in ("pays", "does not pay")
