"""`megalith bench serve`: put load on an OpenAI-compatible endpoint and say what it did to latency and throughput.

The flags and the printing are here; the load itself is in `serve/load_*.py`, the arithmetic in `serve/load_report.py`.
"""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from megalith.base.errors import ConfigError
from megalith.base.units import format_duration, parse_duration_ns
from megalith.cli.output import JsonFlag, print_json, progress, result_console, warn

if TYPE_CHECKING:
    from megalith.report.table import Table
    from megalith.serve.load_http import Endpoint
    from megalith.serve.load_report import LoadReport, Slo
    from megalith.serve.load_run import LoadRun, RequestRecord
    from megalith.specs.workload import WorkloadSpec

_INTERRUPTED = 130
_MAX_REQUESTS = 1_000_000
_CLIENTS = 8

app = App(
    name="serve",
    help_format="plaintext",
    help_epilogue="""\
Examples:
  megalith bench serve --concurrency 32 --requests 200
  megalith bench serve --rate 4 --duration 60s --slo ttft=500ms,tpot=60ms
  megalith bench serve --trace azure_conv.csv.gz --speedup 0.2 --limit 300 \\
      --max-input 1024 --max-output 128 --plot load.png
  megalith bench serve --workload azure-conv:rate=1,max_total=1024 --limit 300
  megalith bench serve --url http://127.0.0.1:9000/v1 --api chat --json""",
)


@Parameter(name="*", group="Target")
@dataclass(frozen=True)
class Target:
    """Which endpoint, and how it is asked."""

    url: str = "http://127.0.0.1:8000/v1"
    """Address of the API."""
    model: str | None = None
    """Model to name in requests; by default the first that the endpoint lists."""
    api_key: str | None = None
    """Bearer key; by default $OPENAI_API_KEY."""
    api: Literal["completions", "chat"] = "completions"
    """Which API to call."""
    allow_remote: Annotated[bool, Parameter(negative="")] = False
    """Permit a target that is not this machine: load can hurt a shared endpoint, and cost money."""
    timeout: str = "120s"
    """Longest wait for one answer."""


@Parameter(name="*", group="Traffic")
@dataclass(frozen=True)
class Traffic:
    """When requests are sent."""

    rate: float | None = None
    """Open loop: requests a second, whatever the endpoint does."""
    arrivals: Literal["poisson", "fixed"] = "poisson"
    """Gaps of the open loop."""
    concurrency: int | None = None
    """Closed loop: requests in flight. 8 when neither a rate nor a trace is given."""
    trace: Annotated[str | None, Parameter(name=["--trace", "--workload"])] = None
    """Replay a recorded trace (Azure CSV, Mooncake JSON lines, columns at_s, input_tokens, output_tokens), or draw a
    workload: azure-conv:rate=2, poisson:rate=5,input=700,output=140."""
    speedup: float = 1.0
    """Replay a trace that many times faster."""
    requests: Annotated[int | None, Parameter(name=["--requests", "--limit"])] = None
    """Send at most that many. 100 without --duration; a whole trace."""
    duration: str | None = None
    """Send nothing more after this long."""
    warmup: int = 4
    """Requests before the clock starts, not counted."""
    max_in_flight: int = 1024
    """Bound of the open loop."""
    seed: int = 0
    """Same seed, same load."""


@Parameter(name="*", group="Content")
@dataclass(frozen=True)
class Content:
    """What requests hold."""

    input_tokens: Annotated[str, Parameter(name=["--input-tokens", "--input"])] = "128"
    """Prompt length: 128, 64-256, normal:128:32 or lognormal:128:0.5."""
    output_tokens: Annotated[str, Parameter(name=["--output-tokens", "--output"])] = "128"
    """Answer length, in the same forms."""
    prompts: Literal["ids", "text"] | None = None
    """Random token ids (exact length) or English words (about one token each). ids, or text for chat."""
    vocab: int = 32_000
    """Token ids are drawn from 1000 to this."""
    shared_tokens: int = 0
    """Tokens at the start of every prompt that are the same, for prefix caches."""
    max_input: int | None = None
    """Cut longer prompts of a trace."""
    max_output: int | None = None
    """Cut longer answers of a trace."""
    temperature: float = 0.0
    """Sampling temperature."""
    ignore_eos: bool = True
    """Ask for answers of exactly the length wanted."""


@Parameter(name="*", group="Results")
@dataclass(frozen=True)
class Results:
    """What is kept of it."""

    slo: str | None = None
    """Service level for goodput: ttft=200ms,tpot=50ms (also itl, e2e)."""
    out: Path | None = None
    """Write one JSON line for each request."""
    plot: Path | None = None
    """Draw latency and throughput into a .png, .svg or .pdf."""


