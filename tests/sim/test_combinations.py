"""Options of a pool that do not go together are refused, and those that do are run."""

from __future__ import annotations

from itertools import combinations

import pytest

from megalith.base.errors import ConfigError
from megalith.sim.build import Builder
from megalith.sim.combinations import _REASONS
from megalith.sim.run import simulate
from megalith.sim.scenario import Scenario
from megalith.sim.setups import with_policies
from megalith.specs.fleet_text import parse_fleet
from megalith.specs.workload_text import parse_workload

OPTIONS = {
    "attention": ":attention=2xh20", "experts": ":experts.count=3", "overlap": ":overlap=nanoflow",
    "padding": ":padding=true", "borrowed layers": ":peer_layers=4", "lent KV": "",
}  # fmt: skip
LOAD = "poisson:rate=2,input=100,output=20,requests=20"


def scenario(*names: str) -> Scenario:
    fleet = parse_fleet("2xh100-sxm:tp2" + "".join(OPTIONS[name] for name in names))
    if "lent KV" in names:
        fleet = with_policies(fleet, ["infinite"])
    load = parse_workload(LOAD + (",experts=3,zipf=1" if "experts" in names else ""))
    return Scenario(model="llama-3.1-8b", fleet=fleet, workload=load, timer="analytic")


@pytest.mark.parametrize("pair", list(combinations(OPTIONS, 2)), ids=" with ".join)
def test_two_options_run_together_or_are_refused(pair: tuple[str, str]) -> None:
    if frozenset(pair) in _REASONS:
        with pytest.raises(ConfigError, match=r"Leave out") as refused:
            simulate(scenario(*pair))
        assert all(name in str(refused.value) for name in pair)
    else:
        assert simulate(scenario(*pair)).figures.finished == 20


@pytest.mark.parametrize("name", list(OPTIONS))
def test_each_option_runs_alone(name: str) -> None:
    assert Builder(scenario(name)).kinds
    assert simulate(scenario(name)).figures.finished == 20
