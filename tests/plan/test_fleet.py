"""`plan fleet`: the search finds what trying everything finds, a laxer promise never costs more, and it says why."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import msgspec
import pytest

from megalith.base.errors import CapacityError, ConfigError
from megalith.cli.scenario_flags import How, What, make_scenario
from megalith.plan.fleet import Search, plan_fleet
from megalith.plan.fleet_bounds import Ability, discard, least_instances
from megalith.plan.fleet_load import Load, cut
from megalith.plan.fleet_question import SETUP_NAMES, FleetQuestion, Shape, Size, shapes
from megalith.plan.fleet_trial import Probe, Trial, probe
from megalith.specs.slo import parse_slo
from megalith.specs.workload_text import parse_workload
from tests.cli.command import megalith

LOAD = "poisson:rate={},input=lognormal:700:0.9,output=lognormal:120:0.8,max_input=4000,max_output=500,requests={}"

LONG_ANSWERS: dict[str, Any] = {
    "model": "llama-2-70b",
    "tensor_parallel": (2,),
    "workload": parse_workload(
        "poisson:rate=2,input=lognormal:300:0.5,output=lognormal:600:0.5,max_input=2000,max_output=1500,requests=200"
    ),
}


def question(slo: str, rate: float = 30, requests: int = 200, **more: Any) -> FleetQuestion:
    given: dict[str, Any] = {
        "model": "llama-3.1-8b", "workload": parse_workload(LOAD.format(rate, requests)), "slo": parse_slo(slo),
        "devices": ("a100-80gb",), "tensor_parallel": (1, 2), "setups": ("mixed",), "most_devices": 10,
    }  # fmt: skip
    return FleetQuestion(**(given | more))


def everything(asked: FleetQuestion) -> list[tuple[float, Shape, Trial]]:
    """Every fleet up to the largest, run to its end; those that keep the service level, cheapest first."""
    part, load, _ = cut(asked.workload, asked.seed, asked.most_requests)
    asked = msgspec.structs.replace(asked, workload=part)
    found = []
    for shape in shapes(asked):
        for instances in range(shape.smallest, shape.most(asked.most_devices) + 1):
            splits = range(1, instances) if shape.split else [0]
            for prefill in splits:
                size = Size(instances, prefill)
                trial = probe(Probe(question=asked, shape=shape, size=size, rate_per_s=load.rate_per_s, early=False))
                if trial.kept:
                    price = asked.price_usd(shape.device) or 0.0
                    found.append((instances * shape.tensor_parallel * price, shape, trial))
    return sorted(found, key=lambda one: one[0])


@pytest.mark.parametrize(
    ("slo", "more"),
    [
        ("ttft=300ms,tpot=25ms", {}),
        ("ttft=300ms@p90,tpot=16ms@p90", {"devices": ("a100-80gb", "h100-sxm"), "most_devices": 6}),
        ("ttft=400ms,tpot=25ms", {"setups": ("distserve",), "tensor_parallel": (1,), "most_devices": 5}),
    ],
)
def test_the_search_finds_what_trying_everything_finds(slo: str, more: dict[str, Any]) -> None:
    asked = question(slo, requests=200, **more)
    best = everything(asked)
    plan = plan_fleet(asked, workers=1)
    assert plan.winner.objective == pytest.approx(best[0][0])
    assert plan.winner.trial is not None
    assert plan.winner.trial.kept
    assert (plan.winner.shape, plan.winner.size) in {(shape, t.size) for cost, shape, t in best if cost == best[0][0]}
    bought = {(shape.device, shape.tensor_parallel, t.instances): cost for cost, shape, t in reversed(best)}
    mine = (plan.winner.shape.device, plan.winner.shape.tensor_parallel, plan.winner.size.instances)
    smallest: dict[tuple[str, int], tuple[int, float]] = {}
    for (device, degree, instances), cost in bought.items():
        key = (device, degree)
        smallest[key] = min(smallest.get(key, (instances, cost)), (instances, cost))
    others = [cost for key, (_, cost) in smallest.items() if key != mine[:2]]
    if plan.runner_up is not None:
        assert plan.runner_up.objective == pytest.approx(min(others))
    else:
        assert not others


@pytest.mark.parametrize("setup", SETUP_NAMES)
def test_the_flags_of_a_choice_are_its_fleet(setup: str) -> None:
    (shape,) = shapes(question("ttft=1s", setups=(setup,), tensor_parallel=(2,)))
    size = Size(3, 1 if shape.split else 0)
    words = shape.flags(size).split()
    given = dict(zip(words[::2], words[1::2], strict=True))
    policies = tuple(text for name, text in given.items() if name == "--policy")
    what = What(fleet=given["--fleet"], policy=policies, router=given.get("--router"), trace="azure-conv", model="m")
    made = make_scenario(what, How()).fleet
    assert made == shape.fleet(size)


def test_early_stops_change_no_verdict() -> None:
    asked = question("ttft=300ms,tpot=25ms")
    (shape, *_) = shapes(asked)
    for instances in (1, 2, 3, 5):
        task = Probe(question=asked, shape=shape, size=Size(instances), rate_per_s=30.0)
        hasty, whole = probe(task), probe(msgspec.structs.replace(task, early=False))
        assert hasty.kept == whole.kept
        assert not (hasty.kept and hasty.stopped_early)
        assert not whole.stopped_early


def test_a_laxer_promise_never_costs_more() -> None:
    costs = [
        plan_fleet(question(f"ttft={ttft}ms,tpot=30ms", 40), workers=1).winner.objective for ttft in (150, 250, 4000)
    ]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1]


def test_more_load_never_costs_less_and_headroom_is_true() -> None:
    slo = "ttft=400ms,tpot=30ms"
    plans = [plan_fleet(question(slo, rate), workers=1) for rate in (10, 30)]
    assert plans[0].winner.objective <= plans[1].winner.objective
    plan = plans[1]
    assert plan.headroom is not None
    assert plan.headroom.broken_times is not None
    asked = msgspec.structs.replace(question(slo, 30), workload=parse_workload(LOAD.format(30, 200)))
    for times, kept in ((plan.headroom.kept_times, True), (plan.headroom.broken_times, False)):
        task = Probe(question=asked, shape=plan.winner.shape, size=plan.winner.size, rate_per_s=plan.rate_per_s)
        assert probe(msgspec.structs.replace(task, times_rate=times)).kept is kept


def test_the_number_of_workers_does_not_matter() -> None:
    asked = question("ttft=400ms,tpot=30ms", requests=150, setups=("mixed", "llumnix"))
    assert plan_fleet(asked, workers=1) == plan_fleet(asked, workers=2)


@pytest.mark.parametrize(
    ("slo", "more", "bound", "resource"),
    [
        ("ttft=250ms,tpot=200ms", {}, "ttft=250ms", "prompt compute"),
        ("ttft=20s,tpot=14ms", {}, "tpot=14ms", "decode speed"),
        ("ttft=1s,tpot=200ms", LONG_ANSWERS, "ttft=1s", "KV memory"),
    ],
)
def test_it_names_what_binds(slo: str, more: dict[str, Any], bound: str, resource: str) -> None:
    plan = plan_fleet(question(slo, **more), workers=1)
    assert bound in plan.binding
    assert plan.resource.startswith(resource), plan.resource


def test_an_impossible_promise_is_one_paragraph_with_what_works() -> None:
    asked = question("ttft=5ms,tpot=3ms")
    with pytest.raises(CapacityError) as caught:
        plan_fleet(asked, workers=1)
    assert re.search(r"the best is ttft p90 [\d.]+ ms \(.*tp2, mixed\), tpot p90 [\d.]+ ms", caught.value.what)
    match = re.search(r"--slo (\S+) is kept by (\d+) x a100-80gb", caught.value.hint)
    assert match is not None
    nearer = plan_fleet(question(match[1]), workers=1)
    assert nearer.winner.size.instances <= int(match[2])


def test_too_few_devices_is_said_as_such() -> None:
    with pytest.raises(CapacityError, match="No fleet of up to 1 devices keeps"):
        plan_fleet(question("ttft=400ms,tpot=30ms", 60, most_devices=1), workers=1)


def test_a_model_that_fits_nowhere() -> None:
    with pytest.raises(CapacityError, match="llama-2-70b in bf16 needs"):
        plan_fleet(question("ttft=1s", model="llama-2-70b", tensor_parallel=(1,)), workers=1)


def test_bounds_are_below_what_works() -> None:
    """No fleet that arithmetic rules out keeps the service level in the simulator."""
    ruled_out = 0
    for slo, rate in itertools.product(("ttft=500ms,tpot=30ms", "ttft=2s@p90,tpot=60ms@p90"), (10.0, 100.0)):
        asked = question(slo, rate, setups=SETUP_NAMES, tensor_parallel=(1,))
        part, load, _ = cut(asked.workload, 0, 10_000)
        asked = msgspec.structs.replace(asked, workload=part)
        for shape in shapes(asked):
            least = least_instances(Ability(asked, shape), load, asked.slo)
            for instances in range(shape.smallest, least.instances):
                size = shape.sizes(instances, 0.5, 1)[0]
                assert not probe(Probe(question=asked, shape=shape, size=size, rate_per_s=load.rate_per_s)).kept
                ruled_out += 1
    assert ruled_out >= 8, "the bounds say next to nothing"


def test_floors_are_below_what_an_empty_fleet_reaches() -> None:
    asked = question("ttft=1s@p90,tpot=1s@p90,e2e=100s@p90", rate=0.5, requests=60)
    _, load, _ = cut(asked.workload, 0, 60)
    (shape, *_) = shapes(asked)
    ability = Ability(asked, shape)
    trial = probe(Probe(question=asked, shape=shape, size=Size(4), rate_per_s=load.rate_per_s))
    for metric, figure in ((b.metric, trial.figures_ns[str(b)]) for b in asked.slo.bounds):
        assert figure is not None
        above, below = (
            discard(ability, load, parse_slo(f"{metric}={limit}ns@p90")) for limit in (figure, round(0.5 * figure))
        )
        assert above is None, f"{metric} of {figure} ns was reached"
        assert below is not None, "the floor is not far below what is reached"


def test_prefixes_that_are_cached_are_no_work() -> None:
    shared = parse_workload("mooncake-conversation:requests=200")
    _, load, _ = cut(shared, 0, 200)
    assert isinstance(load, Load)
    assert load.fresh.sum() < 0.9 * load.prompts.sum()
    assert (load.fresh >= 1).all()


def test_power_and_devices_are_objectives() -> None:
    both: dict[str, Any] = {"devices": ("a100-80gb", "h100-sxm"), "most_devices": 6, "requests": 120}
    power = plan_fleet(question("ttft=400ms,tpot=30ms", minimise="power", **both), workers=1)
    assert power.winner.objective == power.winner.power_w
    assert power.runner_up is not None
    assert power.winner.objective <= power.runner_up.objective
    devices = plan_fleet(question("ttft=400ms,tpot=30ms", minimise="devices", **both), workers=1)
    assert devices.winner.objective == devices.winner.devices
    cheap = plan_fleet(
        question("ttft=400ms,tpot=30ms", prices_usd={"a100-80gb": 0.01, "h100-sxm": 9.0}, **both), workers=1
    )
    assert cheap.winner.shape.device == "a100-80gb"


def test_prediction_is_quick_and_near() -> None:
    asked = question("ttft=400ms,tpot=30ms")
    predicted, simulated = plan_fleet(asked, simulate=False), plan_fleet(asked, workers=1)
    assert (predicted.nature, simulated.nature) == ("predicted", "simulated")
    assert predicted.runs == 0
    assert predicted.winner.devices == pytest.approx(simulated.winner.devices, abs=2)


@pytest.mark.parametrize(
    ("slo", "more", "words"),
    [
        ("tpot=30ms", {}, "lets everybody wait for ever"),
        ("ttft=1s", {"setups": ("llumix",)}, "Did you mean 'llumnix'"),
        ("ttft=1s", {"devices": ()}, "no device"),
        ("ttft=1s", {"devices": ("h200",)}, "--price h200=USD"),
        ("ttft=1s", {"prices_usd": {"h200": 3.0}}, "no --device"),
    ],
)
def test_questions_without_an_answer(slo: str, more: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        question(slo, **more)


def test_closed_loops_have_no_rate() -> None:
    asked = question("ttft=1s", workload=parse_workload("closed:clients=4,input=100,output=20,requests=40"))
    with pytest.raises(ConfigError, match="closed loop"):
        Search(asked)


def test_the_command(tmp_path: Any) -> None:
    flags = ["plan", "fleet", "--trace", LOAD.format(20, 60), "--model", "llama-3.1-8b", "--slo", "ttft=500ms"]
    flags += ["--device", "a100-80gb", "--device", "l4", "--setup", "mixed", "--tensor-parallel", "1", "--workers", "1"]
    picture = tmp_path / "plan.svg"
    told = megalith(*flags, "--plot", str(picture))
    assert told.returncode == 0, told.stderr
    for word in ("cheapest: ", "binding: ", "headroom: ", "Not chosen", "l4"):
        assert word in told.stdout
    assert "(simulated)" in picture.read_text()
    document = json.loads(megalith(*flags, "--json", "--predict-only").stdout)
    assert document["nature"] == "predicted"
    assert document["winner"]["shape"]["device"] == "a100-80gb"
    no = megalith(*flags[:6], "--slo", "ttft=1ms", *flags[8:])
    assert no.returncode == 1
    assert no.stderr.startswith("error: No fleet of up to 1,024 devices keeps ttft=1ms")
