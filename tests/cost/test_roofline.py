"""GenZ's roofline: equal to the released tables, additive, monotone, and right where a group or a mask comes in."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.cost import roofline
from megalith.cost.parameters import chunk_pairs, count
from megalith.cost.roofline import PLANNED, Platform, all_reduce_s, decode, layer_operators, model_operators, prefill
from megalith.specs import catalog
from megalith.specs.published_roofline import published_tables

DEVICE = Platform(300e12, 1.2e12)


@pytest.mark.parametrize("name", sorted(published_tables()))
def test_flops_and_bytes_of_every_released_operator(name: str) -> None:
    table = published_tables()[name]
    work = decode(table.prompt_tokens, table.generated) if table.generated else prefill(table.prompt_tokens)
    ours = sorted(
        (one.flops, one.num_bytes + one.chip_bytes) for one in layer_operators(catalog.model(table.model), work)
    )
    theirs = sorted((one.flops, one.mebibytes * 2**20) for one in table.operators)
    assert len(ours) == len(theirs)
    for mine, released in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(released, rel=1e-12)


def test_a_decode_reads_every_weight_once_and_its_cache() -> None:
    spec = catalog.model("llama-3.1-8b")
    one, two = (
        sum(operator.num_bytes * times for operator, times in model_operators(spec, decode(tokens, 0)))
        for tokens in (1000, 2000)
    )
    assert two - one == 1000 * 131_072
    weights = count(spec)
    read = 2 * (weights.attention + weights.ffn + weights.head)
    assert one == pytest.approx(read + 1000 * 131_072, rel=1e-3)


def test_masked_pairs_are_left_out_for_plans() -> None:
    spec = catalog.model("llama-3.1-8b")
    scores = next(one for one in layer_operators(spec, prefill(100), habits=PLANNED) if one.name == "scores")
    assert scores.flops * spec.num_layers == 2 * spec.num_heads * spec.head_dim * chunk_pairs(spec, 100, 0)
    whole = next(one for one in layer_operators(spec, prefill(100)) if one.name == "scores")
    assert whole.flops == 2 * spec.num_heads * spec.head_dim * 100 * 100


def test_beams_share_the_prompt_and_have_answers_of_their_own() -> None:
    spec = catalog.model("llama-3.1-8b")
    by_name = {one.name: one for one in layer_operators(spec, decode(1000, 50, beams=4))}
    alone = {one.name: one for one in layer_operators(spec, decode(1000, 50))}
    assert by_name["scores prompt"].num_bytes == alone["scores prompt"].num_bytes
    assert by_name["scores answer"].num_bytes == 4 * alone["scores answer"].num_bytes
    assert by_name["scores prompt"].flops == 4 * alone["scores prompt"].flops


def test_experts_are_the_distinct_ones() -> None:
    spec = catalog.model("mixtral-8x7b")
    up = {rows: next(one for one in layer_operators(spec, prefill(rows)) if one.name == "up") for rows in (1, 4096)}
    expert = 2 * 2 * spec.hidden * spec.ffn
    assert up[1].num_bytes == pytest.approx(2 * expert, rel=1e-2)
    assert up[4096].num_bytes >= 8 * expert
    assert up[4096].flops == pytest.approx(4096 * up[1].flops)


def test_a_ring_is_start_hops_and_bytes() -> None:
    platform = Platform(1.0, 1.0, link_bytes_per_s=1e9, link_latency_s=1e-6, ring_start_s=5e-6)
    assert all_reduce_s(4e6, 4, platform) == pytest.approx(5e-6 + 6 * (1e-6 + 1e-3))
    assert all_reduce_s(4e6, 1, platform) == 0.0
    names = [one.name for one in layer_operators(catalog.model("llama-2-7b"), prefill(8), devices=2)]
    assert [name for name in names if "all-reduce" in name] == ["attention all-reduce", "FFN all-reduce"]


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 50_000), more=st.integers(1, 50_000), devices=st.sampled_from([1, 2, 4, 8]), of=st.booleans()
)
def test_more_context_is_never_cheaper_and_more_devices_never_dearer(
    tokens: int, more: int, devices: int, of: bool
) -> None:
    spec = catalog.model("llama-3.1-70b")

    def seconds(tokens: int, devices: int = 1) -> float:
        work = decode(tokens, 10) if of else prefill(tokens)
        # An endless link costs its start alone, which is taken away here.
        platform = Platform(DEVICE.flops_per_s, DEVICE.memory_bytes_per_s, ring_start_s=0.0)
        return roofline.pass_cost(model_operators(spec, work, devices), platform, devices).seconds

    assert seconds(tokens + more) > seconds(tokens)
    assert seconds(tokens, devices) <= seconds(tokens)


def test_what_binds() -> None:
    assert roofline.operator_cost(roofline.Operator("a", 1e15, 1.0), DEVICE).binding == "compute"
    assert roofline.operator_cost(roofline.Operator("a", 1.0, 1e15), DEVICE).binding == "memory"
    linked = Platform(1e12, 1e12, link_bytes_per_s=1e9)
    assert roofline.operator_cost(roofline.Operator("a", 0.0, 0.0, payload_bytes=1e6), linked, 2).binding == "links"
