"""DistServe's step times: terms as its simulator adds them up, stages, lines, and what is not there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.cost.timer import Prompt
from megalith.cost.timer_distserve import distserve_for, distserve_tables
from megalith.cost.timer_phases import DeviceTimer
from megalith.cost.timer_vidur import StagedTimer

MS = 1e9


def timer(stages: int = 1, engine: str = "vllm", tp: int = 1) -> DeviceTimer:
    return distserve_for("opt-13b", "a100-80gb", tp, stages, engine)[0]


def test_a_prompt_costs_what_the_published_simulator_says() -> None:
    """get_prefill_time of 512 tokens, plus 1 ms a stage, 2 ms and 0.0001 ms a token of overhead."""
    expected = 22.0522048 + 0.14050924 * 512 + 8.0765848e-6 * 512**2 + 1 + 2 + 1e-4 * 512
    assert timer().step_ps([Prompt(512, 0, True)], 0, 0, 0) == pytest.approx(expected * MS, rel=1e-5)


@pytest.mark.parametrize(
    ("decodes", "terms"),
    [(94, (23.475041, 5.9293447e-4, 0.060726861)), (95, (20.206356, 4.907727e-4, 0.12000314))],
)
def test_decodes_change_their_terms_at_95(decodes: int, terms: tuple[float, float, float]) -> None:
    fixed, context, each = terms
    expected = fixed + context * 50_000 + each * decodes + 2 + 1e-4 * 50_000
    assert timer().step_ps((), decodes, 50_000, 1_000) == pytest.approx(expected * MS, rel=1e-5)


def test_a_pipeline_shares_the_work_and_pays_for_every_stage() -> None:
    staged = timer(2)
    assert isinstance(staged, StagedTimer)
    first, second = staged.stages_ps([Prompt(512, 0, True)], 0, 0, 0)
    work = 22.0522048 + 0.14050924 * 512 + 8.0765848e-6 * 512**2
    assert second == pytest.approx((work / 2 + 2) * MS, rel=1e-5)
    assert first - second == pytest.approx((2 + 1e-4 * 512) * MS, rel=1e-5)
    assert staged.step_ps([Prompt(512, 0, True)], 0, 0, 0) == first + second


@given(
    stages=st.sampled_from([1, 2, 4]), decodes=st.integers(1, 200), context=st.integers(0, 10**6),
    ahead=st.integers(0, 500),
)  # fmt: skip
def test_a_line_is_its_steps(stages: int, decodes: int, context: int, ahead: int) -> None:
    one = timer(stages)
    line = one.decode_line(decodes, context, context)
    assert line.first_ps + ahead * line.slope_ps == one.step_ps((), decodes, context + ahead * decodes, context + ahead)


def test_slower_devices_take_longer_in_every_stage() -> None:
    slow, fast = timer(2).scaled(2.0), timer(2)
    assert slow.step_ps((), 8, 4_000, 500) == pytest.approx(2 * fast.step_ps((), 8, 4_000, 500), rel=1e-9)
    assert timer(2).at_clock(0.5).step_ps([Prompt(64, 0, True)], 0, 0, 0) > fast.step_ps([Prompt(64, 0, True)], 0, 0, 0)


def test_what_instances_hold_is_published_by_degree() -> None:
    assert distserve_for("opt-13b", "a100-80gb", 1, 1, "")[2] == 66_144
    assert distserve_for("opt-13b", "a100-80gb", 2, 2, "")[2] == 356_752
    assert distserve_for("opt-66b", "a100-80gb", 2, 1, "distserve")[2] == 11_600


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("opt-13b", "a100-80gb", 1, 1, "sglang"), "no engine 'sglang'"),
        (("opt-13b", "h100-sxm", 1, 1, "vllm"), "no opt-13b on h100-sxm"),
        (("opt-66b", "a100-80gb", 1, 1, "vllm"), "tensor parallel 1"),
    ],
)
def test_what_is_not_there_says_what_is(arguments: tuple[str, str, int, int, str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        distserve_for(*arguments)


def test_no_table_has_a_term_below_zero() -> None:
    rows = [(*one.prompt_ms, *one.decode_ms, *one.large_decode_ms) for one in distserve_tables().values()]
    assert rows
    assert min(min(row) for row in rows) >= 0
