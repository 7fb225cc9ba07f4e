"""`plan platform`: the inverse keeps its limits and nothing less does, needs grow, hypothetical models, the verb."""

from __future__ import annotations

import itertools
import json
import math
import shlex
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.cli.main import run
from megalith.cost import roofline
from megalith.cost.memory import kv_bytes_per_token, weight_bytes
from megalith.cost.parameters import count
from megalith.cost.roofline import Platform
from megalith.plan.platform import PlatformPlan, PlatformQuestion, device_counts, passes, plan_platform
from megalith.plan.shapes import hypothetical
from megalith.plan.source import resolve
from megalith.specs import catalog
from megalith.specs.use_case import UseCase, use_case, use_cases


def question(name: str = "llama-3.1-70b", case: str = "chat", **more: float | str) -> PlatformQuestion:
    base = PlatformQuestion(spec=resolve(name).spec, use_case=use_case(case))
    return msgspec.structs.replace(base, **more)


def late(asked: PlatformQuestion, plan: PlatformPlan, compute: float = 1.0, memory: float = 1.0) -> float:
    platform = Platform(
        compute * plan.flops_per_s / plan.devices, memory * plan.memory_bytes_per_s / plan.devices,
        link_bytes_per_s=plan.link_bytes_per_s or float("inf"), ring_start_s=0.0,
        link_latency_s=asked.link_latency_ns / 1e9 if plan.devices > 1 else 0.0,
    )  # fmt: skip
    limits = asked.use_case.ttft_ms / 1e3, asked.use_case.tpot_ms / 1e3
    both = (roofline.pass_cost(one, platform, plan.devices).seconds for one in passes(asked))
    return max(time / limit for time, limit in zip(both, limits, strict=True))


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["llama-3.1-8b", "mixtral-8x7b", "opt-13b", "dense:1T"]),
    prompt=st.integers(1, 40_000), output=st.integers(1, 2_000), beams=st.integers(1, 8), batch=st.integers(1, 64),
    ttft_ms=st.floats(1.0, 5_000.0), tpot_ms=st.floats(1.0, 200.0),
)  # fmt: skip
def test_a_platform_with_just_these_rates_is_just_in_time(
    name: str, prompt: int, output: int, beams: int, batch: int, ttft_ms: float, tpot_ms: float
) -> None:
    case = UseCase(
        title="any", prompt_tokens=prompt, output_tokens=output, beams=beams, ttft_ms=ttft_ms, tpot_ms=tpot_ms
    )
    asked = PlatformQuestion(spec=resolve(name).spec, use_case=case, batch=batch)
    plan = plan_platform(asked)
    assert late(asked, plan) == pytest.approx(1.0, rel=1e-9)
    assert late(asked, plan, 0.99, 0.99) > 1.005
    assert 1.0 <= plan.factor <= 2.0
    assert max(plan.ttft_s * 1e3 / ttft_ms, plan.tpot_s * 1e3 / tpot_ms) == pytest.approx(1.0, rel=1e-9)


def test_links_have_their_share_and_their_latency() -> None:
    asked = question(devices=8)
    plan = plan_platform(asked)
    assert plan.link_bytes_per_s is not None
    assert late(asked, plan) <= 1.0 + 1e-9
    assert plan_platform(question(devices=8, link_share=0.4)).link_bytes_per_s < plan.link_bytes_per_s  # type: ignore[operator]
    assert plan.most_hop_ns is not None
    too_slow = plan_platform(question(devices=8, link_latency_ns=plan.most_hop_ns))
    assert too_slow.link_bytes_per_s is None
    alone = plan_platform(question())
    assert (alone.link_bytes_per_s, alone.most_hop_ns) == (0.0, None)
    assert alone.flops_per_s < plan.flops_per_s, "without collectives the whole limit is for the rest"


def test_capacity_is_weights_and_kv_of_every_beam() -> None:
    plan = plan_platform(question("llama-3.1-8b", "qa", batch=3))
    spec = catalog.model("llama-3.1-8b")
    assert plan.weight_bytes == weight_bytes(spec, "bf16").total
    assert plan.kv_bytes == 3 * (1000 + 4 * 200) * kv_bytes_per_token(spec)
    assert plan.memory_bytes == plan.weight_bytes + plan.kv_bytes
    halved = plan_platform(question("llama-3.1-8b", "qa", batch=3, kv_format="fp8"))
    assert 2 * halved.kv_bytes == plan.kv_bytes


