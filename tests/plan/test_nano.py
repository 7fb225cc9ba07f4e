"""The nano planner: optimum, class, orders against brute force, and what it prints."""

from __future__ import annotations

import importlib.util
import json
from itertools import permutations
from pathlib import Path

import pytest

from megalith.base.errors import ConfigError, DoesNotFit
from megalith.cli.main import run
from megalith.cost.lowering import Piece, StepWork, layer_costs
from megalith.cost.nano import Cuts, Enough, Order, Pipeline, Slot, cut, frame, layers_ps
from megalith.cost.nano_choice import choose
from megalith.cost.timer import Prompt
from megalith.cost.timer_choice import choose_timer
from megalith.plan.nano import Traffic, optimum_per_s, step_of, times_of
from megalith.plan.nano_search import Effort, best_order, search

COSTS = layer_costs(choose_timer("analytic", "llama-2-70b", "a100-80gb", 8))
needs_solver = pytest.mark.skipif(importlib.util.find_spec("highspy") is None, reason="highspy is not installed")


def test_the_published_optimum() -> None:
    assert optimum_per_s(260e12, 70e9) == pytest.approx(1857, rel=1e-3)


def test_what_binds() -> None:
    short, limited = step_of(COSTS.cost, Traffic(512, 512))
    assert (short.rows, short.decodes, limited) == (2048, 1024, False)
    assert times_of(COSTS.cost, short).bound == "compute"
    long, limited = step_of(COSTS.cost, Traffic(512, 32_768))
    assert limited
    assert long.decodes < 200
    assert times_of(COSTS.cost, long).bound == "memory"
    assert step_of(COSTS.cost, Traffic(512, 0))[0].decodes == 0


def test_traffic_that_cannot_be() -> None:
    with pytest.raises(ConfigError):
        step_of(COSTS.cost, Traffic(0, 0))
    with pytest.raises(DoesNotFit, match="one request of"):
        step_of(layer_costs(choose_timer("analytic", "llama-2-70b", "a100-80gb", 1)).cost, Traffic(512, 512))


@needs_solver
def test_the_order_is_the_best_of_all_orders() -> None:
    """Without lags every order of a small layer's products is tried; the program is as good as the best."""
    ns = 10**6
    parts = tuple(
        Piece(kind, rows, time * ns, link_ps=time * ns if kind in ("reduce", "gather") else 0.0)
        for kind, rows, time in [
            ("kqv", (0, 1), 3), ("kqv", (1, 2), 2), ("up", (0, 1), 4), ("up", (1, 2), 5),
            ("gather", (0, 1), 6), ("gather", (1, 2), 3),
        ]
    )  # fmt: skip
    cuts = Cuts((0, 1, 2), (0, 1, 2))
    found = best_order(parts, cuts, "")
    assert found is not None
    assert found.proven
    names = [Slot("kqv", 0), Slot("kqv", 1), Slot("up", 0), Slot("up", 1)]
    links = [Slot("gather", 0), Slot("gather", 1)]
    wide = Enough(1, 1)  # everything fits beside everything: no interference

    def period(order: Order) -> float:
        pipeline = Pipeline(parts, order, (998, 998, 998, 998, 1, 1))
        try:
            return layers_ps(pipeline, frame(parts, order, 12), wide, 1000)[1] * 0.998
        except ConfigError:
            return float("inf")

    best = min(
        period(Order(compute, (), link)) for compute in permutations(names) for link in permutations(links)
    )  # fmt: skip
    assert found.period_ps <= best * 1.005
    assert period(found.order) == pytest.approx(found.period_ps, rel=0.01)


@needs_solver
def test_the_search_is_never_worse_than_the_quick_choice() -> None:
    work = StepWork(1024, 1024 * 768, (Prompt(512, 0, True), Prompt(512, 0, True)))
    found = search(COSTS, work, effort=Effort((0.5,), ("",)))
    quick = choose(COSTS, work, candidates=[(Cuts((0, 1024, 2048), (0, 1024, 2048)), order) for order in _orders(work)])
    assert found.chosen.layers_ps <= quick.layers_ps
    assert found.stage.programs == 2
    assert min(one.period_ps / one.bound_ps for one in found.stage.found) >= 1.0


def _orders(work: StepWork) -> list[Order]:
    from megalith.cost.nano_choice import orders

    cuts = Cuts((0, 1024, 2048), (0, 1024, 2048))
    return orders(cut(COSTS, work, cuts), cuts)


@needs_solver
def test_the_verb(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["plan", "nano", "llama-3.1-8b", "--device", "a100-80gb", "--batch", "1024", "--quick", "--json"]
    pytest.importorskip("matplotlib")
    assert run([*command, "--out", str(tmp_path / "a.png")]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["ways"][0]["name"] == "sequential"
    assert plan["ways"][-1]["gain"] >= 1.0
    assert all(most <= 1.0 + 1e-9 for _, _, most in plan["busy"].values())
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert run([*command, "--memory-share", "2"]) != 0
