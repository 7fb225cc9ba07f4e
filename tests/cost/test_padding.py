"""Padding: a rectangle costs what its rows cost, and the same where nothing is padded."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.cost.compute import CostModel
from megalith.cost.memory import weight_bytes
from megalith.cost.padding import PaddedStages, attention_flops, linear_flops, pad, padded, waste
from megalith.cost.profile import from_device
from megalith.cost.timer import Prompt
from megalith.cost.timer_analytic import AnalyticTimer
from megalith.cost.timer_stages import LinkedTimer, SendingTimer
from megalith.cost.timer_vidur import StagedTimer, vidur_for
from megalith.specs import catalog

SPEC = catalog.model("opt-13b")
INNER = AnalyticTimer(CostModel(SPEC, from_device(catalog.device("a100-80gb")), weight_bytes(SPEC, "bf16")))
lengths = st.lists(st.integers(1, 300), min_size=1, max_size=12)


@given(lengths)
def test_flops_of_a_rectangle_are_b_times_the_longest(batch: list[int]) -> None:
    real = [Prompt(tokens, 0, True) for tokens in batch]
    counted = linear_flops(SPEC, padded(real)) * sum(batch)
    assert counted == linear_flops(SPEC, real) * len(batch) * max(batch)
    assert waste(batch) == len(batch) * max(batch) / sum(batch)
    assert attention_flops(SPEC, padded(real)) >= attention_flops(SPEC, real)


@settings(deadline=None)
@given(lengths, st.integers(0, 8), st.integers(1, 900))
def test_never_faster_than_packed_and_the_same_when_all_are_equal(batch: list[int], decodes: int, longest: int) -> None:
    timer, total = pad(INNER), decodes * longest
    prompts = [Prompt(tokens, 0, True) for tokens in batch]
    sparse = sum(max(1, longest - 13 * row) for row in range(decodes))
    assert timer.step_ps(prompts, decodes, sparse, longest) >= INNER.step_ps(prompts, decodes, sparse, longest)
    same = [Prompt(max(batch), 0, True) for _ in batch]
    assert timer.step_ps(same, decodes, total, longest) == INNER.step_ps(same, decodes, total, longest)


@settings(deadline=None)
@given(st.integers(1, 16), st.integers(1, 900), st.integers(0, 400))
def test_lines_are_steps(decodes: int, longest: int, step: int) -> None:
    timer = pad(INNER)
    line = timer.decode_line(decodes, decodes + longest - 1, longest)
    later = timer.step_ps((), decodes, decodes + longest - 1 + step * decodes, longest + step)
    assert step < line.steps
    assert line.first_ps + step * line.slope_ps == later


def test_stages_are_padded_where_the_timer_knows_them() -> None:
    prompts = [Prompt(10, 0, True), Prompt(100, 0, True)]
    vidur = vidur_for("llama-2-70b", "a100-80gb", 2, "").timer(2)
    both = pad(vidur)
    assert isinstance(both, PaddedStages)
    assert isinstance(both, StagedTimer)
    assert both.stages_ps(prompts, 0, 0, 0) == vidur.stages_ps(padded(prompts), 0, 0, 0)
    linked = LinkedTimer(INNER, 4, 1000, 1e9, 5.0)
    joined = pad(linked)
    assert isinstance(joined, SendingTimer)
    stages, send_ps = joined.parts_ps(prompts, 0, 0, 0)
    assert sum(stages) == INNER.step_ps(padded(prompts), 0, 0, 0)
    assert send_ps == 200 * 1_000_000 + 5_000
    assert not isinstance(pad(INNER), StagedTimer)
    assert joined.scaled(2.0).step_ps(prompts, 0, 0, 0) > joined.step_ps(prompts, 0, 0, 0)


def test_a_linked_timers_lines_are_steps() -> None:
    linked = LinkedTimer(INNER, 4, 10_000, 1e9, 5_000.0)
    line = linked.decode_line(7, 700, 130)
    assert line.first_ps == linked.step_ps((), 7, 700, 130)
    assert line.first_ps + 3 * line.slope_ps == linked.step_ps((), 7, 721, 133)
    assert linked.at_clock(0.5).parts_ps((), 7, 700, 130)[1] == linked.parts_ps((), 7, 700, 130)[1]
