"""Operator tables and the timer over them: exact lines, monotone, bounded, honest about what is not there."""

from __future__ import annotations

from importlib.resources import files

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.cost import timer_operators
from megalith.cost.operators import NOTICE, Knots, available, tables
from megalith.cost.timer import Prompt
from megalith.cost.timer_analytic import AnalyticTimer
from megalith.cost.timer_choice import choose_timer
from megalith.cost.timer_linear import LinearTimer
from megalith.cost.timer_operators import OperatorTimer
from megalith.specs import catalog

CASES = [
    (device, model, table.tensor_parallel, table.number, attention.kv)
    for device, model in available()
    for table in tables(device, model).dense
    for attention in tables(device, model).attention
    if attention.tensor_parallel == table.tensor_parallel
]
TIMERS: dict[tuple[str, str, int, str, str], OperatorTimer] = {}
CASE = st.sampled_from(CASES)
CHUNKS = st.lists(st.builds(Prompt, st.integers(1, 9_000), st.integers(0, 20_000), st.booleans()), max_size=5)


def timer_of(case: tuple[str, str, int, str, str]) -> OperatorTimer:
    if case not in TIMERS:
        device, model, degree, number, kv = case
        TIMERS[case] = OperatorTimer(tables(device, model), degree, number, kv)
    return TIMERS[case]


def test_what_ships() -> None:
    assert {device for device, _ in available()} == {"a100-80gb", "h100-sxm", "h200", "b200", "l40s"}
    assert {"llama-3.1-8b", "llama-3.1-70b", "qwen3-32b", "qwen3-30b-a3b", "gpt-oss-120b"} <= {
        model for _, model in available()
    }
    assert len(CASES) > 200
    folder = files("megalith").joinpath("catalog", "operators")
    assert NOTICE in folder.joinpath("NOTICE").read_text(encoding="utf-8")
    for device, model in available():
        file = folder.joinpath(device, f"{model}.json")
        assert len(file.read_text(encoding="utf-8")) < 25_000
        assert tables(device, model).notice == NOTICE
        assert tables(device, model).layers == catalog.model(model).num_layers


def test_kernels_other_than_the_default() -> None:
    assert not [model for _, model in available() if "@" in model]
    assert ("h100-sxm", "gpt-oss-120b") in available("marlin")
    folder = files("megalith").joinpath("catalog", "operators")
    for kernels in ("trtllm", "trtllm-block", "sglang", "marlin", "mxfp8"):
        for device, model in available(kernels):
            text = folder.joinpath(device, f"{model}@{kernels}.json").read_text(encoding="utf-8")
            assert len(text) < 25_000
            assert tables(device, model, kernels).notice == NOTICE

    def rows_ns(device: str, kernels: str, rows: int) -> float:
        return tables(device, "gpt-oss-120b", kernels).dense[0].rows.value(rows)

    assert rows_ns("h100-sxm", "marlin", 8_192) > 1.5 * rows_ns("h100-sxm", "vllm", 8_192), "multiplies in bf16"
    assert rows_ns("h100-sxm", "marlin", 64) == pytest.approx(rows_ns("h100-sxm", "vllm", 64), rel=0.2)
    assert rows_ns("b200", "mxfp8", 8_192) < 0.6 * rows_ns("b200", "vllm", 8_192), "multiplies in fp8"


def test_kernels_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match=r"with the kernels 'marlin'.*") as refusal:
        tables("h100", "llama-3.1-8b", "marlin")
    assert "gpt-oss-120b" in str(refusal.value.hint)


@given(CASE, st.integers(1, 700), st.integers(0, 150_000), st.data())
def test_a_line_is_its_steps(
    case: tuple[str, str, int, str, str], decodes: int, mean: int, data: st.DataObject
) -> None:
    timer = timer_of(case)
    context = decodes * mean + data.draw(st.integers(0, decodes - 1))
    line = timer.decode_line(decodes, context, mean)
    ahead = data.draw(st.integers(0, min(line.steps, 100_000) - 1))
    step = timer.step_ps((), decodes, context + ahead * decodes, mean + ahead)
    assert line.first_ps + ahead * line.slope_ps == step


@given(CASE, st.integers(1, 600), st.integers(0, 60_000))
def test_lines_end_only_at_knots(case: tuple[str, str, int, str, str], decodes: int, context: int) -> None:
    """From one end to the next until the last line, which never ends: as many as the table has knots, no more."""
    timer, at, lines = timer_of(case), context, 0
    while (line := timer.decode_line(decodes, at, 0)).steps < 1 << 40:
        at += line.steps * decodes
        lines += 1
    assert lines <= len(timer.tables.attention[0].contexts)


