"""The cheapest mix of types: the program finds what trying everything finds, and its table holds in simulation."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import subprocess
import sys
from math import inf
from typing import Any

import msgspec
import pytest

from megalith.base.errors import CapacityError, ConfigError, MachineError
from megalith.plan import mix_table
from megalith.plan.fleet import plan_fleet
from megalith.plan.fleet_bounds import Ability
from megalith.plan.fleet_load import cut
from megalith.plan.fleet_question import FleetQuestion, Shape
from megalith.plan.mix import Offer, cheapest_mix, single
from megalith.plan.mix_plan import add_mix, best_single, check, market, solve
from megalith.plan.mix_trial import deal, run_mix
from megalith.specs.shape import RequestShape
from megalith.specs.slo import parse_slo
from megalith.specs.workload_rate import at_rate
from megalith.specs.workload_text import parse_workload
from tests.cli.command import megalith

needs_solver = pytest.mark.skipif(
    importlib.util.find_spec("highspy") is None,
    reason="highspy (the HiGHS solver, extra `plan`) is not installed",
)
PRICES = (Offer("a10g", 1.01), Offer("a100-80gb", 3.67), Offer("l4", 0.7), Offer("h100-sxm", 7.516))


def everything(offers: list[Offer], loads: list[list[float]], slices: int, devices: int | None) -> float | None:
    """The price of the cheapest mix by trying every place of every slice; None when there is none."""
    best = inf
    ways = []
    for row in loads:
        open_to = [j for j, load in enumerate(row) if load < inf]
        ways.append(list(itertools.combinations_with_replacement(open_to, slices)))
    for choice in itertools.product(*ways):
        busy = [0.0] * len(offers)
        for row, places in zip(loads, choice, strict=True):
            for j in places:
                busy[j] += row[j] / slices
        counts = [max(0, -int(-(load - 1e-6) // 1)) for load in busy]
        if any(offer.most is not None and n > offer.most for offer, n in zip(offers, counts, strict=True)):
            continue
        if devices is not None and sum(o.devices * n for o, n in zip(offers, counts, strict=True)) > devices:
            continue
        best = min(best, sum(offer.price * n for offer, n in zip(offers, counts, strict=True)))
    return None if best == inf else best


def small(seed: int) -> tuple[list[Offer], list[list[float]], int, int | None]:
    draw = random.Random(seed)
    types, groups = draw.randint(1, 3), draw.randint(1, 3)
    offers = [
        Offer(f"t{j}", round(draw.uniform(0.5, 8), 2), draw.choice([None, None, 1, 3]), draw.choice([1, 1, 2]))
        for j in range(types)
    ]
    loads = [[inf if draw.random() < 0.15 else draw.uniform(0.05, 2.5) for _ in offers] for _ in range(groups)]
    return offers, loads, draw.randint(1, 4), draw.choice([None, None, 4])


@needs_solver
@pytest.mark.parametrize("seed", range(80))
def test_the_program_equals_brute_force(seed: int) -> None:
    offers, loads, slices, devices = small(seed)
    best = everything(offers, loads, slices, devices)
    if best is None:
        with pytest.raises(CapacityError):
            cheapest_mix(offers, loads, slices=slices, most_devices=devices)
        return
    mix = cheapest_mix(offers, loads, slices=slices, most_devices=devices)
    assert mix.price == pytest.approx(best)
    assert mix.proven
    for row, shares in zip(loads, mix.shares, strict=True):
        assert sum(shares) == pytest.approx(1)
        assert all(share == 0 for load, share in zip(row, shares, strict=True) if load == inf)
        assert all(share * slices == pytest.approx(round(share * slices)) for share in shares)
    assert all(busy <= count + 1e-5 for busy, count in zip(mix.busy, mix.counts, strict=True))
    whole = cheapest_mix(offers, loads, slices=None, most_devices=devices)
    assert whole.price <= mix.price + 1e-6, "uncut groups are never dearer"


@needs_solver
@pytest.mark.parametrize("seed", range(20))
def test_a_mix_is_never_dearer_than_one_type_and_equals_it_alone(seed: int) -> None:
    draw = random.Random(1000 + seed)
    loads = [[draw.uniform(0.01, 4) for _ in PRICES] for _ in range(12)]
    mix = cheapest_mix(PRICES, loads, slices=8)
    for place, offer in enumerate(PRICES):
        column = [row[place] for row in loads]
        alone = single(offer, column)
        assert alone is not None
        assert mix.price <= alone * offer.price + 1e-6
        assert cheapest_mix([offer], [[load] for load in column], slices=8).counts == (alone,)


@needs_solver
def test_the_published_examples() -> None:
    """Mélange, section 4.2: 4.3 requests/s, A10G 0.37, A100 2.0; and config/example.json of its release."""
    two = PRICES[:2]
    mix = cheapest_mix(two, [[4.3 / 0.37, 4.3 / 2.0]], slices=None)
    assert (mix.counts, round(mix.price, 2)) == ((1, 2), 8.35)
    assert single(two[1], [4.3 / 2.0]) == 3
    assert 1 - mix.price / (3 * 3.67) == pytest.approx(0.242, abs=5e-4)
    rates, a10g, a100 = (6, 3, 15, 6), (2, 1, 5, 2), (20, 20, 40, 20)
    loads = [[rate / low, rate / high] for rate, low, high in zip(rates, a10g, a100, strict=True)]
    toy = cheapest_mix(two, loads, slices=1)
    assert (toy.counts, round(toy.price, 2)) == ((3, 1), 6.70)


@needs_solver
@pytest.mark.parametrize(
    ("offers", "loads", "more", "words"),
    [
        ([Offer("l4", 0.7)], [[inf], [1.0]], {}, "1 of 2 groups of requests can be served by none of l4"),
        ([Offer("l4", 0.7, 2)], [[2.5]], {}, "l4 alone would need 2.5.*at most 2 of l4"),
        ([Offer("l4", 0.7)], [[9.0]], {"most_devices": 8}, "at most 8 devices in all"),
    ],
)
def test_loads_that_no_mix_serves(offers: Any, loads: Any, more: Any, words: str) -> None:
    with pytest.raises(CapacityError, match=words):
        cheapest_mix(offers, loads, **more)


@pytest.mark.parametrize(
    ("offers", "loads", "slices", "words"),
    [
        ([], [[]], 1, "no type of instance"),
        ([Offer("l4", 0.7)], [], 1, "no load"),
        ([Offer("l4", 0.7)], [[1.0]], 0, "0 slices"),
        ([Offer("l4", -1.0)], [[1.0]], 1, "-1"),
        ([Offer("l4", 0.7)], [[1.0, 2.0]], 1, "2 loads for 1 types"),
        ([Offer("l4", 0.7)], [[float("nan")]], 1, "nan instances"),
        ([Offer("l4", 0.7)], [[-0.5]], 1, "-0.5 instances"),
    ],
)
def test_numbers_that_mean_nothing(offers: Any, loads: Any, slices: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        cheapest_mix(offers, loads, slices=slices)


@needs_solver
def test_degenerate_loads() -> None:
    assert cheapest_mix([Offer("l4", 0.7)], [[0.0]]).counts == (0,)
    free = cheapest_mix([Offer("free", 0.0), Offer("l4", 0.7)], [[3.2, 0.1]], slices=None)
    assert free.price == 0
    assert cheapest_mix([Offer("a", 1.0)], [[3.0]]).counts == (3,), "a load of just three instances is three"


def test_without_the_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before the minute that a search takes."""
    monkeypatch.setitem(sys.modules, "highspy", None)
    with pytest.raises(MachineError, match=r"megalith\[plan\]"):
        cheapest_mix([Offer("l4", 0.7)], [[1.0]])
    with pytest.raises(MachineError, match="or plan single types without --mix"):
        check(asked())


