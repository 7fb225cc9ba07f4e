"""`plan coe`: switch times, tiers, latency and its parts by hand; the verb and its errors."""

from __future__ import annotations

import json
import shlex
from typing import Any

import msgspec
import pytest

from megalith.base.errors import ConfigError, DoesNotFit
from megalith.cli.main import run
from megalith.cost.compute import CostModel
from megalith.cost.memory import weight_bytes
from megalith.cost.profile import from_device
from megalith.plan.experts import ExpertsQuestion, fused, nodes_for, plan_experts
from megalith.specs import catalog
from megalith.specs.node import node, nodes

SPEC = catalog.model("llama-2-7b")
WEIGHTS = 13_476_831_232


def question(name: str = "sn40l-node", **more: Any) -> ExpertsQuestion:
    return ExpertsQuestion(**{"spec": SPEC, "node": node(name), "count": 150, **more})


@pytest.mark.parametrize(("name", "seconds"), [("sn40l-node", 0.0135), ("dgx-h100", 0.211), ("dgx-a100", 0.421)])
def test_a_switch_takes_as_long_as_published(name: str, seconds: float) -> None:
    plan = plan_experts(question(name))
    assert plan.weight_bytes == WEIGHTS
    assert plan.switch_ns / 1e9 == pytest.approx(seconds, rel=0.02)
    assert plan.switch_ns == round(WEIGHTS * 1e9 / node(name).host_bytes_per_s)


def test_one_request_by_hand() -> None:
    plan = plan_experts(question("dgx-a100", prompt_tokens=256, output_tokens=3))
    cost = CostModel(SPEC, from_device(catalog.device("a100-80gb")), weight_bytes(SPEC, "bf16"), devices=8)
    prompt = cost.step(cost.shape([(256, 0)])).duration_ns
    steps = [cost.decode_step(1, context).duration_ns for context in (256, 257)]
    misses = 1 - plan.slots / 150
    assert plan.hit_rate == pytest.approx(plan.slots / 150)
    assert plan.parts.router_ns == plan.parts.prompt_ns == prompt
    assert plan.parts.decode_ns == pytest.approx(sum(steps), abs=2)
    assert plan.parts.switch_ns == pytest.approx(misses * plan.switch_ns, rel=1e-6)
    by_hit = dict(plan.by_hit_rate)
    assert by_hit[1.0] == plan.parts.total_ns - plan.parts.switch_ns
    assert by_hit[0.0] - by_hit[1.0] == plan.switch_ns