@settings(max_examples=60)
@given(CASE, CHUNKS, st.integers(1, 400), st.integers(0, 900_000), st.integers(1, 999), st.integers(1, 99))
def test_more_takes_no_less(
    case: tuple[str, str, int, str, str], chunks: list[Prompt], decodes: int, context: int, more: int, deeper: int
) -> None:
    timer = timer_of(case)
    step = timer.step_ps(chunks, decodes, context, context)
    assert step > 0
    assert timer.step_ps(chunks, decodes, context + more, context + more) >= step
    assert timer.step_ps([*chunks, Prompt(more + 1, 0, False)], decodes, context, context) >= step
    assert timer.step_ps(chunks, decodes + 1, context + context // decodes + more, 0) >= step * 0.999
    if chunks:
        longer = [chunks[0]._replace(new_tokens=chunks[0].new_tokens + more), *chunks[1:]]
        if chunks[0].new_tokens > 1:
            assert timer.step_ps(longer, decodes, context, context) >= step - 1_000
        after = [chunks[0]._replace(context_tokens=chunks[0].context_tokens + deeper), *chunks[1:]]
        assert timer.step_ps(after, decodes, context, context) >= step - 1_000


@given(CASE, st.lists(st.integers(0, 9_000), min_size=1, max_size=20))
def test_decodes_may_come_as_prompts_of_one_token(case: tuple[str, str, int, str, str], contexts: list[int]) -> None:
    timer = timer_of(case)
    chunks = [Prompt(1, context, True) for context in contexts]
    assert timer.step_ps(chunks, 0, 0, 0) == timer.step_ps((), len(contexts), sum(contexts), max(contexts))


@given(st.sampled_from([case for case in CASES if case[3] == "bf16"]), st.integers(64, 16_384))
def test_never_faster_than_the_device_can_multiply(case: tuple[str, str, int, str, str], tokens: int) -> None:
    timer = timer_of(case)
    macs = tokens * timer.cost.layer_macs / timer.tensor_parallel
    peak = catalog.device(case[0]).peak_flops_per_s("bf16")
    assert timer.step_ps([Prompt(tokens, 0, True)], 0, 0, 0) >= 2e12 * macs / peak


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timer_operators, "MAX_MEMO", 50)
    monkeypatch.setattr(timer_operators, "MAX_CELLS", 50)
    timer = OperatorTimer(tables("h100", "llama-3.1-8b"))
    steps = [timer.step_ps([Prompt(rows, 5, True)], rows, 9 * rows, 9) for rows in range(2, 300)]
    for memory in (timer._row_ps, timer._head_ps, timer._cells, timer._prompt_ps):
        assert len(memory) <= 52
    assert steps == [timer.step_ps([Prompt(rows, 5, True)], rows, 9 * rows, 9) for rows in range(2, 300)]


def test_stragglers_clocks_and_power() -> None:
    timer = OperatorTimer(tables("a100", "llama-3.1-70b"), 4)
    decode, prompt = ((), 32, 32_000, 1_000), ([Prompt(2_048, 0, True)], 0, 0, 0)
    assert timer.scaled(2.0).step_ps(*decode) == pytest.approx(2 * timer.step_ps(*decode), rel=1e-4)
    assert timer.scaled(2.0).scaled(0.5).step_ps(*prompt) == timer.step_ps(*prompt)
    low = timer.at_clock(1110 / 1410)
    assert 1.0 < low.step_ps(*decode) / timer.step_ps(*decode) < 1.07
    assert 1.15 < low.step_ps(*prompt) / timer.step_ps(*prompt) < 1410 / 1110 + 1e-3
    assert low.at_clock(1.0).step_ps(*decode) == timer.step_ps(*decode)
    idle, busy, decoding = timer.power_w()
    assert idle == 63.0 < decoding < busy <= 400.0
    assert low.power_w().prompt_w < busy


def test_knots() -> None:
    knots = Knots(at=(2, 4, 8), ns=(10, 20, 60))
    assert [knots.value(x) for x in (1, 2, 3, 4, 6, 8, 10)] == [10, 10, 15, 20, 40, 60, 80]


def test_which_timer_a_pool_gets() -> None:
    assert isinstance(choose_timer("auto", "llama-3.1-8b", "h100", 2, "fp8", "fp8"), OperatorTimer)
    assert isinstance(choose_timer("auto", "gpt-oss", "h100", 2, "mxfp4"), OperatorTimer)
    assert isinstance(choose_timer("auto", "llama-3.1-8b", "h100", 16 // 2, "q8_0"), AnalyticTimer)
    assert isinstance(choose_timer("auto", "gemma-3-27b", "h100"), AnalyticTimer)
    assert isinstance(choose_timer("analytic", "llama-3.1-8b", "h100"), AnalyticTimer)
    assert isinstance(choose_timer("llumnix-7b", "llama-2-7b", "a10g"), LinearTimer)


def test_what_is_not_there() -> None:
    with pytest.raises(ConfigError, match="llama-3\\.1-8b"):
        tables("h100", "gemma-3-27b")
    with pytest.raises(ConfigError, match="tp 8 bf16"):
        OperatorTimer(tables("h100", "llama-3.1-8b"), 3)
    with pytest.raises(ConfigError, match="no attention"):
        OperatorTimer(tables("h100", "llama-3.1-8b"), 1, "bf16", "int8")
    with pytest.raises(ConfigError, match="no operator tables"):
        choose_timer("operators", "gemma-3-27b", "h100")
    with pytest.raises(ConfigError, match="llumnix-7b"):
        choose_timer("lumnix", "llama-2-7b", "a10g")
