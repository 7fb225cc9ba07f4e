"""Real against simulated: the live engine and the simulator on the same traces, latency by latency.

    python benchmarks/shadow.py [--clock processor|wall] [--driver loop|service] [--repeats 2] [--out shadow.jsonl]

Each run of the live engine (SmolLM2 135M, native backend, one thread, random prompts of the trace's lengths) writes a
decision log. Logs of the calibration traces give this machine's profile (`cost.calibrate_steps`); every log, also those
of the reported traces, is replayed into fresh policy objects, which must decide the same. Then the simulator's instance
runs each reported trace over the same scheduler options and that profile. No reported run is ever fitted.

`--clock processor` drives the engine on the processor time of its own thread, arrivals on the same clock and idle time
jumped over, so that other programs on the machine do not count to first order (they still share caches and memory).
`--clock wall` waits in real time. `--driver service` goes through the asyncio engine, as the server does (wall only).
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
import msgspec
import numpy as np

from megalith.base.units import NS_PER_S
from megalith.cost.calibrate import with_rates
from megalith.cost.calibrate_steps import TimedStep, bias, fit_steps
from megalith.cost.compute import CostModel
from megalith.cost.timer_analytic import AnalyticTimer
from megalith.engine.api import EngineConfig
from megalith.engine.engine import Engine
from megalith.engine.launch import BuiltEngine, build_engine
from megalith.engine.params import SamplingParams
from megalith.engine.record import RecordingScheduler
from megalith.engine.sequence import Admitted
from megalith.plan import machine as plan_machine
from megalith.plan.source import resolve
from megalith.policy.batching import by_name
from megalith.policy.facts import Request
from megalith.policy.kv import KvAccount
from megalith.policy.scheduler import Limits, Scheduler
from megalith.report.percentiles import percentile
from megalith.sim.instance import Instance
from megalith.sim.kernel import Kernel
from megalith.sim.live import Live
from megalith.sim.recorded import recorded_steps
from megalith.sim.shadow import replay
from megalith.specs.arrivals import Arrivals, OnOffArrivals, PoissonArrivals
from megalith.specs.lengths import LognormalLength, QuantileLength
from megalith.specs.shape import RequestShape
from megalith.specs.workload import WorkloadSpec, open_workload

POLICIES = ("splitfuse", "prefill-first")
BUDGET, SEQUENCES, BLOCK_TOKENS, BLOCKS, CONTEXT = 128, 32, 16, 1200, 1200
METRICS = ("ttft", "tpot", "e2e")
BARS = {50: 0.10, 99: 0.20}
CHAT_IN, CHAT_OUT = LognormalLength(median=60, sigma=0.7), LognormalLength(median=32, sigma=0.6)
# Four in five are short; the others are documents of 400 to 900 tokens.
LONG_IN = QuantileLength(points=((0.0, 16), (0.4, 50), (0.8, 120), (0.81, 400), (1.0, 900)))


def _trace(requests: int, arrivals: Arrivals, long: bool = False) -> WorkloadSpec:
    return WorkloadSpec(
        input=LONG_IN if long else CHAT_IN, output=CHAT_OUT, arrivals=arrivals, requests=requests,
        max_input_tokens=1000, max_output_tokens=160, max_new="true",
    )  # fmt: skip


TRACES = {
    "short chat, Poisson": (_trace(130, PoissonArrivals(rate_per_s=3.0)), 11),
    "long prompts in the mix": (_trace(100, PoissonArrivals(rate_per_s=2.0), long=True), 12),
    "bursts": (_trace(120, OnOffArrivals(rate_per_s=2.6, on_s=2.0, off_s=4.0)), 22),
}
CALIBRATION = {
    "calibration: chat": (_trace(70, PoissonArrivals(rate_per_s=2.5)), 101),
    "calibration: mix in bursts": (_trace(60, OnOffArrivals(rate_per_s=2.0, on_s=3.0, off_s=3.0), long=True), 102),
}


def main() -> None:
    """Record, fit, replay, simulate, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clock", choices=["processor", "wall"], default="processor")
    parser.add_argument("--driver", choices=["loop", "service"], default="loop")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--logs", type=Path, help="keep the decision logs and measured times in this new folder")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("shadow.jsonl"))
    options = parser.parse_args()
    if options.driver == "service" and options.clock != "wall":
        parser.error("the service runs on the wall clock: add --clock wall")
    if options.clock == "wall":
        machine.raise_priority()
    if options.logs:
        options.logs.mkdir(parents=True)
        study(options, options.logs)
        return
    with tempfile.TemporaryDirectory() as folder:
        study(options, Path(folder))


