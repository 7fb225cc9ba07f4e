"""The load generator against a server whose delays and counts are known."""

from __future__ import annotations

import asyncio
import itertools
import statistics
from typing import Any

import pytest

from megalith.base.errors import ConfigError
from megalith.serve.load_http import EndpointError, parse_endpoint
from megalith.serve.load_report import LoadReport, Slo, build_report, parse_slo
from megalith.serve.load_run import LoadConfig, LoadRun, served_models
from megalith.serve.load_workload import PromptMaker
from megalith.specs.arrivals import ClosedLoop, SteadyArrivals
from megalith.specs.lengths import parse_lengths
from megalith.specs.shape import RequestShape
from megalith.specs.workload import WorkloadSpec, open_workload

from .paced_server import PacedApp, serving

MS = 1_000_000


def measure(
    app: PacedApp, shapes: Any, slo: Slo | None = None, prompts: PromptMaker | None = None, **config: Any
) -> tuple[LoadReport, LoadRun]:
    async def go(url: str) -> LoadRun:
        run = LoadRun(parse_endpoint(url), LoadConfig(model="paced", **config), prompts or PromptMaker())
        await run.run(shapes, lambda _: None)
        return run

    with serving(app) as url:
        run = asyncio.run(go(url))
    return build_report(run.records, run.issued, slo), run


def closed(count: int, output: int = 11) -> Any:
    return (RequestShape(i, None, 32, output) for i in range(count))


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_reports_the_delays_that_the_server_makes(api: str) -> None:
    """Against the server's own time stamps, so that a busy machine that delays the server itself does not matter."""
    app = PacedApp(ttft_s=0.08, itl_s=0.02)
    prompts = PromptMaker("text" if api == "chat" else "ids")
    report, run = measure(app, closed(12), concurrency=3, warmup=2, api=api, prompts=prompts)
    assert (report.ok, report.issued, report.errors, report.refused) == (12, 12, 0, 0)
    assert report.warnings == []
    late_ns, gap_errors_ns = [], []
    for record in run.records:
        sent_ns = app.sent_ns[str(prompts.prompt(RequestShape(record.index, None, 32, 11)))]
        assert record.first_ns is not None
        arrived_ns = list(itertools.accumulate([run.start_ns + record.first_ns, *record.itl_ns]))
        assert len(arrived_ns) == len(sent_ns) == 11
        late_ns += [arrival - sending for arrival, sending in zip(arrived_ns, sent_ns, strict=True)]
        gaps = [later - earlier for earlier, later in itertools.pairwise(sent_ns)]
        gap_errors_ns += [abs(ours - theirs) for ours, theirs in zip(record.itl_ns, gaps, strict=True)]
        assert record.e2e_ns >= arrived_ns[-1] - run.start_ns - record.sent_ns
    assert min(late_ns) > 0, "nothing arrives before it was sent"
    assert statistics.median(late_ns) < 10 * MS
    assert statistics.median(gap_errors_ns) < 5 * MS
    assert report.ttft_ns is not None
    assert report.itl_ns is not None
    assert report.tpot_ns is not None
    assert report.ttft_ns.minimum >= 80 * MS
    assert report.itl_ns.count == 12 * 10
    assert report.tpot_ns.p50 > 15 * MS  # of one request it is less when its first piece was held up
    assert report.itl_ns.mean == pytest.approx(report.tpot_ns.mean, rel=1e-6)


def test_counts_what_the_server_counts() -> None:
    app = PacedApp(ttft_s=0.0, itl_s=0.001)
    prompts, answers = parse_lengths("5-40"), parse_lengths("1-20")
    spec = WorkloadSpec(input=prompts, output=answers, arrivals=ClosedLoop(clients=8), requests=40)
    shapes = open_workload(spec, seed=7)
    report, run = measure(app, shapes, concurrency=8, max_requests=None)
    assert report.output_tokens == app.tokens_sent == sum(r["max_tokens"] for r in app.requests)
    assert report.pieces == report.output_tokens
    assert report.input_tokens == sum(len(r["prompt"]) for r in app.requests)
    assert app.answers_ended == report.ok == 40
    assert report.output_rate == pytest.approx(report.output_tokens / (report.duration_ns / 1e9))
    assert len({r.index for r in run.records}) == 40
    assert max(r.input_tokens for r in run.records) <= 40


def test_closed_loop_keeps_its_number_in_flight() -> None:
    app = PacedApp(ttft_s=0.05, itl_s=0.01)
    report, run = measure(app, closed(20), concurrency=5)
    events = sorted([(r.sent_ns, 1) for r in run.records] + [(r.end_ns, -1) for r in run.records])
    assert max(itertools.accumulate(step for _, step in events)) == 5
    assert report.mean_in_flight == pytest.approx(5, rel=0.2)