@needs_solver
def test_the_solver_writes_nothing() -> None:
    program = "from megalith.plan.mix import *; cheapest_mix([Offer('a', 1.0)], [[2.5]]); print('only this')"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert told.stdout == "only this\n"


# The throughput table


def asked(load: str = "azure-conv", rate: float = 8, slo: str = "ttft=4s,tpot=120ms", **more: Any) -> FleetQuestion:
    given: dict[str, Any] = {
        "model": "llama-2-7b", "workload": at_rate(parse_workload(load), rate), "slo": parse_slo(slo),
        "devices": ("l4", "a10g", "a100-80gb", "h100-sxm"), "tensor_parallel": (1,), "setups": ("mixed",),
        "most_requests": 2000,
    }  # fmt: skip
    return FleetQuestion(**(given | more))


def ability(device: str) -> Ability:
    return Ability(asked(), Shape(device=device, tensor_parallel=1, setup="mixed"))


def test_throughput_falls_with_every_demand() -> None:
    one = ability("a10g")
    for prompt, answer in ((25, 25), (25, 2000), (500, 250), (2000, 25), (3000, 500)):
        most = [mix_table.most_requests_per_s(one, prompt, answer, ms * 1e6) for ms in (20, 35, 40, 80, 120, 500)]
        assert most == sorted(most)
        assert most[0] == 0, "a lone decode takes 31 ms"
        assert most[-1] > 0
        free = mix_table.most_requests_per_s(one, prompt, answer)
        assert free >= most[-1]
        assert mix_table.most_requests_per_s(one, prompt + 100, answer) < free
        assert mix_table.most_requests_per_s(one, prompt, answer + 100) < free
        assert mix_table.most_requests_per_s(one, prompt, answer, host_ns=20e6) < free
    assert mix_table.most_requests_per_s(one, 4000, 200) == 0, "Llama 2 has positions for 4,096 tokens"
    assert mix_table.most_requests_per_s(one, 100, 1) > mix_table.most_requests_per_s(one, 100, 2)


