"""The guide to policies shows the table that there is and code that runs."""

from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path

import pytest

from megalith.base.config import convert
from megalith.base.errors import ConfigError
from megalith.policy.cluster import Defer, Event, Migrate, Route
from megalith.policy.registry import controller, router
from megalith.specs.fleet import FleetSpec, PolicySpec
from tests.policy.facts import Facts, Seen, many, request, running

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "own_policies.py"
GUIDE = (ROOT / "docs" / "guides" / "policies.md").read_text()


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))


@pytest.mark.parametrize("kind", ["router", "controller"])
def test_the_guide_has_the_table_of_what_ships(kind: str) -> None:
    assert runpy.run_path(str(EXAMPLE))["policies"](kind) in GUIDE


def test_the_code_in_the_guide_is_that_of_the_example() -> None:
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        assert block in EXAMPLE.read_text()


def test_the_fleet_in_the_guide_is_one() -> None:
    [block] = re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL)
    fleet = convert(
        {"pools": [{"name": "all", "device": "h100-sxm", "count": 1}], **tomllib.loads(block)}, FleetSpec, "the guide"
    )
    assert router(fleet.router, 0).name == "freeness"
    assert [controller(spec, 0).name for spec in fleet.controllers] == ["rebalance", "freeness-scaling"]


def test_a_router_of_ones_own() -> None:
    options = {"short": "small", "long": "large", "border_tokens": 100}
    mine = router(PolicySpec(name="own_policies:BySize", options=options), 0)
    view = Seen(many(Facts(pool="small", outstanding=2), Facts(pool="large"), Facts(pool="small", outstanding=1)))
    assert mine.route(request(0, 99), view) == Route(0, 2)
    assert mine.route(request(0, 100), view) == Route(0, 1)
    assert isinstance(mine.route(request(0, 99), Seen()), Defer)


def test_a_controller_of_ones_own() -> None:
    mine = controller(PolicySpec(name="own_policies:MakeRoom"), 0)
    full = Facts(batch=(running(1, 300), running(2, 200)))
    view = Seen(many(full, Facts(batch=(running(3, 9),)), Facts()))
    assert list(mine.act(Event("preempt", 0, 7, {"instance": 0}), view)) == [Migrate(2, 0, 2)]
    assert list(mine.act(Event("preempt", 0, 7, {"instance": 0}), Seen(view.instances[:1]))) == []


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("own_policies:BySizes", {}, "has no BySizes"),
        ("own_policies:MakeRoom", {}, "it has no route"),
        ("my_policies:BySize", {}, "PYTHONPATH"),
        ("own_policies:BySize", {"short": "a", "lnog": "b"}, "Did you mean `long`"),
    ],
)
def test_mistakes_with_ones_own(name: str, options: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        router(PolicySpec(name=name, options=options), 0)
    assert said in str(error.value)
