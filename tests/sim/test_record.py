"""The recorder against plain lists and NumPy: latencies, gaps, levels, rates, service levels, bounded memory."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.base.random import splitmix64
from megalith.policy.facts import Request
from megalith.report.percentiles import percentile, summarize
from megalith.sim.attainment import each_request
from megalith.sim.histogram import RELATIVE_ERROR
from megalith.sim.record import COLUMNS, Recorder
from megalith.sim.timeline import Timeline
from megalith.specs.slo import SPLITWISE_SLO, make_slo, parse_slo

MS, S = 10**6, 10**9


@dataclass
class Life:
    """What the recorder reads of a request."""

    request: Request
    output_tokens: int = 10
    scheduled_ns: int | None = -1
    first_ns: int | None = -1
    finish_ns: int | None = -1
    generated: int = 0
    preemptions: int = 0
    migrations: int = 0
    cached_tokens: int = 0
    transfer_ns: int = 0
    instance: int | None = 0
    decode_instance: int | None = None
    outcome: str = "finished"


def life(index: int, arrival_ns: int, queue: int, ttft: int, decode: int, tokens: int, prompt: int = 100) -> Life:
    request = Request(index, arrival_ns, prompt, 1000)
    first = arrival_ns + ttft
    return Life(request, tokens, arrival_ns + queue, first, first + (decode if tokens > 1 else 0), tokens)


def draw(count: int, seed: int = 3) -> list[Life]:
    """Requests 10 ms apart with latencies between 50 ms and some seconds."""
    lives = []
    for i in range(count):
        a, b, c = (splitmix64(seed, 3 * i + k) for k in range(3))
        tokens = 1 + a % 200
        lives.append(
            life(i, i * 10 * MS, b % (20 * MS), 50 * MS + b % (400 * MS), tokens * (5 * MS + c % (9 * MS)), tokens)
        )
    return lives


def record(lives: list[Life], **options: object) -> Recorder:
    recorder = Recorder(**options)  # type: ignore[arg-type]
    for one in lives:
        recorder.finished(one)
    return recorder


def test_latencies_are_those_of_the_definitions() -> None:
    lives = draw(5000)
    figures = record(lives).figures()
    e2e = [one.finish_ns - one.request.arrival_ns for one in lives]
    expected = {
        "ttft_ns": [one.first_ns - one.request.arrival_ns for one in lives],
        "e2e_ns": e2e,
        "tpot_ns": [(one.finish_ns - one.first_ns) // (one.generated - 1) for one in lives if one.generated > 1],
        "queue_ns": [one.scheduled_ns - one.request.arrival_ns for one in lives],
        "normalized_ns": [whole // one.generated for whole, one in zip(e2e, lives, strict=True)],
    }
    for name, samples in expected.items():
        got, want = figures.latencies[name], summarize(samples)
        assert got is not None
        assert want is not None
        assert got.error == 0
        for field in ("count", "mean", "minimum", "p50", "p90", "p95", "p99", "maximum"):
            assert getattr(got, field) == getattr(want, field), (name, field)
    assert figures.latencies["transfer_ns"] is None
    assert (figures.finished, figures.rejected, figures.failed) == (5000, 0, 0)
    assert figures.output_tokens == sum(one.generated for one in lives)
    assert figures.prompt_tokens == 500_000


def test_above_the_limit_percentiles_come_from_the_histogram_and_say_so() -> None:
    lives = draw(5000)
    exact, rough = record(lives).figures(), record(lives, exact_limit=3000).figures()
    for name in ("ttft_ns", "tpot_ns", "e2e_ns"):
        a, b = exact.latencies[name], rough.latencies[name]
        assert a is not None
        assert b is not None
        assert b.error == RELATIVE_ERROR
        assert (a.count, a.mean, a.minimum, a.maximum) == (b.count, b.mean, b.minimum, b.maximum)
        for field in ("p50", "p90", "p95", "p99"):
            assert abs(getattr(a, field) - getattr(b, field)) <= RELATIVE_ERROR * getattr(a, field)


SEGMENTS = st.lists(
    st.tuples(st.integers(10**8, 10**11), st.integers(0, 10**7), st.integers(1, 300), st.integers(0, 64)), max_size=20
)


@settings(deadline=None)
@given(SEGMENTS, st.lists(st.tuples(st.integers(10**8, 10**11), st.integers(1, 4096), st.integers(0, 64)), max_size=9))
def test_a_leap_is_its_steps(segments: list[tuple[int, int, int, int]], prompts: list[tuple[int, int, int]]) -> None:
    leaping, stepping = Recorder(), Recorder()
    gaps: list[int] = []
    for first, slope, steps, decodes in segments:
        leaping.steps(first, slope, steps, decodes)
        for j in range(steps):
            stepping.steps(first + j * slope, 0, 1, decodes)
            gaps += [first + j * slope] * decodes
    for duration, tokens, decodes in prompts:
        leaping.prompt_step(duration, tokens, decodes)
        stepping.prompt_step(duration, tokens, decodes)
        gaps += [duration] * decodes
    a, b = leaping.figures(), stepping.figures()
    assert a == b
    assert leaping.gaps_ps == stepping.gaps_ps
    assert a.step_decode_tokens == len(gaps) == leaping.gaps_ps.count
    assert leaping.gaps_ps.total == sum(gaps)
    assert a.step_prompt_tokens == sum(tokens for _, tokens, _ in prompts)
    assert a.prompt_steps == len(prompts)
    if gaps:
        itl = a.latencies["itl_ns"]
        assert itl is not None
        true = percentile(sorted(gaps), 99)
        assert abs(itl.p99 * 1000 - true) <= RELATIVE_ERROR * true + 500
        assert itl.maximum == (2 * max(gaps) + 1000) // 2000


def test_the_rejected_and_the_failed_count_in_no_latency_but_against_the_service_level() -> None:
    lives = draw(1000)
    for one in lives[::10]:
        one.outcome, one.first_ns, one.finish_ns, one.scheduled_ns = "rejected", None, None, None
    for one in lives[5::10]:
        one.outcome = "failed"
    figures = record(lives, slo=parse_slo("e2e=3600s@p90,ttft=3600s,attain=0.8")).figures()
    assert (figures.finished, figures.rejected, figures.failed) == (800, 100, 100)
    ttft = figures.latencies["ttft_ns"]
    assert ttft is not None
    assert ttft.count == 800
    assert figures.slo is not None
    assert figures.slo.attainment == 0.8
    by_bound = {verdict.bound: verdict for verdict in figures.slo.verdicts}
    assert not by_bound["e2e=3600s@p90"].kept
    assert by_bound["e2e=3600s@p90"].observed is None
    assert by_bound["ttft=3600s,attain=0.8"].kept
    assert (figures.slo.binding, figures.slo.margin, figures.slo.kept) == ("e2e=3600s@p90", None, False)


def test_service_level_against_counting() -> None:
    lives = draw(3000)
    slo = parse_slo("ttft=300ms,tpot=11ms,attain=60%,e2e=2s@p95")
    recorder = record(lives, slo=slo)
    figures = recorder.figures().slo
    assert figures is not None
    ttft = np.array([one.first_ns - one.request.arrival_ns for one in lives])
    e2e = np.array([one.finish_ns - one.request.arrival_ns for one in lives])
    tpot = np.array([(one.finish_ns - one.first_ns) // max(one.generated - 1, 1) for one in lives])
    joint = (ttft <= 300 * MS) & (tpot <= 11 * MS)
    assert figures.good == int((joint & (e2e <= 2 * S)).sum())
    verdicts = {verdict.bound: verdict for verdict in figures.verdicts}
    assert verdicts["ttft=300ms,tpot=11ms,attain=0.6"].share == joint.mean()
    assert verdicts["ttft=300ms,tpot=11ms,attain=0.6"].kept == (joint.mean() >= 0.6)
    p95 = percentile(sorted(e2e.tolist()), 95)
    assert verdicts["e2e=2s@p95"].observed == pytest.approx(p95 / (2 * S), abs=1e-6)
    assert verdicts["e2e=2s@p95"].kept == (p95 <= 2 * S)
    least = min(verdicts.values(), key=lambda verdict: verdict.margin)
    assert (figures.binding, figures.margin) == (least.bound, least.margin)


def test_slowdowns_against_a_reference() -> None:
    lives = draw(2000)
    reference = each_request(lambda prompt, output: (100 * MS, 6 * MS, 100 * MS + 6 * MS * output))
    figures = record(lives, slo=SPLITWISE_SLO, reference=reference).figures().slo
    assert figures is not None
    ttft = sorted(one.first_ns - one.request.arrival_ns for one in lives)
    slow = sorted((one.finish_ns - one.request.arrival_ns) / (100 * MS + 6 * MS * one.generated) for one in lives)
    verdicts = {verdict.bound: verdict for verdict in figures.verdicts}
    assert len(verdicts) == 9
    assert verdicts["ttft=2x@p50"].observed == pytest.approx(percentile(ttft, 50) / (200 * MS), abs=1e-6)
    assert verdicts["e2e=1.5x@p90"].observed == pytest.approx(slow[1799] / 1.5, abs=1e-5)
    with pytest.raises(ConfigError, match="nothing to compare with"):
        Recorder(SPLITWISE_SLO)


def test_the_line_itself_is_within() -> None:
    """A figure equal to its limit keeps it, one nanosecond more does not, for any limit."""
    for limit in (1, 3, 7 * MS + 1, 10**15 + 7):
        for over in (0, 1):
            recorder = record([life(0, 0, 0, limit + over, 0, 1)], slo=make_slo(ttft_ns=limit, attain=1.0))
            figures = recorder.figures().slo
            assert figures is not None
            assert figures.kept == (over == 0)
            assert figures.good == 1 - over


def test_a_search_may_stop_when_the_service_level_is_lost() -> None:
    recorder = Recorder(make_slo(ttft_ns=100 * MS))
    for i in range(10):
        recorder.finished(life(i, i, 0, 200 * MS, MS, 5))
    assert not recorder.lost(100)
    recorder.finished(life(10, 10, 0, 200 * MS, MS, 5))
    assert recorder.lost(100)
    assert not recorder.lost(200)


def test_gaps_between_tokens_may_be_bounded() -> None:
    recorder = Recorder(parse_slo("itl=20ms@p90"))
    recorder.steps(10 * 10**9, 0, 90, 1)
    recorder.steps(50 * 10**9, 0, 10, 1)
    recorder.finished(life(0, 0, 0, MS, MS, 5))
    figures = recorder.figures().slo
    assert figures is not None
    assert figures.kept
    recorder.steps(50 * 10**9, 0, 1, 1)
    later = recorder.figures().slo
    assert later is not None
    assert not later.kept
    assert later.verdicts[0].observed == pytest.approx(2.5, rel=RELATIVE_ERROR)


def test_occupancy_and_rates_by_littles_law() -> None:
    lives = draw(4000)
    run = record(lives, slo=make_slo(ttft_ns=1)).figures().run
    span_ns = max(one.finish_ns for one in lives)
    assert (run.start_ns, run.end_ns, run.whole) == (0, span_ns, True)
    present = sum(one.finish_ns - one.request.arrival_ns for one in lives) / span_ns
    waiting = sum(one.scheduled_ns - one.request.arrival_ns for one in lives) / span_ns
    decoding = sum(one.finish_ns - one.first_ns for one in lives) / span_ns
    assert run.mean_present == pytest.approx(present, rel=1e-9)
    assert run.mean_waiting == pytest.approx(waiting, rel=1e-9)
    assert run.mean_decoding == pytest.approx(decoding, rel=1e-9)
    assert run.requests_per_s == pytest.approx(4000 / (span_ns / S))
    assert run.good_per_s == 0


def test_the_steady_window_leaves_ramp_and_drain_out() -> None:
    """One request each 10 ms, each 1 s long with 101 tokens: 100 requests/s, 10,100 tokens/s, 100 present."""
    lives = [life(i, i * 10 * MS, 5 * MS, 100 * MS, 900 * MS, 101) for i in range(6000)]
    steady = record(lives, slo=make_slo(ttft_ns=100 * MS)).figures().steady
    assert not steady.whole
    assert S <= steady.start_ns < 1.2 * S
    assert steady.end_ns <= 60 * S
    assert steady.requests_per_s == pytest.approx(100, rel=0.002)
    assert steady.good_per_s == steady.requests_per_s
    assert steady.output_tokens_per_s == pytest.approx(10_100, rel=0.002)
    assert steady.prompt_tokens_per_s == pytest.approx(10_000, rel=0.002)
    assert steady.mean_present == pytest.approx(100, rel=0.002)
    assert steady.mean_waiting == pytest.approx(0.5, rel=0.01)
    assert record([lives[0]]).figures().steady.whole


CHANGES = st.lists(st.tuples(st.integers(0, 10**11), st.integers(-3, 3)), min_size=1, max_size=30)


@given(CHANGES, st.integers(0, 29))
def test_a_timeline_keeps_its_integrals_whatever_the_order(changes: list[tuple[int, int]], cut: int) -> None:
    line, other = Timeline(1, 1, bins=16), Timeline(1, 1, bins=16)
    for at, by in changes:
        line.change(0, np.array([at]), float(by))
        line.count(0, np.array([at]))
    for target, part in ((other, changes[:cut][::-1]), (extra := Timeline(1, 1, bins=16), changes[cut:])):
        for at, by in part:
            target.change(0, np.array([at]), np.array([float(by)]))
            target.count(0, np.array([at]))
    other.merge(extra)
    assert line.width_ns == other.width_ns
    edges = [i * line.width_ns for i in range(17)]
    for i, (low, high) in enumerate(pairwise(edges)):
        true = sum(by * (max(0, high - at) - max(0, low - at)) for at, by in changes) / line.width_ns
        assert line.means(0)[i] == pytest.approx(true, abs=1e-6)
        assert other.means(0)[i] == pytest.approx(true, abs=1e-6)
        assert line.counted(0)[i] == other.counted(0)[i] == sum(low <= at < high for at, _ in changes)


def test_classes_appear_with_the_second_priority() -> None:
    lives = draw(3000)
    for one in lives[2500::5]:
        one.request = Request(one.request.id, one.request.arrival_ns, 100, 1000, priority=2)
    figures = record(lives).figures()
    assert set(figures.by_priority) == {"0", "2"}
    high = [one.first_ns - one.request.arrival_ns for one in lives if one.request.priority]
    low = [one.first_ns - one.request.arrival_ns for one in lives if not one.request.priority]
    for key, samples in (("0", low), ("2", high)):
        got = figures.by_priority[key]["ttft_ns"]
        assert got is not None
        assert (got.count, got.p99) == (len(samples), percentile(sorted(samples), 99))
    assert record(lives[:2000]).figures().by_priority == {}


def test_a_sink_gets_every_request_once() -> None:
    lives = draw(5000)
    batches: list[dict[str, object]] = []
    record(lives, sink=lambda columns: batches.append(dict(columns))).figures()
    assert len(batches) >= 2
    assert set(batches[0]) == set(COLUMNS)
    ids = np.concatenate([batch["id"] for batch in batches])  # type: ignore[list-item]
    assert ids.tolist() == list(range(5000))
    assert {-1} == set(np.concatenate([b["decode_instance"] for b in batches]).tolist())  # type: ignore[list-item]


def test_an_empty_run_has_figures() -> None:
    figures = Recorder(make_slo(ttft_ns=1)).figures()
    assert figures.finished == 0
    assert figures.latencies["ttft_ns"] is None
    assert figures.slo is not None
    assert (figures.slo.binding, figures.slo.kept) == (None, False)


def test_memory_does_not_grow_with_finished_requests() -> None:
    recorder = Recorder(make_slo(ttft_ns=300 * MS), exact_limit=4096)
    lives = draw(2048)

    def feed(times: int) -> None:
        for _ in range(times):
            for one in lives:
                recorder.finished(one)
            for _ in range(4096):
                recorder.steps(2 * 10**10, 10**5, 40, 32)

    feed(4)
    tracemalloc.start()
    feed(1)
    before = tracemalloc.get_traced_memory()[0]
    feed(4)
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert after - before < 100_000
