"""Instances with many models: copies timed to the nanosecond, leaps exact, tiers, prefetch, faults; and off is off."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import ConfigError, DoesNotFit
from megalith.cost.timer import Prompt
from megalith.cost.timer_choice import choose_timer
from megalith.policy.experts import Residency
from megalith.sim.build import Builder
from megalith.sim.expert_weights import ExpertCounters, ExpertShape, ExpertWeights
from megalith.sim.run import Run, SimResult, simulate
from megalith.sim.scenario import Scenario
from megalith.specs.expert_mix import ExpertMix
from megalith.specs.experts import ExpertsSpec
from megalith.specs.fleet import FaultSpec, FleetSpec, PolicySpec, PoolSpec
from megalith.specs.fleet_text import parse_fleet
from megalith.specs.workload import open_workload
from megalith.specs.workload_text import parse_workload

WEIGHTS = 13_476_831_232
"""Bytes of Llama-2-7B in bf16."""
PINNED = [0, 0, 0, 1, 1, 0, 0, 4, 2, 8, 7, 0, 2, 1, 1, 5]


def scenario(
    load: str, experts: ExpertsSpec | None, count: int = 1, router: str = "least-outstanding", **more: Any
) -> Scenario:
    options = {"kv_blocks": 640, **more.pop("pool", {})}
    pool = PoolSpec(name="all", device="sn40l", count=count, tensor_parallel=8, experts=experts, **options)
    fleet = FleetSpec(pools=(pool,), router=PolicySpec(name=router), faults=more.pop("faults", FaultSpec()))
    workload = msgspec.structs.replace(parse_workload(load), max_new="true")
    return Scenario(model="llama-2-7b", fleet=fleet, workload=workload, sample_s=0, **more)


def run(load: str, experts: ExpertsSpec, **more: Any) -> SimResult:
    return simulate(scenario(load, experts, **more))


def models_of(load: str, seed: int = 0) -> list[int]:
    return [shape.model for shape in open_workload(parse_workload(load), seed)]


def closed(requests: int, experts: int, clients: int = 1, output: int = 3, zipf: float = 0.0) -> str:
    return f"closed:clients={clients},input=64,output={output},requests={requests},experts={experts},zipf={zipf}"


def step_ns(prompt: int) -> int:
    timer = choose_timer("auto", "llama-2-7b", "sn40l", 8, "bf16", "bf16")
    return timer.step_ps([Prompt(prompt, 0, True)], 0, 0, 0) // 1000


@pytest.mark.parametrize("router", [False, True])
def test_one_request_waits_for_one_copy(router: bool) -> None:
    load, rate = closed(1, 8, output=1), 1e12
    assert models_of(load, 1)[0] > 0, "else it is there from the start"
    found = run(load, ExpertsSpec(count=8, slots=1, host_bytes_per_s=rate, router=router), seed=1)
    expected = WEIGHTS / rate * 1e9 + step_ns(64) * (2 if router else 1)
    assert found.end_ns == pytest.approx(expected, abs=3)
    assert found.experts is not None
    assert (found.experts.switches, found.experts.copied_bytes) == (1, WEIGHTS)
    assert found.experts.wait_ps == found.experts.copy_ps == pytest.approx(WEIGHTS / rate * 1e12, abs=1)


@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.parametrize("zipf", [0.0, 1.0])
def test_hits_are_those_of_a_list(slots: int, zipf: float) -> None:
    load = closed(200, 8, zipf=zipf)
    found = run(load, ExpertsSpec(count=8, slots=slots, order="arrival"))
    tier = Residency(slots)
    for model in reversed(range(slots)):
        tier.put(model, 1)
    for model in models_of(load):
        if not tier.use(model):
            tier.put(model, 1)
    assert found.experts is not None
    assert (found.experts.requests, found.experts.switches) == (200, tier.misses)
    assert found.experts.hit_rate == pytest.approx(tier.hits / 200)


@given(
    st.integers(1, 6), st.integers(1, 12), st.sampled_from(["grouped", "arrival"]), st.booleans(), st.booleans(),
    st.sampled_from(["splitfuse", "prefill-first", "first-come", "splitwise"]), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=18, deadline=None)
def test_leaping_is_stepping(
    slots: int, clients: int, order: Any, prefetch: bool, router: bool, policy: str, seed: int
) -> None:
    experts = ExpertsSpec(count=6, slots=slots, order=order, prefetch=prefetch, router=router, host_bytes=5 * WEIGHTS)
    load = closed(40, 6, clients, output=9)
    both = [
        run(load, experts, leap=leap, seed=seed, pool={"policy": policy, "max_sequences": 4}) for leap in (True, False)
    ]
    assert both[0].digest == both[1].digest
    assert both[0].end_ns == both[1].end_ns
    assert [getattr(both[0].experts, name) for name in ExpertCounters.__slots__] == [
        getattr(both[1].experts, name) for name in ExpertCounters.__slots__
    ]
    assert both[0].requests == 40


def test_one_model_is_the_plain_instance() -> None:
    load = "poisson:rate=30,input=64-512,output=20-60,requests=300"
    plain = simulate(scenario(load, None))
    many = run(f"{load},experts=1", ExpertsSpec(count=1))
    assert many.digest == plain.digest
    assert many.experts is not None
    assert many.experts.switches == 0
    assert plain.experts is None
    assert not [note for note in plain.notes if "model" in note]


def test_with_all_on_the_device_there_is_no_switching() -> None:
    found = run(closed(100, 20), ExpertsSpec(count=20))
    assert found.experts is not None
    assert (found.experts.wait_ps, found.experts.hit_rate) == (0, 1.0)


def test_prefetch_hides_copies_that_are_shorter_than_a_turn() -> None:
    load = closed(120, 12, clients=4, output=40)
    off, on = (run(load, ExpertsSpec(count=12, slots=4, prefetch=ahead)).experts for ahead in (False, True))
    assert off is not None
    assert on is not None
    assert on.prefetched > 0
    assert on.wait_ps < 0.1 * off.wait_ps
    one = run(load, ExpertsSpec(count=12, slots=1, prefetch=True)).experts
    assert one is not None
    assert one.prefetched == 0, "no room beside the one that runs"


def test_a_prefetch_under_way_is_waited_for_and_its_loss_is_none() -> None:
    shape = ExpertShape(ExpertsSpec(count=4), 100, 100, 200, None, 1e9, 1e9, "test")
    weights = ExpertWeights(shape, ExpertCounters())
    assert weights.need(0, 0) == 0
    weights.prefetch(2, 50, (0,))
    assert weights.need(2, 60) == 50 + 100_000 - 60, "100 bytes at 1 GB/s are 100 ns"
    weights.prefetch(3, 200_000, (2,))
    weights.prefetch(1, 200_001, (2,))  # takes the place of 3, and the copier after it
    assert weights.need(3, 200_002) == 500_000 - 200_002, "copied again, third in line"
    assert weights.counters.switches == 4


def test_grouping_needs_fewer_switches() -> None:
    load = closed(400, 30, clients=24, output=8, zipf=0.8)
    grouped, arrival = (
        run(load, ExpertsSpec(count=30, slots=3, order=order)).experts for order in ("grouped", "arrival")
    )  # type: ignore[arg-type]
    assert grouped is not None
    assert arrival is not None
    assert grouped.switches < 0.8 * arrival.switches
    assert grouped.requests == arrival.requests == 400


def test_models_that_host_memory_does_not_hold_come_from_disk() -> None:
    load = closed(1, 8, output=1)
    spec = ExpertsSpec(count=8, slots=1, host_bytes=WEIGHTS + 10**8, host_bytes_per_s=1e12, disk_bytes_per_s=1e10)
    found = run(load, spec, seed=1)
    assert found.end_ns == pytest.approx(WEIGHTS * (1e-12 + 1e-10) * 1e9 + step_ns(64), abs=3)
    assert found.experts is not None
    assert found.experts.disk_bytes == WEIGHTS
    assert "from disk" in found.experts.words()


@pytest.mark.parametrize("prefetch", [False, True])
def test_failures_and_scaling_lose_nobody(prefetch: bool) -> None:
    found = run(
        "poisson:rate=40,input=64,output=30,requests=400,experts=40,zipf=0.5",
        ExpertsSpec(count=40, slots=5, prefetch=prefetch), count=3, router="expert-affinity",
        faults=FaultSpec(mtbf_h=0.001, repair_s=1.0),
    )  # fmt: skip
    assert found.faults.failures > 0
    assert found.requests == 400
    assert found.figures.rejected == found.figures.failed == 0


def test_requests_of_two_models_are_never_on_the_device_together() -> None:
    whole = Run(scenario(closed(60, 5, clients=12, output=6), ExpertsSpec(count=5, slots=2), leap=False))
    while whole.advance(1):
        for instance in whole.cluster.instances.values():
            running = {one.request.model for one in instance.scheduler.running()}
            assert len(running) <= 1
    assert whole.result().requests == 60


def test_affinity_finds_models_where_they_were() -> None:
    load = "poisson:rate=60,input=64,output=4,requests=600,experts=40"
    rates = {}
    for router in ("expert-affinity", "least-outstanding"):
        counters = run(load, ExpertsSpec(count=40, slots=12), count=4, router=router).experts
        assert counters is not None
        rates[router] = counters.hit_rate
    assert rates["expert-affinity"] > 0.9, "ten models an instance on average, room for twelve"
    assert rates["least-outstanding"] < 0.5


def test_memory_is_divided_exactly() -> None:
    spec = ExpertsSpec(count=500, router=True)
    given = Builder(scenario(closed(1, 500), spec)).kinds["all"]
    share = Builder(scenario(closed(1, 500), spec, pool={"kv_blocks": None})).kinds["all"]
    few = Builder(scenario(closed(1, 500), ExpertsSpec(count=500, slots=3), pool={"kv_blocks": None})).kinds["all"]
    block = 16 * 2 * 32 * 4096 * 2
    totals = []
    for kind in (given, share, few):
        assert kind.experts is not None
        router = kind.experts.held_bytes if kind.experts.options.router else 0
        totals.append(kind.kv_blocks * block + kind.experts.device_bytes + router)
    assert max(totals) <= 8 * 68_719_476_736 * 0.9
    assert max(totals) - min(totals) < block + 8 * 8 * 1024 * 1024, "all of it but less than a block"
    assert given.kv_blocks == 640
    assert few.experts is not None
    assert few.experts.slots == 3


@pytest.mark.parametrize(
    ("load", "experts", "more", "says"),
    [
        (closed(1, 9), {"count": 8}, {}, "asks for 9 models and pool 'all' has 8"),
        (closed(1, 9), None, {}, "asks for 9 models and pool 'all' has 1"),
        ("closed:clients=1,input=8,output=1,requests=1", {"count": 8}, {}, "does not say which"),
        (closed(1, 8), {"count": 8, "node": "dgx-a100"}, {}, "8 devices a100-80gb, the instance 8 of sn40l"),
        (closed(1, 8), {"count": 8, "node": "dgx"}, {}, "There is no node 'dgx'"),
        (closed(1, 8), {"count": 8}, {"pipeline_parallel": 2}, "pipeline"),
        (closed(1, 8), {"count": 8, "slots": 60}, {}, "8 models and 640 blocks"),
    ],
)
def test_what_cannot_be_run_is_refused_in_words(
    load: str, experts: dict[str, Any] | None, more: dict[str, Any], says: str
) -> None:
    spec = None if experts is None else ExpertsSpec(**experts)
    if says.startswith("8 models"):
        spec, load = ExpertsSpec(count=60, slots=60), closed(1, 60)
        with pytest.raises(DoesNotFit, match="60 models and 640 blocks"):
            simulate(scenario(load, spec))
        return
    with pytest.raises(ConfigError, match=says):
        simulate(scenario(load, spec, pool=more))


def test_a_fleet_names_the_options_of_its_experts() -> None:
    (pool,) = parse_fleet("1xsn40l:tp8:experts.count=150:experts.order=arrival:experts.prefetch=true").pools
    assert pool.experts == ExpertsSpec(count=150, order="arrival", prefetch=True)
    with pytest.raises(ConfigError, match="Did you mean `count`"):
        parse_fleet("1xsn40l:experts.cont=150")
    with pytest.raises(ConfigError, match="tp"):
        parse_fleet("1xsn40l:tp.x=1")
    with pytest.raises(ConfigError, match="slots of 0"):
        parse_fleet("1xsn40l:experts.count=2:experts.slots=0")


def test_a_workload_names_its_models_and_the_draws_are_the_same_everywhere() -> None:
    load = "poisson:rate=5,input=8,output=2,requests=3000,experts=10,zipf=1"
    assert parse_workload(load).experts == ExpertMix(count=10, zipf=1.0)
    models = models_of(load)
    assert models[:16] == PINNED
    assert models == models_of(load)
    assert models != models_of(load, 1)
    total = sum(1 / rank for rank in range(1, 11))
    for model in range(10):
        assert models.count(model) / 3000 == pytest.approx(1 / (model + 1) / total, abs=0.03)
    plain = [*open_workload(parse_workload(load.replace(",experts=10,zipf=1", "")), 0)]
    drawn = [*open_workload(parse_workload(load), 0)]
    assert [msgspec.structs.replace(one, model=0) for one in drawn] == plain, "nothing else is drawn otherwise"
    with pytest.raises(ConfigError, match="zipf"):
        parse_workload("poisson:rate=5,input=8,output=2,zipf=1")


def test_one_text_has_other_prefixes_in_another_model() -> None:
    load = "poisson:rate=50,input=600,output=20,requests=200,continue=0.5,turn=100,pause=0.1,idle=100,experts=3"
    spec = parse_workload(load)
    seen: dict[int, set[int]] = {}
    for shape in open_workload(spec, 0):
        for prefix in shape.prefix_ids:
            seen.setdefault(prefix, set()).add(shape.model)
    assert seen
    assert all(len(models) == 1 for models in seen.values())