@pytest.mark.parametrize(("device", "prompt", "answer"), [("a100-80gb", 250, 250), ("a10g", 1000, 100), ("l4", 50, 50)])
def test_the_table_holds_in_simulation(device: str, prompt: int, answer: int) -> None:
    """At 0.9 of the most, mean TPOT is within the limit; at 1.25 of it the limit or the queue breaks."""
    most = mix_table.most_requests_per_s(ability(device), prompt, answer, 60e6 if device != "l4" else 120e6)
    limit = "60ms" if device != "l4" else "120ms"
    good = []
    for share in (0.9, 1.25):
        load = f"poisson:rate={most * share},input={prompt},output={answer},requests=1500"
        question = FleetQuestion(
            model="llama-2-7b", workload=parse_workload(load), slo=parse_slo(f"ttft=5s@p50,tpot={limit}@p50"),
            devices=(device,), tensor_parallel=(1,),
        )  # fmt: skip
        shape = Shape(device=device, tensor_parallel=1, setup="mixed")
        key = mix_table.group_key(prompt, answer, "sizes")
        good.append(run_mix(question, [shape], [1], "sizes", [key], [[1.0]]).kept)
    assert good == [True, False]


def test_buckets() -> None:
    lengths = (1, 25, 26, 100, 2000, 2001, 4000, 4001, 8000, 8001)
    assert [mix_table.bucket(tokens) for tokens in lengths] == [0, 0, 1, 1, 5, 6, 6, 7, 7, 8]
    _, load, _ = cut(asked().workload, 0, 2000)
    for knows, columns in (("sizes", 2), ("prompt", 1)):
        found, keys = mix_table.sizes(load, knows)  # type: ignore[arg-type]
        assert sum(size.rate_per_s for size in found) == pytest.approx(load.rate_per_s)
        assert {len(key) for key in keys} == {columns}
        assert {size.group for size in found} == set(range(len(keys)))
        mean = sum(size.rate_per_s * size.prompt_tokens for size in found) / load.rate_per_s
        assert mean == pytest.approx(load.prompts.mean())


def test_requests_are_dealt_as_the_shares_say() -> None:
    requests = [RequestShape(i, i, 10 if i % 3 else 3000, 10) for i in range(300)]
    keys = [mix_table.group_key(10, 10, "sizes"), mix_table.group_key(3000, 10, "sizes")]
    parts = deal(requests, "sizes", keys, [(0.25, 0.75, 0.0), (0.0, 0.0, 1.0)])
    assert [len(part) for part in parts] == [50, 150, 100]
    assert {one.input_tokens for one in parts[2]} == {3000}
    assert sorted(one.index for part in parts for one in part) == list(range(300))
    first = [one.index for one in parts[0][:10]]
    assert max(b - a for a, b in itertools.pairwise(first)) <= 9, "evenly, not in runs"


