"""The reference against the simulator: a request that is alone has a slowdown of one."""

from __future__ import annotations

import numpy as np
import pytest

from megalith.sim.record import Recorder
from megalith.sim.reference import alone
from megalith.sim.run import Run
from megalith.specs.fleet import FleetSpec, PoolSpec
from megalith.specs.slo import SPLITWISE_SLO
from megalith.specs.workload_text import parse_workload
from tests.sim.test_run import scenario


@pytest.mark.parametrize("budget", [2048, 256])
def test_a_request_alone_is_as_fast_as_its_reference(budget: int) -> None:
    """Requests so far apart that none meets another."""
    pool = PoolSpec(name="all", device="llumnix", count=1, kv_blocks=4000, token_budget=budget)
    load = parse_workload(
        "poisson:rate=0.0005,input=lognormal:400:0.8,output=lognormal:60:0.8,max_input=2000,requests=40"
    )
    setting = scenario(FleetSpec(pools=(pool,)), workload=load, sample_s=0.0)
    plain = Run(setting)
    timer = plain.builder.kinds["all"].timer
    batches = []
    recorder = Recorder(SPLITWISE_SLO, alone(timer, budget), sink=batches.append)
    run = Run(setting, recorder=recorder)
    while run.advance():
        pass
    slo = run.result().figures.slo
    assert slo is not None
    assert slo.attainment == 1.0
    (columns,) = batches
    times = alone(timer, budget)(columns["prompt_tokens"], columns["generated"])
    assert (columns["first_ns"] - columns["arrival_ns"] == times.ttft_ns).all()
    assert (columns["finish_ns"] - columns["arrival_ns"] == times.e2e_ns).all()
    assert all(verdict.observed * float(verdict.bound.split("=")[1].split("x")[0]) == pytest.approx(1, abs=1e-4)
               for verdict in slo.verdicts if verdict.observed)  # fmt: skip


def test_one_token_has_the_pace_of_a_second() -> None:
    timer = Run(scenario(FleetSpec(pools=(PoolSpec(name="all", device="llumnix", count=1, kv_blocks=400),)))).builder
    reference = alone(timer.kinds["all"].timer)
    one = reference(np.array([100, 100]), np.array([1, 2]))
    assert one.e2e_ns[0] == one.ttft_ns[0] == one.ttft_ns[1]
    assert one.tpot_ns[0] == pytest.approx(one.tpot_ns[1], abs=1)
