"""`plan context`: rows by both rates, levers, ways back that hold and cannot be eased, sessions, the verb."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.cli.main import run
from megalith.cost.long_context import (
    PLAIN,
    Levers,
    LongContextRow,
    PeakDevice,
    Session,
    long_context_row,
    sessions_per_hour,
)
from megalith.cost.memory import kv_block_bytes
from megalith.plan.context import ContextQuestion, all_ways, choices, gentle_ways, near, plan_context, row_of
from megalith.plan.serve import plan_serve
from megalith.specs import catalog
from megalith.studies.long_context import DEVICE, MODEL, planned

SPEC = catalog.model(MODEL)


def peak(tokens: int, levers: Levers = PLAIN) -> LongContextRow:
    return long_context_row(SPEC, 68e9, tokens, levers=levers)


def test_kv_is_that_of_the_block_manager() -> None:
    assert peak(50_000).kv_bytes == 50_000 / 16 * kv_block_bytes(SPEC, 16)


def test_levers_multiply_and_leave_prefill() -> None:
    levers = Levers(layers=0.5, heads=0.6, tokens=0.25, bits=4.0)
    assert levers.kept == pytest.approx(0.5 * 0.6 * 0.25 / 4)
    plain, less = peak(100_000), peak(100_000, levers)
    assert less.kv_bytes == pytest.approx(levers.kept * plain.kv_bytes)
    assert less.switch_s == pytest.approx(levers.kept * plain.switch_s)
    assert less.concurrency == pytest.approx(plain.concurrency / levers.kept)
    assert less.prefill_s == plain.prefill_s
    assert less.decode_s == pytest.approx(250 * (68e9 + less.kv_bytes) / 2e12)


def test_what_is_offloaded_makes_room_and_is_read_over_the_host_link() -> None:
    plain, away = peak(100_000), peak(100_000, Levers(host=0.5))
    assert away.concurrency == pytest.approx(2 * plain.concurrency)
    assert away.switch_s == pytest.approx(plain.switch_s / 2), "what lies on the host stays there"
    assert away.decode_s - plain.decode_s == pytest.approx(250 * plain.kv_bytes / 2 * (1 / 20e9 - 1 / 2e12))
    assert peak(1000, Levers(host=1.0)).concurrency == float("inf")


def test_a_window_spares_attention_only() -> None:
    assert long_context_row(SPEC, 68e9, 4_000, window=4_000) == peak(4_000)
    assert long_context_row(SPEC, 68e9, 4_000, window=9_000) == peak(4_000)
    held = long_context_row(SPEC, 68e9, 50_000, window=4_000)
    matrices = 68e9 * 50_000 / 312e12
    assert matrices < held.prefill_s < peak(50_000).prefill_s
    assert held.decode_s == peak(50_000).decode_s


def test_reached_rates_are_those_of_plan_serve() -> None:
    """The same decode, room and prefill as `plan serve` predicts."""
    question = planned(50_000)
    row = row_of(question)(50_000, PLAIN)
    request = msgspec.structs.replace(question.request, context=50_000, prompt_tokens=50_000)
    plan = plan_serve(request)
    assert row.decode_s / 250 == pytest.approx(plan.points[0].tpot_ns.value / 1e9, rel=1e-6)
    assert row.prefill_s == pytest.approx(plan.ttft_ns.value / 1e9, rel=1e-6)
    assert int(row.concurrency) == plan.max_sequences
    assert row.switch_s == pytest.approx(2 * 50_000 * 245_760 / 2 / (25e9 * catalog.device(DEVICE).achievable.link))


def test_reached_rates_read_what_is_offloaded_over_each_devices_own_link() -> None:
    row = row_of(planned(50_000))
    half, away = row(25_000, PLAIN), row(50_000, Levers(host=0.5))
    link = 25e9 * catalog.device(DEVICE).achievable.link
    assert away.decode_s == pytest.approx(half.decode_s + 250 * (25_000 * 245_760 / 2) / link, rel=1e-6)
    assert away.switch_s == pytest.approx(half.switch_s)
    assert away.concurrency == pytest.approx(half.concurrency)
    assert away.prefill_s > half.prefill_s


@pytest.mark.parametrize("rates", ["peak", "reached"])
def test_every_gentle_way_holds_and_cannot_be_eased(rates: str) -> None:
    row = row_of(msgspec.structs.replace(planned(1_000_000), rates=rates))
    short = row(4_096, PLAIN)
    ways = gentle_ways(row, 1_000_000, short, SPEC.num_layers)
    assert ways
    settings_of = {name: [one.value for one in options] for name, options in choices(SPEC.num_layers).items()}
    for way in ways:
        assert near(way)
        for name, values in settings_of.items():
            place = values.index(way.levers[name])
            if place:
                eased = row(1_000_000, Levers(**(way.levers | {name: values[place - 1]})))
                factors = (
                    short.concurrency / eased.concurrency,
                    eased.decode_s / short.decode_s,
                    eased.switch_s / short.switch_s,
                )
                assert max(factors) > 2.0 or eased.concurrency < 1.0
    assert [way.kept for way in ways] == sorted((way.kept for way in ways), reverse=True)


def test_a_short_context_needs_no_way_back() -> None:
    (way,) = gentle_ways(peak, 5_000, peak(4_096), SPEC.num_layers)
    assert way.changes == ()
    assert way.kept == 1.0


def test_no_way_where_not_one_context_fits() -> None:
    ways = list(all_ways(peak, 10**12, peak(4_096), SPEC.num_layers))
    assert not any(near(way) for way in ways)
    assert {way.users for way in ways} == {float("inf")}


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(1, 40_000), users=st.integers(1, 100), think=st.floats(0.0, 500.0))
def test_sessions_are_bounded_by_device_and_users(tokens: int, users: int, think: float) -> None:
    row, session = peak(tokens), Session(rounds=3, think_s=think, users=users)
    rate = sessions_per_hour(row, session)
    busy = row.prefill_s + 3 * row.decode_s
    rounding = 1 + 1e-12
    assert 0 < rate <= 3600 / busy * rounding
    assert rate <= users * 3600 / (busy + 3 * think) * rounding
    assert sessions_per_hour(peak(2 * tokens), session) < rate


def test_switching_costs_only_when_users_do_not_fit() -> None:
    row = peak(20_000)
    assert int(row.concurrency) == 2
    fits, more = (sessions_per_hour(row, Session(rounds=1, think_s=0.0, users=users)) for users in (2, 3))
    assert fits == pytest.approx(3600 / (row.prefill_s + row.decode_s))
    assert more == pytest.approx(3600 / (row.prefill_s + row.decode_s + row.switch_s))
    assert sessions_per_hour(peak(100_000), Session()) == 0.0


def test_the_plan_says_what_lies_beyond_the_model() -> None:
    plan = plan_context(msgspec.structs.replace(planned(50_000), contexts=(50_000, 1_000_000)))
    assert [cost.users for cost in plan.costs] == [6, 0]
    assert any("200,000" in note for note in plan.notes)
    assert plan.shared_prompts > 1
    assert any("0.65 and 1.7 times" in note for note in plan.notes), "the band of the device"
    within = plan_context(planned(50_000))
    assert not any("200,000" in note for note in within.notes)


def test_weights_that_leave_no_room_are_refused() -> None:
    question = planned(50_000)
    request = msgspec.structs.replace(question.request, limit_bytes=10 << 30)
    with pytest.raises(ConfigError, match="beside the weights"):
        plan_context(msgspec.structs.replace(question, request=request))


def test_peak_rates_are_the_data_sheets() -> None:
    question = msgspec.structs.replace(planned(50_000), rates="peak")
    device = catalog.device(DEVICE)
    both = PeakDevice(2 * 312e12, 2 * device.memory_bytes_per_s, 2 * device.memory_bytes, 2 * 25e9)
    weights = question.request.weights.total
    assert row_of(question)(50_000, PLAIN) == long_context_row(SPEC, weights, 50_000, 250, both)
    assert isinstance(question, ContextQuestion)


def test_the_verb_answers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEGALITH_HOME", str(tmp_path))
    assert run(shlex.split("plan context yi-34b-200k --devices 2 --context 50000,1000000")) == 0
    out = capsys.readouterr().out
    assert "predicted" in out
    assert "YOCO" in out
    assert run(shlex.split("plan context yi-34b-200k --rates peak --context 50_000 --json")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["costs"][0]["tokens"] == 50_000
    assert plan["costs"][0]["users"] == 1


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ("plan context yi-34b-200k --context 4k", "50000,1000000"),
        ("plan context yi-34b-200k --context 0", "at least 1"),
        ("plan context yi-34b-200k --rates best", "reached or peak"),
        ("plan context yi-34b-200k --users 0", "at least 1"),
        ("plan context yi-34b-200k --device l4", "beside the weights"),
        ("plan context yi-34b-200k --device sn40l --devices 4", "no link to the host"),
    ],
)
def test_mistakes_name_what_works(tokens: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(shlex.split(tokens)) in (1, 2)
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err
