"""LinearTimer: lines equal steps, chunks cost what wholes cost, published figures come out as printed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.cost.timer import Prompt
from megalith.cost.timer_linear import DecodeTerms, LinearTimer, PromptTerms
from megalith.cost.timer_phases import PhasePower
from megalith.cost.timer_published import published, published_timers
from megalith.specs import catalog

MS = 1_000_000_000
NAMES = st.sampled_from(sorted(published_timers()))
FACTORS = st.sampled_from([1.0, 0.7, 1.5, 3.0])
CLOCKS = st.sampled_from([1.0, 1275 / 1410, 0.5])


@given(NAMES, st.integers(1, 300), st.integers(0, 200_000), st.integers(0, 400), FACTORS, CLOCKS)
def test_a_line_is_its_steps(name: str, decodes: int, context: int, ahead: int, factor: float, clock: float) -> None:
    timer = published(name).timer().scaled(factor).at_clock(clock)
    line = timer.decode_line(decodes, context, context)
    assert ahead < line.steps
    assert line.first_ps + ahead * line.slope_ps == timer.step_ps(
        (), decodes, context + ahead * decodes, context + ahead
    )


@given(NAMES, st.lists(st.integers(0, 9_000), min_size=1, max_size=40))
def test_decodes_may_come_as_prompts_of_one_token(name: str, contexts: list[int]) -> None:
    timer = published(name).timer()
    chunks = [Prompt(1, context, True) for context in contexts]
    count = len(contexts) // 2
    all_in = timer.step_ps((), len(contexts), sum(contexts), max(contexts))
    assert timer.step_ps(chunks, 0, 0, 0) == all_in
    assert timer.step_ps(chunks[count:], count, sum(contexts[:count]), max(contexts)) == all_in


@given(st.integers(2, 5_000), st.integers(2, 5_000))
def test_chunks_cost_the_squares_of_the_whole(first: int, second: int) -> None:
    timer = LinearTimer(PromptTerms(0, 7, 3), DecodeTerms(1, 0, 0))
    cut = timer.step_ps([Prompt(first, 0, False)], 0, 0, 0) + timer.step_ps([Prompt(second, first, True)], 0, 0, 0)
    assert cut == timer.step_ps([Prompt(first + second, 0, True)], 0, 0, 0)


def test_llumnix_as_printed() -> None:
    timer = published("llumnix-7b").timer()
    assert timer.step_ps([Prompt(1000, 0, True)], 0, 0, 0) == 260 * MS
    assert timer.step_ps((), 10, 5_000, 900) == 36 * MS


def test_distserve_as_printed_in_both_regimes() -> None:
    timer = published("distserve-opt-13b-tp1").timer()
    assert timer.step_ps([Prompt(512, 0, True)], 0, 0, 0) == round((18.10 + 0.10191 * 512 + 7.12e-6 * 512**2) * MS)
    assert timer.step_ps((), 94, 40_000, 900) == round((19.93 + 6.27e-4 * 40_000 + 0.0385 * 94) * MS)
    assert timer.step_ps((), 95, 40_000, 900) == round((7.17 + 5.80e-4 * 40_000 + 0.158 * 95) * MS)


def test_a_mixed_step_reads_the_weights_once() -> None:
    timer = LinearTimer(PromptTerms(20, 2), DecodeTerms(25, 3, 1), step_ps=100)
    assert timer.step_ps([Prompt(10, 0, True)], 4, 50, 20) == 100 + 25 + 20 + 4 * 3 + 50
    assert timer.step_ps([Prompt(10, 0, True)], 0, 0, 0) == 100 + 20 + 20


def test_published_timers_name_catalogue_entries() -> None:
    for timer in published_timers().values():
        assert catalog.model(timer.model).num_heads % timer.tensor_parallel == 0
        assert catalog.device(timer.device).name == timer.device


def test_scaling_and_clocks_are_taken_from_the_original() -> None:
    timer = LinearTimer(PromptTerms(1000, 100), DecodeTerms(1000, 100, 10), 500, power=PhasePower(60.0, 400.0, 250.0))
    slow = timer.scaled(2.0)
    assert slow.step_ps((), 3, 7, 4) == 2 * timer.step_ps((), 3, 7, 4)
    assert slow.scaled(0.5).step_ps((), 3, 7, 4) == timer.step_ps((), 3, 7, 4)
    half = timer.at_clock(0.5)
    assert half.step_ps([Prompt(10, 0, True)], 0, 0, 0) == 500 + 2 * 2000
    assert half.step_ps((), 1, 0, 0) == 500 + round(1.15 * 1000) + round(1.15 * 100)
    assert half.at_clock(1.0).step_ps((), 3, 7, 4) == timer.step_ps((), 3, 7, 4)
    assert half.power_w(2.0) == PhasePower(60.0, 60.0 + 340.0 / 4, 60.0 + 190.0 / 4)


def test_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="no time"):
        LinearTimer(PromptTerms(0, 0), DecodeTerms(1, 1, 1))
    with pytest.raises(ConfigError, match="ascending"):
        LinearTimer(
            PromptTerms(1, 1), DecodeTerms(1, 1, 1), regimes=[(9, DecodeTerms(1, 1, 1)), (4, DecodeTerms(1, 1, 1))]
        )
    with pytest.raises(ConfigError, match="llumnix-7b"):
        published("llumnix-7")
    with pytest.raises(ConfigError, match="fraction"):
        published("llumnix-7b").timer().at_clock(1.5)
    with pytest.raises(ConfigError, match="power"):
        published("llumnix-7b").timer().power_w()
