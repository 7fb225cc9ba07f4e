"""Placement: against enumeration on four devices, the arithmetic of replication, what fits a node, the verb."""

from __future__ import annotations

import json
import shlex
from itertools import product
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import CapacityError, ConfigError
from megalith.cli import plan_placement as verb
from megalith.cli.main import run
from megalith.plan.goodput import goodput
from megalith.plan.placement import plan_placement
from megalith.plan.placement_question import Degrees, PlacementQuestion, Unit
from megalith.specs.slo import parse_slo
from megalith.studies.distserve_cases import conversations, fixed

QUICK = ["--requests", "40", "--step", "1.6", "--workers", "1", "--tensor-parallel", "1", "--pipeline-parallel", "1"]
FIGURE1 = ["--trace", "poisson:rate=1,input=512,output=64", "--model", "opt-13b", "--device", "a100-80gb", "--timer",
           "distserve:vllm", "--slo", "ttft=400ms,tpot=40ms"]  # fmt: skip


def asked(limits: str = "ttft=400ms,tpot=40ms", **more: object) -> PlacementQuestion:
    fields: dict[str, object] = {
        "model": "opt-13b", "workload": fixed(512, 8), "slo": parse_slo(limits), "device": "a100-80gb",
        "affinity": "low", "node_devices": 4, "most_devices": 4, "timer": "distserve:vllm", "tensor_parallel": (1, 2),
        "pipeline_parallel": (1, 2), "step": 1.4, "least_requests": 25, "residences": 0.0,
    }  # fmt: skip
    return PlacementQuestion(**(fields | more))  # type: ignore[arg-type]


@pytest.mark.parametrize(("slo", "pipelines"), [("ttft=400ms,tpot=40ms", (1, 2)), ("ttft=150ms,tpot=30ms", (1,))])
def test_the_search_in_a_node_is_enumeration(slo: str, pipelines: tuple[int, ...]) -> None:
    """Every way to use at most four devices, written down anew and simulated."""
    question = asked(slo, pipeline_parallel=pipelines)
    best = 0.0
    for tp_p, pp_p, tp_d, pp_d, n_p, n_d in product((1, 2), pipelines, (1, 2), pipelines, (1, 2, 3), (1, 2, 3)):
        if n_p * tp_p * pp_p + n_d * tp_d * pp_d <= 4:
            unit = Unit(
                prefill=Degrees(tensor_parallel=tp_p, pipeline_parallel=pp_p), prefills=n_p,
                decode=Degrees(tensor_parallel=tp_d, pipeline_parallel=pp_d), decodes=n_d,
            )  # fmt: skip
            best = max(best, goodput(question.asked(question.split(unit), 4.0)).per_device_per_s)
    plan = plan_placement(question, workers=1)
    assert plan.fleet.rate_per_s / plan.fleet.devices == pytest.approx(best)
    assert plan.fleet.devices <= 4


def test_phases_are_replicated_until_their_rates_match() -> None:
    question = asked(affinity="high", rate_per_s=20.0, tensor_parallel=(1, 2), pipeline_parallel=(1,))
    plan = plan_placement(question, workers=1)
    best = {
        what: max((one for one in plan.measured if one.what == what), key=lambda one: one.per_device_per_s)
        for what in ("prefill", "decode")
    }
    counts = {what: ceil(20.0 / one.rate_per_s) for what, one in best.items()}
    unit = plan.fleet.unit
    assert unit.prefills == counts["prefill"] + plan.fleet.added.get("prefill", 0)
    assert unit.decodes == counts["decode"] + plan.fleet.added.get("decode", 0)
    assert (str(unit.prefill), str(unit.decode)) == (best["prefill"].title, best["decode"].title)
    assert plan.fleet.attained >= 0.9
    assert plan.fleet.rate_per_s == 20.0
    each = [one.devices / one.rate_per_s for one in best.values()]
    assert plan.ideal_per_device_per_s == pytest.approx(1 / sum(each))


def test_where_nothing_is_gained_it_says_so() -> None:
    """A limit on TPOT that a prompt in between does not break: one instance for both is as good."""
    plan = plan_placement(
        asked("ttft=2s,tpot=400ms", affinity="high", tensor_parallel=(1,), pipeline_parallel=(1,), residences=3.0),
        workers=1,
    )
    assert plan.gain is not None
    assert plan.gain < 1
    assert not plan.splits