@app.default
def bench_serve(
    *,
    target: Target = Target(),
    traffic: Traffic = Traffic(),
    content: Content = Content(),
    results: Results = Results(),
    json: JsonFlag = False,
) -> int:
    """Put load on an OpenAI-compatible endpoint and measure it at the client.

    Reports percentiles of TTFT, ITL, TPOT and E2E, token and request rates,
    goodput under a service level, and refusals and errors apart. Ctrl-C ends
    the run and reports what was measured so far.
    """
    from megalith.serve.load_http import parse_endpoint
    from megalith.serve.load_report import build_report, parse_slo

    slo = parse_slo(results.slo) if results.slo else None
    _check(traffic, content, results)
    endpoint = parse_endpoint(target.url, target.api_key or os.environ.get("OPENAI_API_KEY", ""))
    if not endpoint.is_loopback() and not target.allow_remote:
        hint = "Add --allow-remote if it is yours and may be loaded."
        raise ConfigError(f"{endpoint.url} is not on this machine.", hint)
    run, interrupted = asyncio.run(_measure(endpoint, target, traffic, content))
    report = build_report(run.records, run.issued, slo)
    if run.gave_up:
        report.warnings.insert(0, f"The run ended itself: {run.gave_up}.")
    if interrupted:
        report.warnings.insert(0, "Interrupted: these are the figures of what was measured so far.")
    if results.out is not None:
        _write_records(run.records, results.out)
    if results.plot is not None:
        _plot(run.records, slo, f"{run.config.model} at {endpoint.url}", results.plot)
    _print(report, run, json=json)
    return _INTERRUPTED if interrupted else int(report.ok == 0)


def _check(traffic: Traffic, content: Content, results: Results) -> None:
    """Refuse contradictions before any request is sent."""
    ways = [
        name for name in ("--rate", "--concurrency", "--trace") if getattr(traffic, name.removeprefix("--")) is not None
    ]
    if len(ways) > 1:
        raise ConfigError(f"{' and '.join(ways)} are different kinds of load.", "Give one of them.")
    positive = {
        "--rate": traffic.rate, "--concurrency": traffic.concurrency, "--requests": traffic.requests,
        "--max-in-flight": traffic.max_in_flight, "--max-input": content.max_input, "--max-output": content.max_output,
    }  # fmt: skip
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise ConfigError(f"{name} is {value:g}.", "Give a number above 0.")
    if content.vocab <= 1000:
        raise ConfigError(f"--vocab {content.vocab} leaves no token ids: they start at 1000.", "Give at least 2000.")
    for path in (results.out, results.plot):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"There is no folder {path.parent}.", "Make it, or name another file.")
    if results.plot is not None:
        from megalith.report.plot import check_plot_path

        check_plot_path(results.plot)


def _workload(traffic: Traffic, content: Content) -> WorkloadSpec:
    """What is to be sent, from --trace or from the flags."""
    import msgspec

    from megalith.specs.arrivals import ClosedLoop
    from megalith.specs.workload import WorkloadSpec
    from megalith.specs.workload_text import parse_workload

    if traffic.trace is None:
        return WorkloadSpec(
            max_input_tokens=content.max_input, max_output_tokens=content.max_output, **_drawn(traffic, content)
        )
    spec = parse_workload(traffic.trace)
    if isinstance(spec.arrivals, ClosedLoop) and spec.arrivals.think_s:
        raise ConfigError(
            f"Clients that think for {spec.arrivals.think_s:g} s cannot be played here.", "Leave think out."
        )
    limits: dict[str, Any] = {"max_input_tokens": content.max_input, "max_output_tokens": content.max_output}
    changes = {name: limit for name, limit in limits.items() if limit is not None}
    return msgspec.structs.replace(spec, speedup=spec.speedup * traffic.speedup, **changes)


def _drawn(traffic: Traffic, content: Content) -> dict[str, Any]:
    from megalith.specs.arrivals import ClosedLoop, PoissonArrivals, SteadyArrivals
    from megalith.specs.lengths import parse_lengths

    arrivals: ClosedLoop | PoissonArrivals | SteadyArrivals
    if traffic.rate is None:
        arrivals = ClosedLoop(clients=traffic.concurrency or _CLIENTS)
    else:
        arrivals = (PoissonArrivals if traffic.arrivals == "poisson" else SteadyArrivals)(rate_per_s=traffic.rate)
    lengths = {"input": parse_lengths(content.input_tokens), "output": parse_lengths(content.output_tokens)}
    return {**lengths, "arrivals": arrivals}


