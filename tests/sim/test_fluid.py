"""Rows at the fidelity fluid: against exact runs of the same requests, conservation, clocks, policies' own objects."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.cost.timer_splitwise import splitwise
from megalith.policy.capping import NoCap, Polca, PolcaOptions, ScopeOptions
from megalith.policy.cluster import Command, Event, Scale, SetClock, View
from megalith.sim.fluid import FluidServers, Machine
from megalith.sim.fluid_exact import exact_window
from megalith.sim.fluid_load import RowArrivals, in_steps
from megalith.sim.fluid_power import RowPower
from megalith.sim.fluid_row import POOLS, RowResult, RowSpec, simulate_rows, without_control
from megalith.sim.training_row import TrainingProfile, train_row
from megalith.specs import catalog
from megalith.specs.fleet import PolicySpec, PoolSpec, PowerSpec
from megalith.specs.row_load import CODE, CONVERSATION, NO_BURSTS, POLCA_KINDS, RowLoad, Week, rates

S = 10**9
TIMER = splitwise("bloom-176b/a100-80gb/tp8").timer("context_aware")
MACHINE = Machine(TIMER, 8, 3105.0, POLCA_KINDS)
IDLE_W, PROMPT_W, DECODE_W = 3105 + 8 * 63.0, 3105 + 8 * 400.0, 3105 + 8 * 250.0
SCOPES: dict[str, Any] = {"low": ["low"], "high": ["high"]}
AFTERNOON = RowLoad(rate_per_server=0.026, start_s=86_400 + 14 * 3600)


class Ended:
    def __init__(self) -> None:
        self.e2e_s: list[float] = []

    def add(self, server: Any, kind: Any, e2e_s: Any) -> None:
        self.e2e_s += e2e_s.tolist()


def row(servers: int = 12, policy: str | None = None, seed: int = 3, budget_w: float = 1e9, **power: Any) -> RowSpec:
    spec = PowerSpec(budget_w=budget_w, other_w=3105.0, **power)
    return RowSpec(
        servers=servers, power=spec, policy=PolicySpec(name=policy, options=SCOPES) if policy else None, seed=seed
    )


def feed(servers: FluidServers, steps: int, arrivals: dict[int, list[tuple[float, int, int]]]) -> None:
    """Steps of 2 s with (time, server, kind) by step, each on a server of its own or in turn."""
    for step in range(steps):
        due = arrivals.get(step, [])
        at_s, server, kind = (np.array([one[i] for one in due], dtype=d) for i, d in enumerate((float, int, int)))
        servers.step(2.0 * step, at_s, server, kind, list(range(len(due) + 1)))


@pytest.mark.parametrize("kind", range(4))
def test_a_request_alone_takes_what_its_steps_take(kind: int) -> None:
    one = POLCA_KINDS[kind]
    steps_s = [TIMER.step_ps((), 1, one.input_tokens + n, 0) / 1e12 for n in range(1, one.output_tokens)]
    prompt_s = MACHINE.at_clock(1.0)[0][kind]
    assert MACHINE.alone_s(one) == pytest.approx(prompt_s + sum(steps_s), rel=2e-3)
    ended = Ended()
    servers = FluidServers(MACHINE, 1, 2.0, ended)
    feed(servers, 40, {1: [(3.3, 0, kind)]})
    assert ended.e2e_s == [pytest.approx(MACHINE.alone_s(one), rel=2e-3)]
    assert servers.active.tolist() == [0]
    busy_s = 80.0 - servers.idle_s[0]
    assert busy_s == pytest.approx(ended.e2e_s[0], abs=1e-6)
    assert servers.prompt_s[0] == pytest.approx(prompt_s)


def test_many_at_once_wait_for_each_others_prompts_and_all_of_them_end() -> None:
    ended = Ended()
    servers = FluidServers(MACHINE, 2, 2.0, ended)
    feed(servers, 900, {0: [(0.001 * n, 0, 0) for n in range(100)]})
    assert len(ended.e2e_s) == 100
    assert servers.active.tolist() == [0, 0]
    assert servers.prompt_s[0] == pytest.approx(100 * MACHINE.at_clock(1.0)[0][0])
    assert min(ended.e2e_s) > 100 * MACHINE.at_clock(1.0)[0][0], "prompts go first, so nobody decodes before the last"
    assert servers.idle_s[1] == 1800.0


def test_a_lower_clock_draws_less_and_takes_longer_by_the_timers_own_model() -> None:
    prompts, slower, watts = MACHINE.at_clock(0.8)
    full, _, full_watts = MACHINE.at_clock(1.0)
    assert full_watts == (IDLE_W, PROMPT_W, DECODE_W)
    assert prompts / full == pytest.approx(1 / 0.8)
    assert slower == pytest.approx(1 + 0.15 * 0.25)
    assert watts[2] == pytest.approx(3105 + 8 * (63 + 187 * 0.8**2.2))
    assert Machine(TIMER, 8, 0.0, POLCA_KINDS, 3.0).at_clock(0.5)[2][1] == pytest.approx(8 * (63 + 337 / 8))
    ended = Ended()
    servers = FluidServers(MACHINE, 1, 2.0, ended)
    servers.step(0.0, np.array([1.9]), np.array([0]), np.array([0]), [0, 1])
    servers.set_clock(0, 1, 0.5, 2.0)
    servers.step(2.0, np.empty(0), np.empty(0, dtype=int), np.empty(0, dtype=int), [0])
    left_s = 1.9 + full[0] - 2.0
    assert servers.prompt_s[0] == pytest.approx(0.1 + 2 * left_s), "what is left of a prompt takes twice as long"


@pytest.mark.parametrize(("policy", "budget_w", "servers"), [(None, 1e9, 12), ("polca", 9 * 6500.0, 12)])
def test_fluid_agrees_with_exact(policy: str | None, budget_w: float, servers: int) -> None:
    """The gates are 3 % on power and 5 % on p99 over an hour; this is ten minutes, so each sample must agree."""
    spec = msgspec.structs.replace(catalog.model("bloom-176b"), max_context=4096)
    server = PoolSpec(
        name="server", device="a100-80gb", count=1, tensor_parallel=8, policy="prefill-first", kv_blocks=5_000,
        prefix_cache=False, watermark=0.0,
    )  # fmt: skip
    here = row(servers, policy, budget_w=budget_w)
    load = msgspec.structs.replace(AFTERNOON, rate_per_server=0.05)
    (fluid,) = simulate_rows([here], load, MACHINE, 600.0)
    exact = exact_window(here, load, server, spec, "splitwise:context_aware", 600.0)
    assert len(exact.power_w) == len(fluid.power_w) == 300
    np.testing.assert_allclose(fluid.power_w, exact.power_w, rtol=0.02)
    assert fluid.power_w.mean() == pytest.approx(exact.power_w.mean(), rel=1e-3)
    assert abs(fluid.requests - len(exact.kind)) <= 1
    assert fluid.counters.brakes == exact.brakes
    alone_s = np.array([MACHINE.alone_s(kind) for kind in POLCA_KINDS])
    priority = np.array([kind.priority for kind in POLCA_KINDS])[exact.kind]
    stretch = exact.e2e_s / alone_s[exact.kind]
    for number, pool in enumerate(POOLS):
        for share in (0.5, 0.99):
            found = float(np.quantile(stretch[priority == number], share))
            assert fluid.stretch[pool].quantile(share) == pytest.approx(found, rel=0.02)
    if policy:
        assert fluid.capped["low"] > 0.5, "or it compares nothing"


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32), servers=st.integers(2, 6), rate=st.floats(0.005, 0.5),
    policy=st.sampled_from([None, "no-cap", "polca"]), budget_w=st.floats(5_000.0, 40_000.0),
)  # fmt: skip
def test_nothing_is_lost_and_power_has_bounds(
    seed: int, servers: int, rate: float, policy: str | None, budget_w: float
) -> None:
    load = msgspec.structs.replace(AFTERNOON, rate_per_server=rate)
    here = row(servers, policy, seed, budget_w)
    (result,) = simulate_rows([here], load, MACHINE, 400.0)
    arrivals = RowArrivals(POLCA_KINDS, here.low, servers - here.low, 0, seed)
    at_s, server, kind = arrivals.take(rates(load, seed, 200, 2.0), 0, 2.0)
    earliest = sum(at + MACHINE.alone_s(POLCA_KINDS[one]) * 0.99 < 400.0 for at, one in zip(at_s, kind, strict=True))
    assert result.requests <= earliest
    assert result.power_w.max() <= servers * PROMPT_W * (1 + 1e-6)
    assert result.power_w.min() >= servers * IDLE_W * (1 - 1e-6)
    assert 0 <= result.prompt_share + result.idle_share <= 1 + 1e-9
    assert set(server.tolist()) <= set(range(servers))


def test_a_row_does_not_feel_the_rows_beside_it() -> None:
    rows = [row(8, "polca", 1, 6 * 6500.0), row(5, None, 2), row(9, "no-cap", 1, 6 * 6500.0)]
    together = simulate_rows(rows, AFTERNOON, MACHINE, 300.0)
    for one, found in zip(rows, together, strict=True):
        (alone,) = simulate_rows([one], AFTERNOON, MACHINE, 300.0)
        assert (alone.power_w == found.power_w).all()
        assert alone.counters == found.counters
        assert all((alone.stretch[pool].counts == found.stretch[pool].counts).all() for pool in POOLS)


def ran(*rows: RowSpec, rate: float = 0.05, seconds: float = 1200.0) -> list[RowResult]:
    return simulate_rows(rows, msgspec.structs.replace(AFTERNOON, rate_per_server=rate), MACHINE, seconds)


def test_capping_lowers_the_peak_and_only_the_low_priority_pays_first() -> None:
    capped = row(20, "polca", 1, 18 * 6500.0)
    polca, free = ran(capped, without_control(capped))
    assert polca.power_w.max() < free.power_w.max()
    assert polca.capped["low"] > 0.9
    assert polca.capped["high"] == 0.0
    assert polca.stretch["low"].quantile(0.5) > 1.005 * free.stretch["low"].quantile(0.5)
    assert polca.stretch["high"].quantile(0.5) == free.stretch["high"].quantile(0.5)


def test_without_capping_a_tight_budget_brakes_and_that_hurts_everybody() -> None:
    tight = row(20, "no-cap", 1, 15.2 * 6500.0)
    braked, free = ran(tight, without_control(tight))
    assert braked.counters.brakes > 0
    assert free.counters.brakes == 0
    assert free.counters.violations > 0
    assert braked.stretch["high"].quantile(0.99) > 1.05 * free.stretch["high"].quantile(0.99)


class Asking:
    name, period_ns = "asking", None

    def __init__(self, *commands: Command, listens: frozenset[str] = frozenset({"telemetry", "command"})) -> None:
        self.commands, self.listens, self.heard = list(commands), listens, []

    def act(self, event: Event, view: View) -> list[Command]:
        if event.kind == "command":
            self.heard.append((event.at_ns, event.data["outcome"]))
            return []
        now, self.commands = self.commands, []
        return now


def test_clocks_wait_for_the_actuator_and_brakes_do_not() -> None:
    asking = Asking(SetClock("low", 0.9), SetClock("row", 0.2, brake=True), SetClock("pod", 0.5), Scale("low", 1))
    power = RowPower(PowerSpec(budget_w=100.0, actuation_s=6.0, brake_s=4.0), POOLS, asking)
    seen = []
    for step in range(1, 6):
        power.sample(2 * step * S, 50.0)
        seen.append(tuple(power.clocks.values()))
    assert seen == [(0.2, 0.2), (0.2, 0.2), (1.0, 1.0), (0.9, 1.0), (0.9, 1.0)]
    assert asking.heard == [(2 * S, "done"), (2 * S, "refused"), (2 * S, "refused"), (8 * S, "done")]
    assert (power.counters.brakes, power.counters.clock_changes, power.counters.samples) == (1, 1, 5)
    assert power.slowed == {"low": 3, "high": 2}


def test_without_delay_a_clock_holds_from_the_next_interval_on() -> None:
    power = RowPower(PowerSpec(budget_w=100.0, actuation_s=0.0), POOLS, Polca(PolcaOptions(low=("low",))))
    assert power.sample(2 * S, 85.0)
    assert power.clocks == {"low": 1275 / 1410, "high": 1.0}


def test_controllers_that_need_requests_are_refused() -> None:
    with pytest.raises(ConfigError, match="telemetry and commands only"):
        RowPower(PowerSpec(budget_w=1.0), POOLS, Asking(listens=frozenset({"tick"})))
    with pytest.raises(ConfigError, match="same telemetry"):
        simulate_rows([row(), row(telemetry_s=1.0)], AFTERNOON, MACHINE, 60.0)
    with pytest.raises(ConfigError, match="at least 2 servers"):
        row(1)
    assert NoCap(ScopeOptions()).listens == {"telemetry", "command"}


def test_arrivals_are_poisson_and_spread_over_their_pool() -> None:
    kinds = tuple(msgspec.structs.replace(kind, bursts=NO_BURSTS) for kind in POLCA_KINDS)
    load = RowLoad(rate_per_server=1.0, kinds=kinds, week=Week(valley=1.0, weekend=1.0))
    arrivals = RowArrivals(kinds, 4, 6, 10, 7)
    at_s, server, kind = arrivals.take(rates(load, 7, 1000, 2.0), 0, 2.0)
    assert len(at_s) == pytest.approx(20_000, abs=4 * 20_000**0.5)
    gaps = np.diff(np.sort(at_s))
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.03)
    priority = np.array([one.priority for one in kinds])[kind]
    assert set(server[priority == 0].tolist()) == set(range(10, 14))
    assert set(server[priority == 1].tolist()) == set(range(14, 20))
    counts = np.bincount(server[priority == 1], minlength=20)[14:]
    assert np.abs(counts - counts.mean()).max() < 5 * counts.mean() ** 0.5
    later = arrivals.take(rates(load, 7, 1000, 2.0), 1000, 2.0)[0]
    assert later.min() >= 2000.0
    assert later.max() < 4000.0


def test_within_a_rank_no_server_comes_twice_and_all_come() -> None:
    random = np.random.default_rng(0)
    at_s = np.sort(random.uniform(0, 20, 500))
    server, kind = random.integers(0, 7, 500), random.integers(0, 4, 500)
    found = in_steps([(at_s, server, kind)], 0, 10, 2.0)
    assert sorted(found.at_s.tolist()) == at_s.tolist()
    for step, bounds in enumerate(found.bounds):
        seen: dict[int, float] = {}
        for first, last in pairwise(bounds):
            assert len(set(found.server[first:last].tolist())) == last - first
            for index in range(first, last):
                assert 2.0 * step <= found.at_s[index] <= 2.0 * step + 2.0
                assert found.at_s[index] > seen.get(int(found.server[index]), -1.0)
                seen[int(found.server[index])] = float(found.at_s[index])


@pytest.mark.parametrize("bursts", [CONVERSATION, CODE])
def test_a_rate_wanders_about_its_mean_as_said(bursts: Any) -> None:
    kind = msgspec.structs.replace(POLCA_KINDS[1], bursts=bursts, share=0.5)
    other = msgspec.structs.replace(POLCA_KINDS[0], bursts=NO_BURSTS, share=0.5)
    load = RowLoad(rate_per_server=1.0, kinds=(kind, other), week=Week(valley=1.0, weekend=1.0))
    found = rates(load, 1, 200_000, 2.0)
    assert found[0].mean() == pytest.approx(0.5, rel=0.05)
    square = (1 + bursts.slow_cv**2) * (1 + bursts.fast_cv**2) - 1
    assert found[0].std() / found[0].mean() == pytest.approx(square**0.5, rel=0.15)
    assert (found[1] == 0.5).all()


def test_the_week_has_days_and_a_weekend() -> None:
    week = Week(valley=0.3, weekend=0.75, peak_hour=15.0)
    hours = np.arange(0, 7 * 24) * 3600.0
    shares = week.shares(hours)
    assert shares.max() == shares[15] == pytest.approx(1.0)
    assert shares[3] == pytest.approx(0.3)
    assert shares[5 * 24 + 15] == pytest.approx(0.75)
    assert 1 / shares.mean() == pytest.approx(1.66, abs=0.01)


def test_training_rows_peak_together_so_a_brake_is_near_and_capping_costs_steps() -> None:
    power = PowerSpec(budget_w=40 * 6500.0)
    fits, over = (train_row(count, power, PolicySpec(name="no-cap"), 1800.0) for count in (41, 42))
    assert (fits.brakes, fits.slowdown) == (0, pytest.approx(0.0, abs=1e-6))
    assert over.brakes > 0
    assert over.slowdown > 0.2
    swing = np.abs(np.diff(train_row(40, power, None, 600.0).power_w)).max() / power.budget_w
    assert swing == pytest.approx(0.375, abs=1e-3)
    assert train_row(40, power, PolicySpec(name="polca"), 1800.0).slowdown > 0.05
    with pytest.raises(ConfigError, match="trains nothing"):
        TrainingProfile(swing=0.99)