@given(
    node=st.integers(2, 8), nodes=st.integers(1, 3), tps=st.sets(st.sampled_from([1, 2, 4]), min_size=1),
    pps=st.sets(st.sampled_from([1, 2]), min_size=1),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_every_node_of_a_unit_holds_the_same_stages_of_both_phases(
    node: int, nodes: int, tps: set[int], pps: set[int]
) -> None:
    question = asked(
        node_devices=node, most_devices=16, most_nodes=nodes, tensor_parallel=tuple(tps), pipeline_parallel=tuple(pps)
    )
    units = list(question.units(question.degrees()))
    assert len({(u.prefill, u.prefills, u.decode, u.decodes) for u in units}) == len(units)
    for unit in units:
        assert unit.prefill.pipeline_parallel % unit.nodes == unit.decode.pipeline_parallel % unit.nodes == 0
        assert unit.devices <= node * unit.nodes
    inside = {(u.prefill.tensor_parallel, u.decode.tensor_parallel) for u in units}
    assert inside == {(p, d) for p, d in product(tps, tps) if any(p * a + d * b <= node for a in pps for b in pps)} or (
        nodes > 1
    )


def test_what_does_not_fit_is_said() -> None:
    plan = plan_placement(
        asked(model="opt-66b", affinity="high", tensor_parallel=(1, 2), pipeline_parallel=(1,), timer="analytic",
              slo=parse_slo("ttft=2s,tpot=150ms"), step=1.5, least_requests=30), workers=1,
    )  # fmt: skip
    assert "opt-66b" in plan.passed["tp1 pp1"]
    assert str(plan.fleet.unit.prefill) == "tp2 pp1"
    with pytest.raises(CapacityError, match="holds opt-66b"):
        plan_placement(asked(model="opt-66b", tensor_parallel=(1,), pipeline_parallel=(1,)), workers=1)


def test_limits_that_nothing_keeps_are_said() -> None:
    with pytest.raises(CapacityError, match="decode of up to 4"):
        plan_placement(asked("ttft=400ms,tpot=10ms", affinity="high", pipeline_parallel=(1,)), workers=1)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"slo": parse_slo("ttft=1s")}, "TTFT and TPOT"),
        ({"slo": parse_slo("ttft=1s,tpot=40ms,e2e=4s")}, "nothing else"),
        ({"affinity": "medium"}, "'medium'"),
        ({"node_devices": 1}, "cannot hold both"),
        ({"tensor_parallel": ()}, "at least 1"),
        ({"rate_per_s": 0.0}, "cannot be"),
    ],
)
def test_what_cannot_be_asked(more: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        asked(**more)


def test_the_verb_prints_the_placement_and_what_to_simulate(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "placement", *FIGURE1, *QUICK]) == 0
    shown = capsys.readouterr().out
    assert "split: yes" in shown
    assert "--policy distserve --timer distserve:vllm" in shown
    flags = next(line for line in shown.splitlines() if line.startswith("simulate it: "))
    more = shlex.split(flags.removeprefix("simulate it: "))
    trace = ["--trace", "poisson:rate=8,input=512,output=64", "--requests", "50", "--model", "opt-13b", "--json"]
    assert run(["simulate", *trace, *more]) == 0


def test_the_verb_answers_in_json_and_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "placement", *FIGURE1, *QUICK, "--affinity", "low", "--node", "2", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fleet"]["devices"] == 2
    assert plan["format"] == "megalith.plan-placement/1"
    assert run(["plan", "placement", *FIGURE1[:4]]) == 2
    assert "--slo" in capsys.readouterr().err
    assert run(["plan", "placement", *FIGURE1, "--tensor-parallel", "two"]) == 2
    assert "no list of degrees" in capsys.readouterr().err


def test_the_examples_of_the_help_are_questions() -> None:
    examples = verb._EXAMPLES.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in examples if line.strip().startswith("megalith")]
    assert len(commands) == 3
    for words in commands:
        _, bound, _ = verb.app.parse_args(words[3:], exit_on_error=False, print_error=False)
        asked_for = [*bound.args, *[None] * 2][:2]
        question = verb.make_question(asked_for[0] or verb.Placement(), asked_for[1] or verb.Details())
        assert question.link.bytes_per_s > 0


def test_conversations_are_those_that_the_model_can_hold() -> None:
    assert conversations().max_total_tokens == 2048
