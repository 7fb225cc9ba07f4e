"""Power domains: energy of phases, telemetry, clocks that come late, brakes that do not."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.base.units import NS_PER_S
from megalith.cost.timer_linear import DecodeTerms, LinearTimer, PromptTerms
from megalith.cost.timer_phases import PhasePower
from megalith.policy.cluster import Event, SetClock, SetRole
from megalith.sim.kernel import STEP_END, Kernel
from megalith.sim.power import PowerDomain
from megalith.sim.tempo import Tempos
from megalith.specs.fleet import PowerSpec

TIMER = LinearTimer(
    PromptTerms(1000, 10), DecodeTerms(1000, 10, 1), power=PhasePower(idle_w=50.0, prompt_w=400.0, decode_w=250.0)
)


@dataclass
class Machine:
    """Busy as told: (start, end, prompts) of its phases in ns."""

    id: int
    pool: str
    phases: list[tuple[int, int, bool]] = field(default_factory=list)
    interrupts: int = 0

    def __post_init__(self) -> None:
        self.facts: Any = SimpleNamespace(pool=self.pool, clock=1.0)
        self.timer: Any = TIMER

    def busy_ps(self, now_ns: int) -> tuple[int, int]:
        spent = [0, 0]
        for start, end, prompts in self.phases:
            spent[not prompts] += max(0, min(end, now_ns) - start) * 1000
        return spent[0], spent[1]

    def interrupt(self, now_ns: int) -> None:
        self.interrupts += 1


class Row:
    """A cluster as far as power goes."""

    def __init__(self, machines: list[Machine], until_s: float = 100.0, devices: int = 1, **spec: Any) -> None:
        self.kernel = Kernel()
        self.until_ns = round(until_s * NS_PER_S)
        self.events: list[Event] = []
        self.power_w: dict[str, float] = {}
        self.tempos = Tempos(self.kernel)
        self.domain = PowerDomain(self, self.tempos, PowerSpec(**{"budget_w": 1000.0, **spec}))
        for machine in machines:
            self.tempos.add(machine, TIMER)
            self.domain.add(machine, devices)
        self.domain.start()

    def going_on(self) -> bool:
        return self.kernel.now_ns < self.until_ns

    def sampled(self, domain: str, power_w: float) -> None:
        self.power_w[domain] = power_w

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def samples(self) -> list[float]:
        return [event.data["power_w"] for event in self.events if event.kind == "telemetry"]

    def order(self, command: SetClock, at_s: float) -> None:
        self.kernel.at(round(at_s * NS_PER_S), lambda _: self.domain.carry_out(command))


def s(seconds: float) -> int:
    return round(seconds * NS_PER_S)


def test_telemetry_is_the_mean_over_its_window() -> None:
    row = Row([Machine(0, "a", [(s(1), s(2), True), (s(2.5), s(3.5), False)])], until_s=6.0)
    row.kernel.run()
    assert row.samples() == [(50 + 400) / 2, (50 * 1 + 250 * 1) / 2, 50.0]
    assert [event.at_ns for event in row.events] == [s(2), s(4), s(6)]
    assert row.events[0].data == {"domain": "row", "power_w": 225.0, "budget_w": 1000.0}
    assert row.power_w == {"row": 50.0}
    assert row.domain.energy_j() == 50 * 4 + 400 + 250


def test_devices_and_the_rest_of_the_server_count() -> None:
    row = Row([Machine(0, "a", [(0, s(2), True)]), Machine(1, "b")], until_s=2.0, devices=8, other_w=300.0)
    row.kernel.run()
    assert row.samples() == [8 * 400 + 300 + 8 * 50 + 300]
    assert row.domain.energy_j("a") == 2 * (8 * 400 + 300)
    assert row.domain.instance_energy_j(1) == 2 * (8 * 50 + 300)


def test_a_clock_takes_effect_after_the_actuation_time() -> None:
    machine = Machine(0, "a", [(0, s(100), True)])
    row = Row([machine], until_s=10.0, actuation_s=5.0)
    row.order(SetClock("row", 0.5), 1.0)
    seen: list[float] = []
    for at_s in (5.9, 6.1):
        row.kernel.at(s(at_s), lambda _: seen.append(machine.facts.clock))
    row.kernel.run()
    assert seen == [1.0, 0.5]
    lower_w = TIMER.at_clock(0.5).power_w().prompt_w
    assert 50 < lower_w < 400
    assert row.samples() == pytest.approx([400, 400, 400, lower_w, lower_w], abs=1e-3)
    assert machine.timer.step_ps([], 1, 0, 0) > TIMER.step_ps([], 1, 0, 0)
    assert machine.interrupts == 1
    assert [event.at_ns for event in row.events if event.kind == "command"] == [s(6)]
    assert row.domain.counters.clock_changes == 1


def test_pools_have_clocks_of_their_own_and_the_lowest_counts() -> None:
    low, high = Machine(0, "low"), Machine(1, "high")
    row = Row([low, high], actuation_s=1.0)
    row.order(SetClock("low", 0.8), 0.0)
    row.order(SetClock("row", 0.9), 1.0)
    row.kernel.run()
    assert (low.facts.clock, high.facts.clock) == (0.8, 0.9)


def test_a_brake_acts_at_once_and_ends_by_itself() -> None:
    machine = Machine(0, "a", [(0, s(100), True)])
    row = Row([machine], until_s=20.0, actuation_s=1.0, brake_s=5.0)
    row.order(SetClock("row", 0.9), 0.0)
    row.order(SetClock("row", 0.2, brake=True), 2.0)
    row.order(SetClock("row", 0.2, brake=True), 4.0)
    seen: list[float] = []
    for at_s in (1.5, 2.5, 7.5, 9.5):
        row.kernel.at(s(at_s), lambda _: seen.append(machine.facts.clock))
    row.kernel.run()
    assert seen == [0.9, 0.2, 0.2, 0.9], "the second brake prolongs the first, then the clock is what was set last"
    assert row.domain.counters.brakes == 2


def test_a_clock_that_comes_into_effect_does_not_end_a_brake() -> None:
    machine = Machine(0, "a")
    row = Row([machine], actuation_s=1.0, brake_s=5.0)
    row.order(SetClock("a", 0.9), 0.0)
    row.order(SetClock("row", 0.2, brake=True), 0.5)
    seen: list[float] = []
    for at_s in (2.0, 6.0):
        row.kernel.at(s(at_s), lambda _: seen.append(machine.facts.clock))
    row.kernel.run()
    assert seen == [0.2, 0.9]


def test_samples_above_the_budget_are_counted() -> None:
    row = Row([Machine(0, "a", [(0, s(4), True)])], until_s=8.0, budget_w=300.0)
    row.kernel.run()
    assert (row.domain.counters.samples, row.domain.counters.violations) == (4, 2)
    assert row.domain.counters.peak_w == 400.0


def test_what_cannot_be_done_is_refused() -> None:
    row = Row([Machine(0, "a")])
    assert row.domain.carry_out(SetClock("b", 0.5)) == "'b' is neither the power domain nor a pool: a, row"
    assert row.domain.carry_out(SetClock("a", 0.0)) == "0 is not a fraction of the clock"
    with pytest.raises(TypeError, match="sets no clock"):
        row.domain.carry_out(SetRole(0, "prefill"))
    with pytest.raises(ConfigError, match="cannot be"):
        PowerDomain(row, row.tempos, PowerSpec(budget_w=0.0))


def test_who_comes_later_has_the_clock_of_its_pool_and_who_goes_keeps_its_energy() -> None:
    first, later = Machine(0, "a"), Machine(1, "a")
    row = Row([first], until_s=10.0, actuation_s=1.0)
    row.order(SetClock("a", 0.5), 0.0)

    def come(_: None) -> None:
        row.tempos.add(later, TIMER)
        row.domain.add(later, 1)

    row.kernel.at(s(4), come)
    row.kernel.at(s(6), lambda _: row.domain.remove(0))
    row.kernel.run()
    assert later.facts.clock == 0.5
    assert row.domain.energy_j() == row.domain.energy_j("a") == 50 * 6 + 50 * 6
    assert row.samples() == [50, 50, 100, 50, 50]


def test_a_dead_instance_draws_nothing_and_starts_anew() -> None:
    machine = Machine(0, "a", [(0, s(3), True)])
    row = Row([machine], until_s=8.0)

    def die(_: None) -> None:
        row.domain.switch_off(0)
        machine.phases.clear()  # what was under way is not counted by the instance

    row.kernel.at(s(2), die)
    row.kernel.at(s(6), lambda _: row.domain.switch_on(0))
    row.kernel.run()
    assert row.samples() == [400, 0, 0, 50]


@given(
    st.lists(st.tuples(st.integers(0, 10**10), st.booleans()), max_size=20),
    st.lists(st.tuples(st.floats(0, 10), st.floats(0.1, 1.0), st.booleans()), max_size=5),
)
@settings(max_examples=60, deadline=None)
def test_the_windows_add_up_to_the_energy(
    cuts: list[tuple[int, bool]], orders: list[tuple[float, float, bool]]
) -> None:
    times = sorted({at_ns for at_ns, _ in cuts})
    phases = [(start, end, index % 2 == 0) for index, (start, end) in enumerate(pairwise(times))]
    row = Row([Machine(0, "a", phases), Machine(1, "b")], until_s=10.0, telemetry_s=0.5, actuation_s=0.7, brake_s=0.3)
    for at_s, fraction, brake in orders:
        row.order(SetClock("a", fraction, brake), at_s)
    energy_j: list[float] = []
    row.kernel.at(s(10), lambda _: energy_j.append(row.domain.energy_j()), None, STEP_END)
    row.kernel.run()
    assert len(row.samples()) == 20
    assert sum(row.samples()) * 0.5 == pytest.approx(energy_j[0], rel=1e-12)
    assert energy_j[0] >= 10 * 2 * 50


def test_one_timer_serves_all_instances_at_a_speed() -> None:
    machines = [Machine(number, "a") for number in range(3)]
    row = Row(machines)
    for number in (0, 1):
        row.tempos.slow(number, 2.0, "straggler")
    assert machines[0].timer is machines[1].timer
    assert machines[0].timer.step_ps([], 1, 0, 0) == 2 * TIMER.step_ps([], 1, 0, 0)
    row.tempos.slow(0, 1.5)
    assert machines[0].timer.step_ps([], 1, 0, 0) == 3 * TIMER.step_ps([], 1, 0, 0), "causes multiply"
    row.tempos.slow(0, 1.0)
    row.tempos.slow(0, 1.0, "straggler")
    assert machines[0].timer is machines[2].timer is TIMER
    assert row.tempos.clock_of(0) == 1.0
    row.tempos.remove(0)
    row.tempos.slow(0, 2.0)
    assert machines[0].timer is TIMER