async def _measure(endpoint: Endpoint, target: Target, traffic: Traffic, content: Content) -> tuple[LoadRun, bool]:
    """Run the load under a progress bar; the flag says whether Ctrl-C ended it."""
    from megalith.serve.load_run import LoadConfig, LoadRun, served_models
    from megalith.serve.load_workload import PromptMaker
    from megalith.specs.workload import open_workload

    kind = content.prompts or ("text" if target.api == "chat" else "ids")
    prompts = PromptMaker(kind, traffic.seed, (1000, content.vocab), content.shared_tokens)
    workload = _workload(traffic, content)
    limit = traffic.requests or (None if traffic.duration else 100 if workload.endless else _MAX_REQUESTS)
    config = LoadConfig(
        model=target.model or (await served_models(endpoint))[0],
        api=target.api,
        concurrency=getattr(workload.arrivals, "clients", _CLIENTS),
        max_in_flight=traffic.max_in_flight,
        max_requests=limit or _MAX_REQUESTS,
        duration_s=parse_duration_ns(traffic.duration) / 1e9 if traffic.duration else None,
        timeout_s=parse_duration_ns(target.timeout) / 1e9,
        warmup=traffic.warmup,
        temperature=content.temperature,
        ignore_eos=content.ignore_eos,
        seed=traffic.seed,
    )
    run = LoadRun(endpoint, config, prompts)
    interrupted = False

    def on_interrupt() -> None:
        nonlocal interrupted
        interrupted = True
        run.stop()

    loop = asyncio.get_running_loop()
    with suppress(NotImplementedError):
        loop.add_signal_handler(signal.SIGINT, on_interrupt)
    shown = None if limit == _MAX_REQUESTS else limit
    with progress(f"load on {config.model}", total=shown, unit="requests") as advance:
        await run.run(open_workload(workload, traffic.seed), lambda _: advance(1))
    return run, interrupted


def _write_records(records: list[RequestRecord], path: Path) -> None:
    import msgspec

    encoder = msgspec.json.Encoder()
    with path.open("wb") as file:
        for record in sorted(records, key=lambda r: r.index):
            file.write(encoder.encode(record) + b"\n")


def _plot(records: list[RequestRecord], slo: Slo | None, title: str, path: Path) -> None:
    from megalith.report.plot import LoadPicture, plot_load

    done = [record for record in records if record.outcome == "ok"]
    finished: list[tuple[int, float]] = []
    for record in done:
        at_ns = record.first_ns or record.end_ns
        share = record.output_tokens / max(1, record.pieces)
        for gap_ns in (0, *record.itl_ns):
            at_ns += gap_ns
            finished.append((at_ns, share))
    latencies = {
        "TTFT": [r.ttft_ns for r in done if r.ttft_ns is not None],
        "ITL": [gap for r in done for gap in r.itl_ns],
        "TPOT": [r.tpot_ns for r in done if r.tpot_ns is not None],
        "E2E": [r.e2e_ns for r in done],
    }
    limits = {"TTFT": slo.ttft_ns, "ITL": slo.itl_ns} if slo else {}
    set_limits = {name: limit for name, limit in limits.items() if limit is not None}
    plot_load(LoadPicture(title, "measured", latencies, finished, set_limits), path)


def _print(report: LoadReport, run: LoadRun, *, json: bool) -> None:
    if json:
        facts: dict[str, Any] = {"endpoint": run.endpoint.url, "nature": "measured", "config": run.config}
        print_json({**facts, "report": report})
        return
    console = result_console()
    console.print(f"\n[bold]{run.config.model}[/] at {run.endpoint.url}, measured at the client", highlight=False)
    console.print(_rates(report).to_rich())
    console.print(latency_table(report).to_rich())
    for error, count in report.error_kinds.items():
        console.print(f"  {count} x {error}", markup=False)
    for warning in report.warnings:
        warn(warning)


def latency_table(report: LoadReport) -> Table:
    """TTFT, ITL, TPOT and E2E by percentile, and how late the client sent."""
    from megalith.report.table import Column, Table

    figures = ("mean", "p50", "p90", "p95", "p99", "maximum")
    columns = [Column("metric", "latency"), Column("count", "samples", "count")]
    table = Table([*columns, *(Column(f"{name}_ns", name, "duration_ns", "measured") for name in figures)])
    rows = {"TTFT": report.ttft_ns, "ITL": report.itl_ns, "TPOT": report.tpot_ns, "E2E": report.e2e_ns}
    for name, summary in rows.items():
        if summary is not None:
            table.add(name, summary.count, *(getattr(summary, figure) for figure in figures))
    return table


def _rates(report: LoadReport) -> Table:
    from megalith.report.table import Column, Table, render_number

    table = Table([Column("what", "load"), Column("figure", "figure", nature="measured")])
    parts = {"refused (429)": report.refused, "errors": report.errors, "timed out": report.timeouts,
             "cut off": report.cancelled}  # fmt: skip
    bad = "".join(f", {count} {name}" for name, count in parts.items() if count)
    table.add("requests", f"{report.ok} of {report.issued} answered{bad} in {format_duration(report.duration_ns)}")
    table.add("request rate", f"{render_number(report.request_rate)} a second")
    table.add("output", f"{render_number(report.output_rate)} tokens/s ({report.output_tokens:,} tokens)")
    table.add("prompt + output", f"{render_number(report.total_rate)} tokens/s")
    cached = f", {report.cached_tokens:,} of them cached" if report.cached_tokens else ""
    table.add("prompts", f"{report.input_tokens:,} tokens{cached}")
    table.add("in flight", f"{render_number(report.mean_in_flight)} on average")
    if report.goodput is not None and report.good is not None:
        share = 100 * (report.good_share or 0.0)
        table.add("goodput", f"{render_number(report.goodput)} requests/s within the level ({share:.1f} % of all)")
    return table