@pytest.mark.parametrize("case", sorted(use_cases()))
def test_needs_grow_with_models_beyond_a_hundred_trillion(case: str) -> None:
    plans = [plan_platform(question(name, case)) for name in ("llama-3.1-8b", "dense:1T", "dense:100T", "dense:500T")]
    for less, more in itertools.pairwise(plans):
        assert more.flops_per_s > less.flops_per_s
        assert more.memory_bytes_per_s > less.memory_bytes_per_s
        assert more.memory_bytes > less.memory_bytes
    assert plans[-1].parameters > 400e12


def test_a_count_of_devices_has_what_is_needed_and_one_less_has_not() -> None:
    plan = plan_platform(question())
    for one in device_counts(plan, "bf16", list(catalog.devices().values())):
        device = catalog.device(one.device)
        have = {
            "capacity": 0.9 * device.memory_bytes / plan.memory_bytes,
            "memory bandwidth": device.achievable.memory * device.memory_bytes_per_s / plan.memory_bytes_per_s,
        }
        assert all(share * one.count >= 1.0 for share in have.values())
        if one.binds in have:
            assert have[one.binds] * (one.count - 1) < 1.0
        assert one.most >= one.count
        assert one.most <= math.ceil(one.count * (1 + 2 * device.achievable.residual))
        assert one.within_a_node == (one.count <= device.max_group)


@pytest.mark.parametrize(("name", "wanted"), [("dense:5T", 5e12), ("moe:10T", 10e12), ("dense:70B", 70e9)])
def test_a_hypothetical_model_has_about_the_size_and_the_proportions(name: str, wanted: float) -> None:
    spec = hypothetical(name)
    assert count(spec).total == pytest.approx(wanted, rel=0.15)
    assert spec.num_heads % spec.num_kv_heads == 0
    assert spec.hidden == spec.num_heads * spec.head_dim
    assert spec.ffn == 4 * spec.hidden
    assert bool(spec.num_experts) == name.startswith("moe")


def test_the_published_hypothetical_model_is_among_them() -> None:
    """SuperLLM-5T-Dense: 128 layers of 49,152, 192 heads, 24 KV heads; 4.4T of it in layers."""
    spec = next(spec for size in range(40, 50) if (spec := hypothetical(f"dense:{size / 10}T")).num_kv_heads == 24)
    assert (spec.num_layers, spec.hidden, spec.num_heads) == (128, 49_152, 192)


@pytest.mark.parametrize("name", ["dense:", "moe:12", "dense:0.1B", "dense:200000T", "dense:-1T"])
def test_a_size_that_means_nothing_is_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        hypothetical(name)


def test_the_verb_answers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEGALITH_HOME", str(tmp_path))
    assert run(shlex.split("plan platform dense:100T --use-case qa --format fp8")) == 0
    out = capsys.readouterr().out
    assert "predicted" in out
    assert "PB/s" in out
    tokens = "plan platform llama-3.1-8b --prompt 500 --slo ttft=100ms,tpot=20ms --devices 2 --device h100 --json"
    assert run(shlex.split(tokens)) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["plan"]["use_case"]["ttft_ms"] == 100
    assert [one["device"] for one in answer["devices"]] == ["h100-sxm"]
    assert answer["memory_bytes"] == answer["plan"]["weight_bytes"] + answer["plan"]["kv_bytes"]


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ("plan platform llama-3.1-8b --use-case chatt", "chat"),
        ("plan platform llama-3.1-8b --slo e2e=1s", "ttft=200ms"),
        ("plan platform llama-3.1-8b --slo ttft=2x", "ttft=200ms"),
        ("plan platform llama-3.1-8b --devices 3", "32 heads"),
        ("plan platform llama-3.1-8b --batch 0", "at least 1"),
        ("plan platform llama-3.1-8b --prompt 0", "above zero"),
        ("plan platform llama-3.1-8b --devices 2 --link-share 1", "between 0 and 1"),
        ("plan platform dense:lots", "dense:100T"),
    ],
)
def test_mistakes_name_what_works(tokens: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(shlex.split(tokens)) in (1, 2)
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err