# The plan


@needs_solver
def test_a_mix_that_pays_is_kept_in_simulation_and_cheaper() -> None:
    question = asked()
    plan = add_mix(plan_fleet(question, workers=1), question, "prompt")
    assert plan.mix is not None
    assert plan.mix.pays
    assert len(plan.mix.parts) > 1
    assert plan.mix.objective is not None
    assert plan.mix.objective < plan.winner.objective
    assert plan.mix.saves == pytest.approx(1 - plan.mix.objective / plan.winner.objective)
    assert plan.mix.good is not None
    assert plan.mix.good >= 0.9
    assert sum(part.requests or 0 for part in plan.mix.parts) == 2000


@needs_solver
def test_a_mix_that_does_not_pay_says_why() -> None:
    question = asked(rate=1, devices=("l4", "h100-sxm"))
    plan = add_mix(plan_fleet(question, workers=1), question, "sizes")
    assert plan.mix is not None
    assert not plan.mix.pays
    assert plan.mix.why
    one = asked(devices=("a100-80gb",))
    alone = add_mix(plan_fleet(one, simulate=False), one, "sizes").mix
    assert alone is not None
    assert (alone.pays, alone.why, alone.saves) == (False, "one type serves everything best", 0.0)


@needs_solver
def test_prediction_compares_by_one_table() -> None:
    question = asked("lmsys", 32)
    plan = add_mix(plan_fleet(question, simulate=False), question, "sizes")
    assert plan.mix is not None
    assert plan.mix.nature == "predicted"
    part, load, _ = cut(question.workload, 0, 2000)
    places = market(msgspec.structs.replace(question, workload=part), load, "sizes")
    control = best_single(places)
    assert control is not None
    assert plan.mix.control == pytest.approx(control[0].price * control[1])
    assert plan.mix.objective == pytest.approx(solve(places).price)
    prompt = solve(market(msgspec.structs.replace(question, workload=part), load, "prompt"))
    assert prompt.price >= solve(places).price - 1e-6, "whoever knows less does not do better"


@needs_solver
def test_questions_that_a_mix_cannot_answer() -> None:
    for slo, more, words in (
        ("ttft=3x,tpot=40ms", {}, "cannot be sized for"),
        ("ttft=4s,tpot=120ms", {"minimise": "power"}, "not for power"),
    ):
        question = asked(slo=slo, **more)
        with pytest.raises(ConfigError, match=words):
            add_mix(plan_fleet(asked(), simulate=False), question, "prompt")
    tight = asked(slo="ttft=4s,tpot=3ms")
    part, load, _ = cut(tight.workload, 0, 2000)
    with pytest.raises(CapacityError, match=r"of the requests are of sizes that no type serves within .*tpot=3ms"):
        market(msgspec.structs.replace(tight, workload=part), load, "sizes")
    huge = asked(model="llama-2-70b", devices=("l4",))
    with pytest.raises(CapacityError, match="No type of instance can be: l4 tp1: llama-2-70b"):
        market(msgspec.structs.replace(huge, workload=part), load, "sizes")


@needs_solver
def test_the_command() -> None:
    flags = ["plan", "fleet", "--trace", "lmsys:requests=2000", "--rate", "32", "--model", "llama-2-7b", "--slo"]
    flags += ["ttft=4s,tpot=120ms", "--setup", "mixed", "--tensor-parallel", "1", "--predict-only", "--mix", "sizes"]
    flags += [word for device in ("l4", "a10g", "a100-80gb") for word in ("--device", device)]
    told = megalith(*flags)
    assert told.returncode == 0, told.stderr
    assert "mix pays (predicted): " in told.stdout
    assert "ORACLE" in told.stdout
    document = json.loads(megalith(*flags, "--json").stdout)
    assert document["mix"]["saves"] > 0.05
    wrong = megalith(*flags[:-8], "--mix", "nothing", *flags[-6:])
    assert wrong.returncode == 2
    assert "Choose no, prompt or sizes" in wrong.stderr
