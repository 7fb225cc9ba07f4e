"""AnalyticTimer: the CostModel's times as exact lines, bounded memory, slower clocks, power."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.cost import timer_analytic
from megalith.cost.compute import CostModel
from megalith.cost.memory import weight_bytes
from megalith.cost.profile import from_device
from megalith.cost.timer import PS_PER_NS, Prompt
from megalith.cost.timer_analytic import AnalyticTimer
from megalith.specs import catalog

CASES = [
    ("llama-3.1-8b", "h100-sxm", 1), ("llama-3.1-70b", "a100-80gb", 4), ("gemma-3-27b", "b200", 2),
    ("mixtral-8x7b", "h200", 8), ("opt-13b", "l40s", 1), ("gemma-3-1b", "l4", 1),
]  # fmt: skip


def timer_of(name: str, device: str, devices: int) -> AnalyticTimer:
    spec = catalog.model(name)
    return AnalyticTimer(
        CostModel(spec, from_device(catalog.device(device)), weight_bytes(spec, "bf16"), devices=devices)
    )


TIMERS = {case: timer_of(*case) for case in CASES}
CASE = st.sampled_from(CASES)
CHUNKS = st.lists(st.builds(Prompt, st.integers(1, 3_000), st.integers(0, 9_000), st.booleans()), max_size=6)


@given(CASE, st.lists(st.integers(0, 40_000), min_size=1, max_size=40), st.data())
def test_a_line_is_its_steps(case: tuple[str, str, int], contexts: list[int], data: st.DataObject) -> None:
    timer, count = TIMERS[case], len(contexts)
    line = timer.decode_line(count, sum(contexts), max(contexts))
    assert line.steps >= 1
    ahead = data.draw(st.integers(0, min(line.steps, 100_000) - 1))
    step = timer.step_ps((), count, sum(contexts) + ahead * count, max(contexts) + ahead)
    assert line.first_ps + ahead * line.slope_ps == step


@given(CASE, CHUNKS, st.integers(0, 64), st.integers(0, 30_000))
def test_it_is_the_cost_model(case: tuple[str, str, int], chunks: list[Prompt], decodes: int, context: int) -> None:
    """Equal contexts, so that a window caps the mean as it caps each. Within rounding: 0.1 % and a few nanoseconds."""
    if not chunks and not decodes:
        return
    timer = TIMERS[case]
    shape = timer.cost.shape(
        [*[(1, context)] * decodes, *[(chunk.new_tokens, chunk.context_tokens) for chunk in chunks]],
        outputs=decodes + sum(chunk.samples for chunk in chunks),
    )
    step = timer.step_ps(chunks, decodes, decodes * context, context)
    assert step / PS_PER_NS == pytest.approx(timer.cost.step(shape).duration_ns, rel=1e-3, abs=10)


@given(CASE, CHUNKS, st.integers(1, 200), st.integers(0, 900_000), st.integers(1, 999), st.integers(1, 99))
def test_more_takes_no_less(
    case: tuple[str, str, int], chunks: list[Prompt], decodes: int, context: int, more: int, deeper: int
) -> None:
    timer = TIMERS[case]
    step = timer.step_ps(chunks, decodes, context, context)
    assert step > 0
    assert timer.step_ps(chunks, decodes, context + more, context + more) >= step
    assert timer.step_ps(chunks, decodes + 1, context + more, context + more) >= step
    assert timer.step_ps([*chunks, Prompt(more, 0, False)], decodes, context, context) >= step
    # A chunk of one token counts as a decode, whose reading no computing hides; the step from one to two may save that.
    if chunks and chunks[0].new_tokens > 1:
        longer = [chunks[0]._replace(new_tokens=chunks[0].new_tokens + more), *chunks[1:]]
        assert timer.step_ps(longer, decodes, context, context) >= step
        after = [chunks[0]._replace(context_tokens=chunks[0].context_tokens + deeper), *chunks[1:]]
        assert timer.step_ps(after, decodes, context, context) >= step


@given(st.integers(1, 60), st.integers(0, 5_000))
def test_windows_bend_the_line_where_the_mean_fills_them(decodes: int, context: int) -> None:
    timer = TIMERS[("gemma-3-27b", "b200", 2)]
    window = catalog.model("gemma-3-27b").sliding_window
    assert window is not None
    line = timer.decode_line(decodes, decodes * context, context)
    if context + 1 < window:
        assert line.steps == window - context
        bent = timer.decode_line(decodes, decodes * (window - 1), window - 1)
        assert bent.slope_ps < line.slope_ps
    else:
        assert line.steps > 1 << 40


@settings(max_examples=20)
@given(CASE, st.lists(st.integers(0, 9_000), min_size=2, max_size=40))
def test_uneven_contexts_are_never_too_fast(case: tuple[str, str, int], contexts: list[int]) -> None:
    timer = TIMERS[case]
    exact = timer.cost.step(timer.cost.shape([(1, context) for context in contexts])).duration_ns
    assert timer.step_ps((), len(contexts), sum(contexts), max(contexts)) / PS_PER_NS >= exact * 0.999 - 10


@given(CASE, st.lists(st.integers(0, 9_000), min_size=1, max_size=20))
def test_decodes_may_come_as_prompts_of_one_token(case: tuple[str, str, int], contexts: list[int]) -> None:
    timer = TIMERS[case]
    chunks = [Prompt(1, context, True) for context in contexts]
    together = timer.step_ps((), len(contexts), sum(contexts), max(contexts))
    alone = timer.step_ps(chunks, 0, 0, 0)
    assert alone == together if not timer.cost.spec.sliding_window else alone <= together


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timer_analytic, "MAX_MEMO", 50)
    timer = timer_of("llama-3.1-8b", "h100-sxm", 1)
    expected = [timer.step_ps([Prompt(rows, 0, True)], rows, 9, 9) for rows in range(1, 400)]
    for memory in (timer._row_ps, timer._head_ps, timer._decode_ps):
        assert len(memory) <= 50
    assert [timer.step_ps([Prompt(rows, 0, True)], rows, 9, 9) for rows in range(1, 400)] == expected


def test_a_straggler_takes_longer_by_its_factor() -> None:
    timer = TIMERS[("llama-3.1-8b", "h100-sxm", 1)]
    slow = timer.scaled(2.5)
    for step in (((), 20, 9_000, 800), ([Prompt(700, 300, True)], 4, 100, 50)):
        assert slow.step_ps(*step) == pytest.approx(2.5 * timer.step_ps(*step), rel=1e-4)
    assert slow.scaled(0.4).step_ps((), 20, 9_000, 800) == timer.step_ps((), 20, 9_000, 800)


@pytest.mark.parametrize(("megahertz", "most"), [(1275, 0.03), (1110, 0.07)])
def test_a_lower_clock_costs_what_polca_measured(megahertz: int, most: float) -> None:
    """BLOOM-176B on eight A100, 2,048 tokens in and 256 out, 16 requests at once."""
    full = timer_of("bloom-176b", "a100-80gb", 8)
    low = full.at_clock(megahertz / 1410)

    def end_to_end(timer: AnalyticTimer) -> int:
        line = timer.decode_line(16, 16 * 2048, 2048)
        return timer.step_ps([Prompt(2048, 0, True)], 0, 0, 0) + line.total_ps(256)

    assert 0.0 < end_to_end(low) / end_to_end(full) - 1.0 <= most
    assert low.at_clock(1.0).step_ps((), 3, 5, 4) == full.step_ps((), 3, 5, 4)


def test_power_by_phase_and_clock() -> None:
    timer = TIMERS[("llama-3.1-70b", "a100-80gb", 4)]
    idle, prompt, decode = timer.power_w()
    assert idle == 63.0
    assert 300.0 < prompt <= 400.0
    assert 150.0 < decode < prompt
    low = timer.at_clock(1110 / 1410).power_w()
    assert low.idle_w == idle
    assert idle < low.decode_w < decode
    assert low.prompt_w - idle == pytest.approx((prompt - idle) * (1110 / 1410) ** 2.2)


def test_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="32 attention heads") as caught:
        timer_of("llama-3.1-8b", "h100-sxm", 3)
    assert "1, 2, 4, 8" in str(caught.value)
    with pytest.raises(ConfigError, match="share fast links"):
        timer_of("llama-3.1-8b", "h100-sxm", 16)
    with pytest.raises(ConfigError, match="fraction"):
        TIMERS[CASES[0]].at_clock(0.0)
    with pytest.raises(ConfigError, match="times as long"):
        TIMERS[CASES[0]].scaled(-1.0)
