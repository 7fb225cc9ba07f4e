"""The step times of splitwise-sim: interpolation, the mixed rule, exact lines, and the table against its source."""

from __future__ import annotations

import csv
import gzip
from collections import defaultdict
from pathlib import Path
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.cost.timer import Prompt
from megalith.cost.timer_phases import NO_END
from megalith.cost.timer_splitwise import TOKEN_QUERIES, Curve, TokenQuery, splitwise, splitwise_tables

DATA = Path(__file__).parents[2] / "../shared/data/splitwise-sim/inputs/perf_model.csv.gz"
H100 = "llama2-70b/h100-80gb/tp8"
MS = 1_000_000_000


def prompt(tokens: int) -> Prompt:
    return Prompt(tokens, 0, True)


def test_measured_points_are_met_to_the_picosecond() -> None:
    table = splitwise(H100)
    timer = table.timer()
    for tokens, prompt_ms, token_ms in zip(table.batch_tokens, table.prompt_ms, table.token_ms, strict=True):
        assert timer.step_ps([prompt(tokens)], 0, 0, 0) == round(prompt_ms * MS)
        assert timer.step_ps((), tokens, 0, 0) == round(token_ms * MS)


def test_the_outer_lines_go_on() -> None:
    table = splitwise(H100)
    first = (table.token_ms[1] - table.token_ms[0]) / 128
    last = (table.prompt_ms[-1] - table.prompt_ms[-2]) / 16_384
    timer = table.timer()
    assert timer.step_ps((), 1, 0, 0) == pytest.approx((table.token_ms[0] - 127 * first) * MS, abs=1)
    expected = (table.prompt_ms[-1] + 10_000 * last) * MS
    assert timer.step_ps([prompt(42_768)], 0, 0, 0) == pytest.approx(expected, abs=1)


def test_a_mixed_step_is_a_prompt_step_of_all_its_tokens_and_a_tenth() -> None:
    timer = splitwise(H100).timer()
    alone = timer.step_ps([prompt(1000), prompt(207)], 0, 0, 0)
    assert timer.step_ps([prompt(1000), prompt(200)], 7, 9000, 3000) == pytest.approx(1.1 * alone, abs=1)
    rows = [Prompt(1, 500 + row, True) for row in range(7)]
    assert timer.step_ps([prompt(1000), prompt(200), *rows], 0, 0, 0) == pytest.approx(1.1 * alone, abs=1)


def test_contexts_count_only_in_context_aware_mode() -> None:
    table = splitwise(H100)
    assert table.timer().step_ps((), 20, 30_000, 9000) == table.timer().step_ps((), 20, 0, 0)
    aware = table.timer("context_aware")
    assert aware.step_ps((), 20, 16_384, 9000) == pytest.approx(table.token_ms[7] * MS, abs=8192)
    assert aware.step_ps((), 20, 30_000, 9000) > 1.4 * aware.step_ps((), 20, 300, 90)


@given(
    st.sampled_from(sorted(splitwise_tables())),
    st.sampled_from(TOKEN_QUERIES),
    st.integers(1, 600),
    st.integers(1, 40_000),
)
def test_lines_are_what_steps_take(name: str, query: TokenQuery, decodes: int, context: int) -> None:
    timer = splitwise(name).timer(query)
    try:
        line = timer.decode_line(decodes, context, context)
    except ConfigError:
        assert "a100-80gb/tp2" in name, "only that table falls at its end"
        return
    assert line.steps >= 1
    for step in {0, 1, line.steps // 2, line.steps - 1, min(line.steps - 1, 10**9)}:
        if 0 <= step < line.steps:
            expected = timer.step_ps((), decodes, context + step * decodes, context + step)
            assert expected == line.first_ps + step * line.slope_ps


def test_the_last_line_of_a_falling_table_is_refused_where_nothing_is_left() -> None:
    timer = splitwise("llama2-70b/a100-80gb/tp2").timer()
    with pytest.raises(ConfigError, match="32768"):
        timer.step_ps([prompt(60_000)], 0, 0, 0)


def test_slower_timers() -> None:
    timer = splitwise(H100).timer()
    assert timer.scaled(2.0).step_ps((), 3, 0, 0) == pytest.approx(2 * timer.step_ps((), 3, 0, 0), rel=1e-8)
    half = timer.at_clock(0.5)
    assert half.step_ps([prompt(512)], 0, 0, 0) == pytest.approx(2 * timer.step_ps([prompt(512)], 0, 0, 0), rel=1e-8)
    assert half.step_ps((), 3, 0, 0) < 1.2 * timer.step_ps((), 3, 0, 0)
    assert half.at_clock(1.0).step_ps((), 3, 0, 0) == timer.step_ps((), 3, 0, 0)
    assert timer.power_w().prompt_w == 700.0
    with pytest.raises(ConfigError, match="no power"):
        splitwise("llama2-70b/h100-80gb-pcap/tp8").timer().power_w()


def test_names_and_bad_curves() -> None:
    with pytest.raises(ConfigError, match="h100-80gb/tp8"):
        splitwise("llama2-70b/h100/tp8")
    with pytest.raises(ConfigError, match="rising"):
        Curve([128, 128], [1.0, 2.0])
    with pytest.raises(ConfigError, match="above 0"):
        Curve([128, 256], [1.0, 0.0])
    assert Curve([128, 256], [1.0, 2.0]).line(500)[2] == NO_END


@pytest.mark.skipif(not DATA.exists(), reason="splitwise-sim's data is not here")
def test_the_catalogue_holds_the_medians_of_the_source() -> None:
    runs: dict[str, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    with gzip.open(DATA, "rt") as file:
        for row in csv.DictReader(file):
            name = f"{row['model']}/{row['hardware']}/tp{row['tensor_parallel']}"
            tokens = int(row["prompt_size"]) * int(row["batch_size"])
            runs[name][tokens].append((float(row["prompt_time"]), float(row["token_time"])))
    assert runs.keys() == splitwise_tables().keys()
    for name, by_tokens in runs.items():
        table = splitwise(name)
        assert table.batch_tokens == tuple(sorted(by_tokens))
        for index, tokens in enumerate(table.batch_tokens):
            assert table.prompt_ms[index] == pytest.approx(median(run[0] for run in by_tokens[tokens]), rel=1e-9)
            assert table.token_ms[index] == pytest.approx(median(run[1] for run in by_tokens[tokens]), rel=1e-9)
