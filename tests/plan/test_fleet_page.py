"""What `plan fleet` says beside the cheapest fleet: what mechanisms are worth, the room, the risks, and the page."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from megalith.base.errors import ConfigError, MachineError
from megalith.plan.fleet import plan_fleet
from megalith.plan.fleet_answer import Contribution, FleetPlan
from megalith.plan.fleet_explain import describe_contribution
from megalith.plan.fleet_load import Load
from megalith.plan.fleet_question import FleetQuestion, Shape, Size
from megalith.plan.fleet_trial import Probe, Trial, probe
from megalith.report.html_page import Section, check_page_path, render, write_page
from megalith.report.table import Column, Table
from megalith.specs.shape import RequestShape
from megalith.specs.slo import parse_slo
from megalith.specs.workload_text import parse_workload
from tests.cli.command import megalith

LOAD = "poisson:rate=30,input=lognormal:900:0.9,output=lognormal:120:0.8,max_input=4000,max_output=500,requests=200"
ASKED: dict[str, Any] = {
    "model": "llama-3.1-8b", "workload": parse_workload(LOAD), "slo": parse_slo("ttft=400ms,tpot=25ms"),
    "devices": ("a100-80gb",), "tensor_parallel": (1,), "setups": ("mixed", "llumnix"), "most_devices": 10,
}  # fmt: skip


@pytest.fixture(scope="module")
def plan() -> FleetPlan:
    return plan_fleet(FleetQuestion(**ASKED), workers=1)


def smallest(shape: Shape, rate: float) -> int | None:
    for instances in range(1, 11):
        trial = run(shape, Size(instances), rate)
        if trial.kept:
            return instances
    return None


def run(shape: Shape, size: Size, rate: float, **more: Any) -> Trial:
    return probe(Probe(question=FleetQuestion(**ASKED), shape=shape, size=size, rate_per_s=rate, early=False, **more))


def found(plan: FleetPlan, mechanism: str) -> Contribution:
    return next(one for one in plan.contributions if one.mechanism == mechanism)


def test_what_splitfuse_is_worth_is_what_trying_every_size_says(plan: FleetPlan) -> None:
    one = found(plan, "SplitFuse")
    plain = Shape(device="a100-80gb", tensor_parallel=1, setup="mixed")
    whole = msgspec.structs.replace(plain, extras=("prefill-first",))
    with_it, without = smallest(plain, plan.rate_per_s), smallest(whole, plan.rate_per_s)
    assert with_it is not None
    assert one.objective == pytest.approx(with_it * 3.67)
    if without is None:
        assert (one.state, one.control) == ("pays", None)
    else:
        assert one.control == pytest.approx(without * 3.67)
        assert one.state == ("pays" if without > with_it else "does not pay")
        assert one.saves == pytest.approx(1 - with_it / without)


def test_every_mechanism_is_answered_for_and_a_fleet_of_prompts_first_can_win(plan: FleetPlan) -> None:
    named = [one.mechanism for one in plan.contributions]
    assert named[:2] == ["SplitFuse", "live migration"]
    assert {one.state for one in plan.contributions} <= {"pays", "does not pay", "does not apply", "not asked"}
    assert found(plan, "scaling with the load").state == "does not apply"
    lax = FleetQuestion(**(ASKED | {"slo": parse_slo("ttft=300ms,tpot=400ms"), "setups": ("mixed",)}))
    other = plan_fleet(lax, workers=1)
    assert other.winner.objective <= min(value for value in (found(other, "SplitFuse").objective,) if value)


def test_the_room_and_the_risks_are_those_of_runs(plan: FleetPlan) -> None:
    shape, size = plan.winner.shape, plan.winner.size
    assert plan.headroom is not None
    as_planned = run(shape, size, plan.rate_per_s)
    assert plan.headroom.slo == {bound: 1 - used for bound, used in as_planned.used.items() if used is not None}
    power = plan.headroom.power
    assert power is not None
    assert 0 < power.mean_w <= power.peak_w <= power.rated_w == 400.0 * size.instances
    slower, other, fewer = plan.risks
    assert slower.kept == run(shape, size, plan.rate_per_s, slower=1.2).kept
    assert other.kept == run(shape, size, plan.rate_per_s, seed=1).kept
    assert not fewer.kept, "the winner is the smallest that does"


def test_by_prediction_there_is_room_too_but_no_risk_is_tried() -> None:
    plan = plan_fleet(FleetQuestion(**ASKED), simulate=False)
    assert plan.headroom is not None
    assert plan.headroom.kept_times >= 1
    assert set(plan.headroom.slo) == {"ttft=400ms", "tpot=25ms"}
    assert plan.risks == []
    assert found(plan, "SplitFuse").state == "not asked"
    assert {one.nature for one in plan.contributions} == {"predicted"}


def test_a_load_of_days_says_what_following_it_may_save() -> None:
    shapes = [RequestShape(i, round(t * 1e9), 10, 10) for i, t in enumerate(_two_days())]
    load = Load(shapes, 16)
    counts = np.histogram([shape.at_ns or 0 for shape in shapes], bins=288)[0]
    assert load.peak_over_mean(600.0) == pytest.approx(counts.max() / counts.mean(), rel=0.05)
    assert load.times(2.0).rate_per_s == pytest.approx(2 * load.rate_per_s)
    assert load.times(2.0).span_s == pytest.approx(load.span_s / 2)


def _two_days() -> list[float]:
    generator = np.random.default_rng(0)
    times = np.sort(generator.uniform(0, 2 * 86_400, 40_000))
    keep = generator.uniform(size=len(times)) < 0.5 + 0.5 * np.sin(times / 86_400 * 2 * np.pi)
    return [0.0, *times[keep].tolist()]


@pytest.mark.parametrize(
    ("one", "told"),
    [
        (
            {"state": "pays", "objective": 5.0, "control": 10.0, "saves": 0.5},
            "pays: saves 50%, 5.000 $/h against",
        ),
        ({"state": "does not pay", "objective": 5.0, "control": 5.0, "saves": 0.0}, "does not pay here: 5.000 $/h"),
        ({"state": "pays", "objective": 5.0}, "pays: why"),
        ({"state": "does not pay"}, "does not pay here: why"),
        ({"state": "does not apply"}, "does not apply: why"),
    ],
)
def test_a_line_says_against_what(one: dict[str, Any], told: str) -> None:
    given = Contribution(mechanism="m", source="s", nature="simulated", why="why", **one)
    assert f"m (s) {told}" in describe_contribution(given, "cost")


class Reader(HTMLParser):
    """Collects tags; fails on nothing, so tags are checked for balance here."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_holds_everything_in_one_file(tmp_path: Path) -> None:
    page = tmp_path / "fleet.html"
    asked = ["plan", "fleet", "--trace", LOAD, "--model", "llama-3.1-8b", "--slo", "ttft=400ms,tpot=25ms"]
    asked += ["--device", "a100-80gb", "--tensor-parallel", "1", "--setup", "mixed", "--workers", "1"]
    done = megalith(*asked, "--page", str(page))
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    heads = re.findall(r"<h2>(.*?)</h2>", text)
    assert heads == [
        "What to buy", "What each mechanism contributes", "Headroom", "Risks", "Not chosen, and why",
        "Where the figures come from",
    ]  # fmt: skip
    pictures = [base64.b64decode(str(tag[1]["src"]).partition(",")[2]) for tag in reader.seen if tag[0] == "img"]
    assert len(pictures) == 3
    assert all(png.startswith(b"\x89PNG") for png in pictures)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    assert "(simulated)" in text
    assert list(tmp_path.iterdir()) == [page]


def test_text_from_outside_is_shown_and_not_obeyed() -> None:
    table = Table([Column("a", "a<b>")], "t<i>")
    table.add("<script>x</script>")
    text = render("<h1>", ["a & b"], [Section("<s>", ["<u>"], code="<c>", tables=[table])], "<f>")
    assert "<script>" not in text
    assert "&lt;script&gt;x&lt;/script&gt;" in text
    assert text.count("<h1>") == 1
    assert "a &amp; b" in text


def test_a_page_that_cannot_be_written_is_said_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no name of a page"):
        check_page_path(tmp_path / "a.pdf")
    with pytest.raises(ConfigError, match="no folder"):
        check_page_path(tmp_path / "none" / "a.html")
    (tmp_path / "a.html").mkdir()
    with pytest.raises(MachineError, match="could not be written"):
        write_page(tmp_path / "a.html", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]
