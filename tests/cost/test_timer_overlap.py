"""OverlapTimer: exact lines, never slower than its base but for the late token, clocks, stragglers, power."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.cost import timer_overlap
from megalith.cost.timer import Prompt
from megalith.cost.timer_choice import choose_timer
from megalith.cost.timer_overlap import OverlapTimer
from megalith.cost.timer_published import published

BASES = {kind: choose_timer(kind, "llama-2-70b", "a100-80gb", 8) for kind in ("analytic", "operators")}
TIMERS = {kind: OverlapTimer(base) for kind, base in BASES.items()}


@pytest.fixture(autouse=True, scope="module")
def _few_corners() -> Iterator[None]:
    """A coarser grid: what is tested here holds on any, and every corner is a search."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timer_overlap, "ROWS", (256, 1024, 2048))
        patch.setattr(timer_overlap, "PARTS", 2)
        patch.setattr(timer_overlap, "CONTEXTS", (0, 1024, 4096))
        patch.setattr(timer_overlap, "_KNOWN", {})
        yield


KIND = st.sampled_from(["analytic"])


@settings(max_examples=60, deadline=None)
@given(KIND, st.integers(1, 1_000), st.integers(0, 2_200), st.integers(0, 999), st.data())
def test_a_line_is_its_steps(kind: str, decodes: int, context: int, odd: int, data: st.DataObject) -> None:
    timer, total = TIMERS[kind], decodes * context + odd % decodes
    line = timer.decode_line(decodes, total, context + 1)
    assert line.steps >= 1
    ahead = data.draw(st.sampled_from([0, 1, min(line.steps, 10**6) - 1, min(line.steps, 10**6) // 2]))
    ahead = min(ahead, line.steps - 1)
    step = timer.step_ps((), decodes, total + ahead * decodes, context + 1 + ahead)
    assert line.first_ps + ahead * line.slope_ps == step > 0


@settings(max_examples=40, deadline=None)
@given(KIND, st.integers(0, 500), st.integers(0, 2_000), st.integers(0, 500))
def test_it_is_never_slower_and_never_faster_than_the_work(kind: str, decodes: int, context: int, rows: int) -> None:
    prompts = [Prompt(rows, 100, False)] if rows > 1 else []
    if not decodes and not prompts:
        return
    base, timer = BASES[kind], TIMERS[kind]
    step = timer.step_ps(prompts, decodes, decodes * context, context)
    plain = base.step_ps(prompts, decodes, decodes * context, context)
    assert 0.6 * plain < step <= plain
    if decodes + rows < 256:
        assert step == plain


def test_a_full_step_gains_what_the_search_says() -> None:
    prompts = [Prompt(1024, 0, False)]
    base, timer = (each["analytic"].step_ps(prompts, 1024, 1024 * 1024, 1100) for each in (BASES, TIMERS))
    assert 1.1 < base / timer < 1.3


def test_savings_have_no_jumps_between_pieces() -> None:
    timer = TIMERS["analytic"]
    for context in timer_overlap.CONTEXTS[1:]:
        before, after = (timer.saving_ps(900, 900, 900 * context - 1 + more) for more in (0, 1))
        assert after == pytest.approx(before, rel=1e-3, abs=10**6)


def test_one_token_too_many_is_charged_once_a_request() -> None:
    timer, base = TIMERS["analytic"], BASES["analytic"]
    ends, goes_on = [Prompt(300, 0, True)], [Prompt(300, 0, False)]
    late = timer.step_ps(ends, 500, 500 * 600, 900) - timer.step_ps(goes_on, 500, 500 * 600, 900)
    head = base.step_ps(ends, 500, 500 * 600, 900) - base.step_ps(goes_on, 500, 500 * 600, 900)
    token = base.step_ps(goes_on, 501, 500 * 600 + 300, 900) - base.step_ps(goes_on, 500, 500 * 600, 900)
    # The head's weights are read once whoever asks; of the late token its own logits are all that may differ.
    assert late == pytest.approx(head + token, rel=0.1)
    assert late > head


def test_a_decode_that_comes_as_a_prompt_is_not_charged() -> None:
    timer, base = TIMERS["analytic"], BASES["analytic"]
    step = [Prompt(1, 700, True)]
    assert timer.step_ps(step, 20, 20 * 700, 700) == base.step_ps(step, 20, 20 * 700, 700)


def test_stragglers_and_clocks() -> None:
    timer, base = TIMERS["analytic"], BASES["analytic"]
    step = ([Prompt(1024, 0, False)], 1024, 1024 * 1024, 1100)
    assert timer.scaled(2.0).step_ps(*step) == pytest.approx(2 * timer.step_ps(*step), rel=1e-4)
    low = timer.at_clock(0.8)
    assert timer.step_ps(*step) < low.step_ps(*step) <= base.at_clock(0.8).step_ps(*step)
    assert low.at_clock(1.0).step_ps(*step) == timer.step_ps(*step)
    both = timer.scaled(2.0).at_clock(0.8).step_ps(*step)
    assert both == pytest.approx(timer.at_clock(0.8).scaled(2.0).step_ps(*step), rel=2e-2)
    line = timer.scaled(1.7).decode_line(600, 600 * 300, 400)
    assert line.first_ps + 3 * line.slope_ps == timer.scaled(1.7).step_ps((), 600, 600 * 303, 403)


def test_it_draws_more_power() -> None:
    base, timer = BASES["analytic"].power_w(), TIMERS["analytic"].power_w()
    assert base.prompt_w < timer.prompt_w <= 400.0
    assert (timer.idle_w, timer.decode_w) == (base.idle_w, base.decode_w)
    low = TIMERS["analytic"].at_clock(0.8).power_w()
    assert low.prompt_w - low.idle_w == pytest.approx((timer.prompt_w - timer.idle_w) * 0.8**2.2)


def test_it_needs_operators() -> None:
    with pytest.raises(ConfigError, match="none can overlap"):
        OverlapTimer(published("llumnix-7b").timer())
