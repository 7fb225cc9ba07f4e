"""Lowering: a layer's operators add up to the timer's own step; cuts leave nothing out and are never free."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.cost.lowering import KINDS, StepWork, layer_costs, pieces, sequential, sequential_ps
from megalith.cost.timer import Prompt
from megalith.cost.timer_choice import choose_timer
from megalith.cost.timer_phases import DeviceTimer
from megalith.cost.timer_published import published

CASES = [
    ("analytic", "llama-2-70b", "a100-80gb", 8), ("operators", "llama-2-70b", "a100-80gb", 8),
    ("analytic", "mixtral-8x7b", "h200", 4), ("analytic", "llama-3.1-8b", "h100-sxm", 1),
    ("operators", "llama-3.1-8b", "h100-sxm", 1),
]  # fmt: skip
TIMERS: dict[tuple[str, str, str, int], DeviceTimer] = {case: choose_timer(*case) for case in CASES}
CASE = st.sampled_from(CASES)
PROMPTS = st.lists(st.builds(Prompt, st.integers(2, 1_000), st.integers(0, 3_000), st.booleans()), max_size=4)


@settings(max_examples=60, deadline=None)
@given(CASE, st.integers(0, 600), st.integers(0, 3_000), PROMPTS)
def test_one_operator_after_the_other_is_the_timers_step(
    case: tuple[str, str, str, int], decodes: int, context: int, prompts: list[Prompt]
) -> None:
    if not decodes and not prompts:
        return
    timer, work = TIMERS[case], StepWork(decodes, decodes * context, tuple(prompts))
    step = timer.step_ps(prompts, decodes, decodes * context, context)
    assert sequential_ps(layer_costs(timer), work) == pytest.approx(step, rel=2e-3)


@settings(max_examples=40, deadline=None)
@given(CASE, st.integers(1, 600), st.integers(0, 900), st.lists(st.integers(1, 1_000), max_size=3))
def test_cuts_keep_every_row_and_are_never_free(
    case: tuple[str, str, str, int], decodes: int, prompt: int, inner: list[int]
) -> None:
    costs = layer_costs(TIMERS[case])
    work = StepWork(decodes, decodes * 500, (Prompt(prompt, 0, True),) if prompt else ())
    cuts = sorted({0, work.rows, *[cut for cut in inner if cut < work.rows]})
    whole = {piece.kind: piece for piece in sequential(costs, work)}
    for kind in KINDS:
        parts = pieces(costs, work, kind, cuts)
        if not parts:
            assert kind not in whole
            continue
        assert [part.rows[0] for part in parts[1:]] == [part.rows[1] for part in parts[:-1]]
        assert (parts[0].rows[0], parts[-1].rows[1]) == whole[kind].rows
        if kind in ("o", "reduce", "gather") and case[0] == "analytic":
            assert sum(part.duration_ps for part in parts) >= whole[kind].duration_ps - len(parts)


def test_a_product_of_half_the_rows_reads_all_weights() -> None:
    costs = layer_costs(TIMERS[CASES[0]])
    work = StepWork(2048, 0)
    (whole,), halves = pieces(costs, work, "up", (0, 2048)), pieces(costs, work, "up", (0, 1024, 2048))
    assert halves[0].compute_ps == pytest.approx(whole.compute_ps / 2)
    assert halves[0].memory_ps > 0.7 * whole.memory_ps


def test_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="knows how long whole steps take"):
        layer_costs(published("llumnix-7b").timer())
    with pytest.raises(ConfigError, match="does not cut 10 rows"):
        pieces(layer_costs(TIMERS[CASES[0]]), StepWork(10, 100), "o", (0, 5))
