"""The cells of the Lamina study: the gain, the control, and the loss where compute binds."""

from __future__ import annotations

from statistics import median

from megalith.studies import lamina
from megalith.studies.lamina_cases import CELLS, ablation, cell
from megalith.studies.study import Case


def ratio(number: int, arm: str) -> float:
    on, own = (cell({"cell": number, "arm": one})["tokens_per_s"] for one in (arm, "own"))
    assert on is not None
    assert own is not None
    return on / own


def test_the_planned_gate_and_its_control() -> None:
    found = {pair: ratio(number, "wide") for number, pair in enumerate(CELLS)}
    assert 1.15 <= median(found.values()) <= 1.6
    assert found["llama-3.1-70b", "conv"] < 1.0, "887 requests are bound by compute"
    assert all(ratio(number, "home") < 0.05 for number in (0, 5, 8)), "attention at home waits for KV"
    assert all(ratio(number, "one-batch") < found[CELLS[number]] for number in (0, 4, 8))


def test_sending_q_first_saves_more_where_keys_and_values_are_large() -> None:
    saved = []
    for model in ("llama-65b", "llama-3.1-70b"):
        early, late = (
            ablation({"model": model, "requests": 64, "arm": arm})["tbt_ms"] or 0.0 for arm in ("early", "late")
        )
        saved.append(1 - early / late)
    assert saved[0] > 3 * saved[1] > 0


def test_the_arms_of_a_simulated_point_differ_in_the_decode_pool_only() -> None:
    on, own, home = (lamina.scenario(Case(arm, 8.0, 0, True)) for arm in ("lamina", "own", "home"))
    assert on.workload == own.workload == home.workload
    assert on.fleet.pools[0] == own.fleet.pools[0] == home.fleet.pools[0]
    assert [one.fleet.pools[1].devices for one in (on, own, home)] == [6, 4, 6]
