"""Ranks planned before anything is loaded: the memory of TPI-LLM's 70B, and what decides a step."""

from __future__ import annotations

import msgspec
import pytest

from megalith.base.errors import ConfigError
from megalith.cost.collective import Link
from megalith.plan import machine
from megalith.plan.tensor_parallel import RanksQuestion, held_bytes, layer_bytes, plan_ranks, window_bytes
from megalith.plan.tensor_parallel_explain import memory_table, step_lines
from megalith.specs import catalog

LLAMA = RanksQuestion(
    spec=catalog.model("llama-2-70b"), profile=machine.here("torch-cpu"), ranks=8, window_blocks=2,
    link=Link(latency_ns=1_000_000, bytes_per_s=125_000_000), disk_bytes_per_s=1_000_000_000,
)  # fmt: skip


def changed(**changes: object) -> RanksQuestion:
    return msgspec.structs.replace(LLAMA, **changes)


def test_seventy_billion_weights_need_about_three_gigabytes_on_a_device() -> None:
    plan = plan_ranks(LLAMA)
    assert plan.memory[0].num_bytes == pytest.approx(3.1e9, rel=0.1)  # the publication's figure
    assert plan.memory[1].num_bytes < 1e9
    assert plan.weight_bytes > 80 * plan.memory[0].num_bytes
    block = plan.memory[0].lines[0].num_bytes
    assert block == 4 * (3 * 8192 * 28_672 + 2 * 8192 * 9216) // 8
    whole = plan_ranks(changed(window_blocks=0))
    assert whole.memory[0].num_bytes > 34e9, "the control: without a window"
    assert whole.stream_bytes == 0


def test_a_step_is_the_longer_of_disk_and_of_compute_and_links() -> None:
    slow = plan_ranks(LLAMA)
    assert slow.step_ns == slow.disk_ns == layer_bytes(LLAMA), "a byte each nanosecond"
    fast = plan_ranks(changed(disk_bytes_per_s=10**15))
    assert fast.step_ns == fast.compute_ns + fast.link_ns
    assert fast.link_ns > 2 * 80 * 2 * 1_000_000
    ring = plan_ranks(changed(collective="ring"))
    assert ring.link_ns > 2 * fast.link_ns, "14 hops for two at a latency beyond the crossover"
    assert slow.crossover_ns is not None
    assert slow.crossover_ns < 1_000_000


def test_kv_heads_that_are_repeated_and_windows_that_hold_everything() -> None:
    assert layer_bytes(changed(ranks=16)) > layer_bytes(LLAMA) / 2, "k and v are on two ranks each"
    assert window_bytes(changed(window_blocks=160)) == layer_bytes(LLAMA) == window_bytes(changed(window_blocks=0))
    assert held_bytes(LLAMA) == pytest.approx(8 * 428e6 + 2 * 1.05e9 + 7 * 384 * 2**20, rel=0.02)
    with pytest.raises(ConfigError, match="64 heads and 8 KV heads cannot be cut over 3"):
        plan_ranks(changed(ranks=3))


def test_one_and_two_ranks_have_words_too() -> None:
    for ranks, says in ((1, None), (2, "two hops each"), (8, "faster by the star")):
        plan = plan_ranks(changed(ranks=ranks))
        text = " ".join(step_lines(plan))
        assert says is None or says in text
        assert len(memory_table(plan).columns) == (3 if ranks == 1 else 4)