def test_open_loop_keeps_its_times_and_counts_latency_from_them() -> None:
    app = PacedApp(ttft_s=0.02, itl_s=0.001)
    prompts, answers, arrivals = parse_lengths("8"), parse_lengths("4"), SteadyArrivals(rate_per_s=50.0)
    shapes = open_workload(WorkloadSpec(input=prompts, output=answers, arrivals=arrivals, requests=25))
    report, run = measure(app, shapes)
    due = sorted(r.due_ns for r in run.records)
    assert due == [20 * MS * i for i in range(25)]
    assert all(r.sent_ns >= r.due_ns for r in run.records)
    assert report.lateness_ns is not None
    assert report.lateness_ns.p50 < 50 * MS
    assert report.duration_ns >= due[-1] + 23 * MS


def test_a_client_without_room_cannot_hide_the_wait() -> None:
    """Ten requests due at once through two places: the last pair waits four rounds, and its TTFT says so."""
    app = PacedApp(ttft_s=0.05, itl_s=0.001)
    shapes = (RequestShape(i, 0, 8, 2) for i in range(10))
    report, _ = measure(app, shapes, max_in_flight=2)
    assert report.ttft_ns is not None
    assert report.ttft_ns.maximum >= 5 * 50 * MS
    assert any("late" in warning for warning in report.warnings)


def test_refusals_and_errors_are_counted_apart_and_spoil_goodput() -> None:
    app = PacedApp(ttft_s=0.01, itl_s=0.001, refuse_every=4, fail_every=5)
    slo = parse_slo("ttft=5s,tpot=5s")
    report, _ = measure(app, closed(20, output=4), slo, concurrency=1)
    assert (report.ok, report.refused, report.errors) == (12, 5, 3)
    assert report.error_kinds == {"the queue is full": 5, "broken on purpose": 3}
    assert report.good == 12
    assert report.good_share == pytest.approx(12 / 20)


def test_goodput_follows_the_known_delay() -> None:
    app = PacedApp(ttft_s=0.06, itl_s=0.002)
    strict, _ = measure(app, closed(6, output=3), parse_slo("ttft=55ms"), concurrency=2)
    loose, _ = measure(app, closed(6, output=3), parse_slo("ttft=5s"), concurrency=2)
    assert strict.good == 0
    assert loose.good == 6


def test_missing_usage_and_joined_tokens_are_told() -> None:
    silent, _ = measure(PacedApp(0.0, 0.001, report_usage=False), closed(3), concurrency=1)
    assert silent.output_tokens == 33
    assert any("no usage" in warning for warning in silent.warnings)
    joined, _ = measure(PacedApp(0.0, 0.001, tokens_per_event=3), closed(3), concurrency=1)
    assert (joined.output_tokens, joined.pieces) == (33, 12)
    assert any("33 tokens came in 12 pieces" in warning for warning in joined.warnings)


def test_timeouts_are_outcomes() -> None:
    report, _ = measure(PacedApp(ttft_s=5.0), closed(2), concurrency=2, timeout_s=0.2)
    assert (report.ok, report.timeouts) == (0, 2)


def test_a_stopped_run_keeps_what_it_has() -> None:
    app = PacedApp(ttft_s=0.02, itl_s=0.005)

    async def go(url: str) -> LoadRun:
        run = LoadRun(parse_endpoint(url), LoadConfig(model="paced", concurrency=4, max_requests=None), PromptMaker())
        asyncio.get_running_loop().call_later(0.5, run.stop)
        await asyncio.wait_for(run.run(closed(10_000), lambda _: None), timeout=10)
        return run

    with serving(app) as url:
        run = asyncio.run(go(url))
    report = build_report(run.records, run.issued, None)
    assert report.ok > 4
    assert 1 <= report.cancelled <= 4
    assert report.ok + report.cancelled == report.issued


def test_duration_bounds_the_sending() -> None:
    report, run = measure(PacedApp(0.01, 0.001), closed(100_000), concurrency=2, duration_s=0.4, max_requests=None)
    assert 5 < report.ok == report.issued
    assert max(r.sent_ns for r in run.records) < 400 * MS


def test_a_dead_endpoint_ends_the_run() -> None:
    async def go() -> LoadRun:
        config = LoadConfig(model="x", concurrency=4, max_requests=None)
        run = LoadRun(parse_endpoint("http://127.0.0.1:9"), config, PromptMaker())
        await asyncio.wait_for(run.run(closed(10**9), lambda _: None), timeout=30)
        return run

    run = asyncio.run(go())
    assert "in a row failed" in run.gave_up
    assert len(run.records) < 300


def test_models_are_asked_for_and_a_dead_endpoint_says_what_to_do() -> None:
    with serving(PacedApp()) as url:
        assert asyncio.run(served_models(parse_endpoint(url))) == ["paced"]
    with pytest.raises(EndpointError, match="megalith serve"):
        asyncio.run(served_models(parse_endpoint("http://127.0.0.1:9")))


def test_chat_cannot_be_ids() -> None:
    with pytest.raises(ConfigError, match="--prompts text"):
        LoadRun(parse_endpoint("localhost:1"), LoadConfig(model="x", api="chat"), PromptMaker())