def test_tiers_hold_what_their_bytes_hold() -> None:
    plan = plan_experts(question("dgx-a100", router=False))
    kv = 532 * 2 * 32 * 4096 * 2
    assert plan.device_bytes == int(8 * 85_899_345_920 * 0.9) - kv
    assert plan.host_slots == node("dgx-a100").host_memory_bytes // WEIGHTS
    assert plan.nodes_on_device == -(-150 // plan.slots)
    assert plan.total_bytes == 150 * WEIGHTS
    with_router = plan_experts(question("dgx-a100"))
    assert plan.slots - with_router.slots == 1


def test_few_models_never_switch_and_output_of_one_token_does_not_decode() -> None:
    plan = plan_experts(question(count=20, output_tokens=1))
    assert (plan.hit_rate, plan.parts.switch_ns, plan.parts.decode_ns) == (1.0, 0, 0)
    assert plan.nodes_on_device == 1


def test_a_batch_pays_for_each_of_its_models() -> None:
    one, eight = (plan_experts(question(batch=batch)) for batch in (1, 8))
    assert 7.8 < eight.models_a_batch < 8
    assert eight.parts.switch_ns == pytest.approx(eight.models_a_batch * one.parts.switch_ns, rel=0.01)
    same = plan_experts(question(batch=8, count=1))
    assert same.models_a_batch == pytest.approx(1.0)
    assert same.parts.decode_ns < 1.5 * one.parts.decode_ns, "eight requests of one model share its steps"


def test_models_beyond_host_memory_are_read_from_disk() -> None:
    few = question("dgx-a100", count=160)
    many = msgspec.structs.replace(few, count=326)
    plan = plan_experts(many)
    from_host = (1 - plan.slots / 326) * plan.switch_ns
    from_disk = (1 - plan.host_slots / 326) * WEIGHTS / 7e9 * 1e9
    assert plan.parts.switch_ns == pytest.approx(from_host + from_disk, rel=1e-6)
    assert plan.nodes_in_host == 2
    assert plan_experts(few).nodes_in_host == 1


def test_skew_and_links_and_fusion_only_make_it_faster() -> None:
    plain = plan_experts(question("dgx-h100"))
    for more in ({"zipf": 1.0}, {"all_links": True}, {"fusion": "ideal"}):
        assert plan_experts(question("dgx-h100", **more)).parts.total_ns < plain.parts.total_ns, more
    wide = plan_experts(question("dgx-h100", all_links=True))
    assert plain.switch_ns / wide.switch_ns == pytest.approx(8.0, rel=1e-6)


def test_ideal_fusion_is_bytes_over_bandwidth() -> None:
    profile = fused(from_device(catalog.device("sn40l")), "ideal")
    weights = weight_bytes(SPEC, "bf16")
    cost = CostModel(SPEC, profile, weights, devices=8)
    read = weights.layers + weights.head + weights.vectors
    assert cost.decode_step(1, 0).duration_ns == pytest.approx(read / (8 * 1.8e12 * 0.85) * 1e9, rel=0.01)
    assert fused(profile, "profile") is profile


def test_nodes_for_a_number_of_models() -> None:
    assert nodes_for(850, WEIGHTS, 640_000_000_000) == 19
    assert nodes_for(46, WEIGHTS, 640_000_000_000) == 1
    assert nodes_for(47, WEIGHTS, 640_000_000_000) == 2
    with pytest.raises(DoesNotFit, match="beside 1 others"):
        nodes_for(1, WEIGHTS, WEIGHTS)


def test_nodes_of_the_catalogue_are_made_of_its_devices() -> None:
    for name, found in nodes().items():
        device = catalog.device(found.device)
        assert found.devices <= device.max_group, name
        assert found.host_bytes_per_s <= found.host_links_bytes_per_s, name
        assert abs(found.published_capacity_bytes / (found.devices * device.memory_bytes) - 1) < 0.08, name
        assert found.source, name


@pytest.mark.parametrize("batch", [0, -1])
def test_nonsense_is_refused(batch: int) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        question(batch=batch)
    with pytest.raises(ConfigError, match="memory_share"):
        question(memory_share=0)
    with pytest.raises(DoesNotFit, match="8 sn40l"):
        plan_experts(question(spec=catalog.model("llama-3.1-405b")))


def test_the_verb_prints_tiers_latency_and_hits(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(shlex.split("plan coe llama-2-7b --experts 150 --batch 8 --zipf 1")) == 0
    out = capsys.readouterr().out
    for text in ("Tiers", "Latency of a batch", "Latency by hit rate", "dgx-h100", "predicted", "150 models"):
        assert text in out
    assert run(shlex.split("plan coe llama-2-7b --node sn40l-node --json")) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["nature"] == "predicted"
    assert document["plans"]["sn40l-node"]["weight_bytes"] == WEIGHTS


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("plan coe llama-2-7b --node dgx", "no node"),
        ("plan coe llama-2-7b --fusion full", "profile, ideal or kernels"),
        ("plan coe llama-2-7b --experts 0", "at least 1"),
        ("plan coe llama-2-7b --zipf -1", "Zipf"),
    ],
)
def test_what_cannot_be_planned_is_said(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(shlex.split(line)) != 0
    assert says in capsys.readouterr().err