def study(options: argparse.Namespace, folder: Path) -> None:
    """All runs in turn, so that a busy spell hits them alike; then the comparison."""
    live = LiveEngine(options.clock, options.driver, folder)
    load, used_s = machine.Load(), time.process_time()
    for repeat in range(options.repeats):
        for name in (*CALIBRATION, *TRACES):
            for policy in POLICIES:
                live.run(name, policy, repeat)
    others = load.other_cores(time.process_time() - used_s)
    cost = live.cost()
    steps = [step for name in CALIBRATION for run in live.runs_of(name) for step in recorded_steps(run.log)]
    fitted = with_rates(cost, fit_steps(cost, steps))
    print(f"fitted on {len(steps)} steps of the calibration runs", file=sys.stderr)
    row: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "commit": machine.commit(),
        "machine": machine.describe(), "clock": options.clock, "driver": options.driver, "repeats": options.repeats,
        "other_cores": round(others, 2), "fit_steps": len(steps), "rates": msgspec.to_builtins(fitted.profile.rates),
        "shadow": [shadow(run) for run in live.runs], "rows": [],
    }  # fmt: skip
    for name in TRACES:
        for policy in POLICIES:
            row["rows"].append(compare(name, policy, live.runs_of(name, policy), fitted))
    with options.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(table(row))


def shapes_of(name: str) -> list[RequestShape]:
    spec, seed = {**TRACES, **CALIBRATION}[name]
    return list(open_workload(spec, seed))


# The live engine


@dataclass
class Times:
    """When a request came, had its first token, and ended; ns on the clock of the run."""

    due_ns: int
    output_tokens: int
    first_ns: int = 0
    finish_ns: int = 0

    def metrics(self) -> dict[str, int]:
        first, last = self.first_ns, self.finish_ns
        values = {"ttft": first - self.due_ns, "e2e": last - self.due_ns}
        return values | ({"tpot": (last - first) // (self.output_tokens - 1)} if self.output_tokens > 1 else {})


@dataclass
class Run:
    """One run of the live engine."""

    trace: str
    policy: str
    repeat: int
    log: Path
    times: dict[int, Times] = field(default_factory=dict)


class RunClock:
    """The engine's clock: the processor time of this thread plus what idle time was jumped over, or the wall."""

    def __init__(self, kind: str) -> None:
        self._read: Callable[[], int] = time.thread_time_ns if kind == "processor" else time.monotonic_ns
        self._jumps = kind == "processor"
        self._shift_ns = -self._read()

    def now_ns(self) -> int:
        return self._read() + self._shift_ns

    def wait_until(self, at_ns: int) -> None:
        if self._jumps:
            self._shift_ns += max(0, at_ns - self.now_ns())
        else:
            time.sleep(max(0, at_ns - self.now_ns()) / NS_PER_S)


class LiveEngine:
    """The live engine, run by run over one loaded model (the service loads its own each time)."""

    def __init__(self, clock: str, driver: str, folder: Path) -> None:
        self.clock, self.driver, self.folder = clock, driver, folder
        self.runs: list[Run] = []
        self.built: BuiltEngine = build_engine(config("prefill-first"))
        self._warm_up()

    def runs_of(self, trace: str, policy: str = "") -> list[Run]:
        return [run for run in self.runs if run.trace == trace and policy in ("", run.policy)]

    def cost(self) -> CostModel:
        """The cost model of this model and runner with rates that are no measurement yet."""
        planned = resolve(str(self.built.model.files.path))
        profile = plan_machine.uncalibrated("native", 1, plan_machine.stored_facts())
        return CostModel(self.built.model.spec, profile, planned.weights("native", None), self.built.fit.plan.kv_format)

    def run(self, trace: str, policy: str, repeat: int) -> None:
        log = self.folder / f"{trace}-{policy}-{repeat}.jsonl.gz".replace(" ", "_").replace(":", "").replace(",", "")
        run = Run(trace, policy, repeat, log)
        begin = time.perf_counter()
        if self.driver == "service":
            asyncio.run(through_service(run))
        else:
            clock = RunClock(self.clock)
            kv, limits = account()
            scheduler = RecordingScheduler(by_name(policy, BUDGET), kv, limits, clock, log, "smollm2")
            through_loop(Engine(self.built.runner, scheduler, clock), clock, list(self._admitted(trace)), run)
            scheduler.close()
        self.runs.append(run)
        span_s = max(times.finish_ns for times in run.times.values()) / NS_PER_S
        print(
            f"{trace}, {policy}, run {repeat}: {span_s:.1f} s of trace, {time.perf_counter() - begin:.1f} s wall",
            file=sys.stderr,
        )
        values = {number: [t.due_ns, t.first_ns, t.finish_ns, t.output_tokens] for number, t in run.times.items()}
        log.with_suffix(".times.json").write_text(json.dumps(values))

    def _admitted(self, trace: str) -> Iterator[Admitted]:
        model, random = self.built.model, np.random.default_rng(5)
        for shape in shapes_of(trace):
            prompt = random.integers(64, 40_000, shape.input_tokens).astype(np.int32)
            new, eos = shape.output_tokens, model.tokenizer.eos_ids
            yield Admitted(
                shape.index, prompt, greedy(new), new, 0, eos, model.tokenizer.stream(), None, 0, shape.at_ns or 0
            )

    def _warm_up(self) -> None:
        kv, limits = account()
        engine = Engine(self.built.runner, Scheduler(by_name("splitfuse", BUDGET), kv, limits), RunClock("wall"))
        for admitted in list(self._admitted("short chat, Poisson"))[:8]:
            engine.add(admitted)
        while engine.has_work:
            engine.step()


def config(policy: str, record: str | None = None) -> EngineConfig:
    return EngineConfig(
        model="smollm2", mode="native", policy=policy, token_budget=BUDGET, threads=1, max_context=CONTEXT,
        max_sequences=SEQUENCES, num_blocks=BLOCKS, block_tokens=BLOCK_TOKENS, record=record,
    )  # fmt: skip


def account() -> tuple[KvAccount, Limits]:
    """What `engine.launch` makes of the configuration."""
    kv = KvAccount(BLOCKS, BLOCK_TOKENS, 0, True, watermark_blocks=BLOCKS // 100)
    return kv, Limits(max_sequences=SEQUENCES, max_waiting=1024 + SEQUENCES)


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)


def through_loop(engine: Engine, clock: RunClock, requests: list[Admitted], run: Run) -> None:
    """The engine's own loop: whoever is due is added between steps."""
    following = 0
    while following < len(requests) or engine.has_work:
        if not engine.has_work:
            clock.wait_until(requests[following].arrival_ns)
        while following < len(requests) and requests[following].arrival_ns <= clock.now_ns():
            due = requests[following]
            engine.add(due)
            run.times[due.id] = Times(due.arrival_ns, due.max_new)
            following += 1
        emitted = engine.step()
        now_ns = clock.now_ns()
        for number, delta in emitted:
            times = run.times[number]
            times.first_ns = times.first_ns or now_ns
            if delta.finish_reason is not None:
                times.finish_ns = now_ns


async def through_service(run: Run) -> None:
    """Through the asyncio engine with its own thread, in wall time."""
    built = build_engine(config(run.policy, str(run.log)))
    random = np.random.default_rng(5)
    await built.engine.start()
    async for _ in built.engine.generate([5] * 32, greedy(8)):
        pass
    begin_ns = time.monotonic_ns()

    async def one(shape: RequestShape, prompt: list[int]) -> None:
        due_ns = shape.at_ns or 0
        await asyncio.sleep(max(0, due_ns - (time.monotonic_ns() - begin_ns)) / NS_PER_S)
        times = run.times[shape.index] = Times(due_ns, shape.output_tokens)
        async for _ in built.engine.generate(prompt, greedy(shape.output_tokens)):
            times.finish_ns = time.monotonic_ns() - begin_ns
            times.first_ns = times.first_ns or times.finish_ns

    shapes = shapes_of(run.trace)
    prompts = [random.integers(64, 40_000, shape.input_tokens).tolist() for shape in shapes]
    await asyncio.gather(*(one(shape, prompt) for shape, prompt in zip(shapes, prompts, strict=True)))
    await built.engine.stop()


# The simulator


class Outlet:
    """Where a simulated instance says what happened; the times are in the requests themselves."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


def simulated(trace: str, policy: str, cost: CostModel) -> dict[int, Times]:
    """The trace on the simulator's instance, with the scheduler options of the live engine."""
    kernel = Kernel()
    kv, limits = account()
    instance = Instance(0, kernel, Scheduler(by_name(policy, BUDGET), kv, limits), AnalyticTimer(cost), Outlet())
    lives = []
    for shape in shapes_of(trace):
        request = Request(shape.index, shape.at_ns or 0, shape.input_tokens, shape.output_tokens)
        lives.append(Live(request, shape.output_tokens))
        kernel.at(shape.at_ns or 0, instance.submit, lives[-1])
    kernel.run()
    return {
        live.request.id: Times(live.request.arrival_ns, live.output_tokens, live.first_ns, live.finish_ns)
        for live in lives
    }


# The comparison


def shadow(run: Run) -> dict[str, Any]:
    """The shadow test of one run, with two controls."""
    report = replay(run.log)
    other = next(policy for policy in POLICIES if policy != run.policy)
    caught = [not replay(run.log, token_budget=BUDGET // 2).identical, not replay(run.log, policy=other).identical]
    calls = sum(report.calls.values())
    return {
        "trace": run.trace, "policy": run.policy, "repeat": run.repeat, "identical": report.identical,
        "calls": calls, "plans": report.calls["plan"], "steps": report.steps, "controls_caught": caught,
        "difference": str(report.difference or ""),
    }  # fmt: skip


def compare(name: str, policy: str, runs: list[Run], cost: CostModel) -> dict[str, Any]:
    """Percentiles of all repeats together against those simulated, and the repeats against each other."""
    model = simulated(name, policy, cost)
    found: dict[str, Any] = {"trace": name, "policy": policy, "requests": len(model), "metrics": {}}
    steps: list[TimedStep] = [step for run in runs for step in recorded_steps(run.log)]
    found["step_time_bias"] = round(bias(cost, steps), 4)
    for metric in METRICS:
        by_run = [sorted(columns(run.times, metric)) for run in runs]
        measured, predicted = sorted(value for values in by_run for value in values), sorted(columns(model, metric))
        entry: dict[str, Any] = {}
        for percent, bar in BARS.items():
            real, sim = percentile(measured, percent), percentile(predicted, percent)
            each = [percentile(values, percent) for values in by_run]
            entry[f"p{percent}"] = {
                "measured_ns": real, "simulated_ns": sim, "error": round(sim / real - 1.0, 4),
                "met": abs(sim / real - 1.0) <= bar, "runs_ns": each,
                "spread": round((max(each) - min(each)) / statistics.mean(each), 4),
            }  # fmt: skip
        found["metrics"][metric] = entry
    return found


def columns(times: dict[int, Times], metric: str) -> list[int]:
    return [value for entry in times.values() if (value := entry.metrics().get(metric)) is not None]


def table(row: dict[str, Any]) -> str:
    """Markdown for the docs."""
    lines = [
        "| trace | policy | metric | P50 measured | P50 simulated | error | P99 measured | P99 simulated | error |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    met = total = 0
    for found in row["rows"]:
        for metric, entry in found["metrics"].items():
            cells = [found["trace"], found["policy"], metric.upper()]
            for percent in BARS:
                value = entry[f"p{percent}"]
                met, total = met + value["met"], total + 1
                error = f"{value['error']:+.1%}" if value["met"] else f"**{value['error']:+.1%}**"
                cells += [f"{value['measured_ns'] / 1e6:.1f} ms", f"{value['simulated_ns'] / 1e6:.1f} ms", error]
            lines.append("| " + " | ".join(cells) + " |")
    shadows = row["shadow"]
    identical = sum(entry["identical"] for entry in shadows)
    caught = sum(map(sum, (entry["controls_caught"] for entry in shadows)))
    spreads = [e["spread"] for found in row["rows"] for m in found["metrics"].values() for e in m.values()]
    lines += [
        "",
        f"- {met} of {total} figures within the bars (P50 10 %, P99 20 %); outside ones in bold",
        f"- shadow test: {identical} of {len(shadows)} recorded runs replayed identically "
        f"({sum(e['calls'] for e in shadows)} calls, {sum(e['plans'] for e in shadows)} plans); "
        f"{caught} of {2 * len(shadows)} controls caught",
        f"- clock {row['clock']}, driver {row['driver']}, {row['repeats']} repeats, fitted on {row['fit_steps']} steps",
        f"- the live engine against itself, repeat against repeat: median {statistics.median(spreads):.1%}, "
        f"worst {max(spreads):.1%}",
        f"- others took {row['other_cores']} cores meanwhile; commit {row['commit']}, {row['date']}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
