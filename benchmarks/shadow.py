"""Real against simulated: the live engine and the simulator on the same traces, latency by latency.

    python benchmarks/shadow.py [--clock processor|wall] [--driver loop|service] [--repeats 2] [--out shadow.jsonl]

Each run of the live engine (SmolLM2 135M, native backend, one thread, random prompts of the trace's lengths) writes a
decision log. Logs of calibration runs give this machine's profile (`cost.calibrate_steps`); every log, also those of
the reported traces, is replayed into fresh policy objects, which must decide the same. Then the simulator runs each
reported trace on one instance with the same scheduler options and that profile. No reported run is ever fitted.

`--clock processor` drives the engine on the processor time of its own thread, arrivals on the same clock and idle time
jumped over, so that other programs on the machine do not count to first order. They still share caches and memory, and
a virtual machine's speed wanders by itself; so calibration traces run beside each reported one on a second engine, in
turns of a quarter of a second, and say how fast the machine was at each moment. The profile is of all calibration steps
together; the simulated device is slower or faster at a moment as the calibration steps around that moment were
(`--steady`: as those of the whole run were).
`--clock wall` waits in real time; a calibration run comes before each reported one. `--driver service` goes through
the asyncio engine, as the server does (wall only).
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import itertools
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
from megalith.policy.kv import KvAccount
from megalith.policy.scheduler import Limits, Scheduler
from megalith.report.percentiles import percentile
from megalith.sim.build import Builder
from megalith.sim.record import Recorder
from megalith.sim.recorded import recorded_steps
from megalith.sim.run import Run
from megalith.sim.scenario import Scenario
from megalith.sim.shadow import replay
from megalith.specs.arrivals import Arrivals, OnOffArrivals, PoissonArrivals
from megalith.specs.fleet import FleetSpec, PolicySpec, PoolSpec
from megalith.specs.lengths import LognormalLength, QuantileLength
from megalith.specs.shape import RequestShape
from megalith.specs.workload import WorkloadSpec, open_workload

POLICIES = ("splitfuse", "prefill-first")
BUDGET, SEQUENCES, BLOCK_TOKENS, BLOCKS, CONTEXT = 128, 32, 16, 1200, 1200
METRICS = ("ttft", "tpot", "e2e")
BARS = {50: 0.10, 99: 0.20}
CHAT_IN, CHAT_OUT = LognormalLength(median=60, sigma=0.7), LognormalLength(median=32, sigma=0.6)
# Seven in eight are short; the others are documents of 400 to 900 tokens.
LONG_IN = QuantileLength(points=((0.0, 16), (0.44, 50), (0.87, 120), (0.88, 400), (1.0, 900)))


def _trace(requests: int, arrivals: Arrivals, long: bool = False) -> WorkloadSpec:
    return WorkloadSpec(
        input=LONG_IN if long else CHAT_IN, output=CHAT_OUT, arrivals=arrivals, requests=requests,
        max_input_tokens=1000, max_output_tokens=160, max_new="true",
    )  # fmt: skip


TRACES = {
    "short chat, Poisson": (_trace(130, PoissonArrivals(rate_per_s=2.4)), 31),
    "long prompts in the mix": (_trace(80, PoissonArrivals(rate_per_s=1.1), long=True), 32),
    "bursts": (_trace(130, OnOffArrivals(rate_per_s=2.2, on_s=1.0, off_s=3.0)), 33),
}
"""The engine is busy for half to two thirds of the minute that each takes; a burst brings ten requests in a second."""
CALIBRATION = {
    "calibration: chat": (_trace(70, PoissonArrivals(rate_per_s=2.5)), 101),
    "calibration: mix in bursts": (_trace(60, OnOffArrivals(rate_per_s=2.0, on_s=3.0, off_s=3.0), long=True), 102),
}
TURN_NS, WINDOW_TURNS = NS_PER_S // 4, 4
"""How long reported run and calibration take turns; turns before and after one that say how fast the machine was."""


def main() -> None:
    """Record, fit, replay, simulate, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clock", choices=["processor", "wall"], default="processor")
    parser.add_argument("--driver", choices=["loop", "service"], default="loop")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steady", action="store_true", help="one speed of the machine for the whole of a run")
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
        for name in TRACES:
            for policy in POLICIES:
                live.run(LiveRun(name, policy, repeat, folder))
    others = load.other_cores(time.process_time() - used_s)
    cost = live.cost()
    steps = [step for run in live.runs for step in run.calibration_steps()]
    fitted = with_rates(cost, fit_steps(cost, steps))
    print(f"fitted on {len(steps)} steps of the calibration runs", file=sys.stderr)
    row: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "commit": machine.commit(),
        "machine": machine.describe(), "clock": options.clock, "driver": options.driver, "repeats": options.repeats,
        "steady": options.steady,
        "other_cores": round(others, 2), "fit_steps": len(steps), "rates": msgspec.to_builtins(fitted.profile.rates),
        "shadow": [shadow(log, policy) for run in live.runs for log, policy in run.logs()],
    }  # fmt: skip
    row["rows"] = [
        compare([run for run in live.runs if (run.trace, run.policy) == (name, policy)], fitted, options.steady)
        for name in TRACES
        for policy in POLICIES
    ]
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
class LiveRun:
    """One run of the live engine on a reported trace, and the calibration beside it."""

    trace: str
    policy: str
    repeat: int
    folder: Path
    times: dict[int, Times] = field(default_factory=dict)
    calibration: list[tuple[Path, str]] = field(default_factory=list)
    """Logs and their policies."""
    turns: list[tuple[int, int]] = field(default_factory=list)
    """(time of this run, calibration steps so far) after each turn."""

    @property
    def name(self) -> str:
        return f"{self.trace}-{self.policy}-{self.repeat}".replace(" ", "_").replace(",", "")

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.jsonl.gz"

    def calibration_log(self, policy: str) -> Path:
        """The name of one more, which is noted."""
        log = self.folder / f"{self.name}-calibration-{len(self.calibration)}.jsonl.gz"
        self.calibration.append((log, policy))
        return log

    def logs(self) -> list[tuple[Path, str]]:
        return [(self.log, self.policy), *self.calibration]

    def calibration_steps(self) -> list[TimedStep]:
        return [step for log, _ in self.calibration for step in recorded_steps(log)]

    def speeds(self, cost: CostModel, steady: bool) -> list[tuple[int, float]]:
        """(time from which on, factor on predicted step times), from the calibration steps around each turn."""
        steps, turns = self.calibration_steps(), len(self.turns)
        if steady or not turns:
            return [(0, 1.0 / (1.0 + bias(cost, steps)))]
        begins, counts = [0, *[at_ns for at_ns, _ in self.turns]], [0, *[count for _, count in self.turns]]
        speeds = []
        for i in range(turns):
            around = steps[counts[max(0, i - WINDOW_TURNS)] : counts[min(turns, i + WINDOW_TURNS + 1)]]
            if around:
                speeds.append((begins[i], 1.0 / (1.0 + bias(cost, around))))
        return speeds

    def keep(self) -> None:
        """The measured times, beside the log."""
        values = {number: [t.due_ns, t.first_ns, t.finish_ns, t.output_tokens] for number, t in self.times.items()}
        (self.folder / f"{self.name}.times.json").write_text(json.dumps(values))


class RunClock:
    """The engine's clock: the processor time of this thread plus what idle time was jumped over, or the wall.

    It can be stopped: then it stands still until it is started again.
    """

    def __init__(self, kind: str) -> None:
        self._read: Callable[[], int] = time.thread_time_ns if kind == "processor" else time.monotonic_ns
        self._jumps = kind == "processor"
        self._shift_ns = -self._read()
        self._stopped_ns = 0

    def now_ns(self) -> int:
        return self._read() + self._shift_ns

    def stop(self) -> None:
        self._stopped_ns = self.now_ns()

    def start(self) -> None:
        self._shift_ns = self._stopped_ns - self._read()

    def wait_until(self, at_ns: int) -> None:
        if self._jumps:
            self._shift_ns += max(0, at_ns - self.now_ns())
        else:
            time.sleep(max(0, at_ns - self.now_ns()) / NS_PER_S)


class LiveEngine:
    """The live engine, run by run over one loaded model (the service loads its own each time)."""

    def __init__(self, clock: str, driver: str, folder: Path) -> None:
        self.clock, self.driver, self.folder = clock, driver, folder
        self.runs: list[LiveRun] = []
        self.built = build_engine(config("prefill-first"))
        self.beside = build_engine(config("prefill-first"))
        """Runs the calibration traces."""
        self._cycle = itertools.cycle([(name, policy) for name in CALIBRATION for policy in POLICIES])
        for built in (self.built, self.beside):
            engine = self._engine(built, "splitfuse", RunClock("wall"))
            for admitted in list(self._admitted("calibration: chat"))[:8]:
                engine.add(admitted)
            while engine.has_work:
                engine.step()

    def cost(self) -> CostModel:
        """The cost model of this model and runner with rates that are no measurement yet."""
        planned = resolve(str(self.built.model.files.path))
        profile = plan_machine.uncalibrated("native", 1, plan_machine.stored_facts())
        return CostModel(self.built.model.spec, profile, planned.weights("native", None), self.built.fit.plan.kv_format)

    def run(self, run: LiveRun) -> None:
        """Do it, with a calibration beside it or before it."""
        begin = time.perf_counter()
        if self.clock == "processor":
            self._in_turns(run)
        else:
            trace, policy = next(self._cycle)
            self._wall(trace, policy, run.calibration_log(policy), {})
            self._wall(run.trace, run.policy, run.log, run.times)
        run.keep()
        self.runs.append(run)
        span_s = max(times.finish_ns for times in run.times.values()) / NS_PER_S
        print(f"{run.name}: {span_s:.1f} s of trace in {time.perf_counter() - begin:.1f} s", file=sys.stderr)

    def _in_turns(self, run: LiveRun) -> None:
        """The reported run and calibrations take turns."""
        clock = RunClock("processor")
        engine = self._engine(self.built, run.policy, clock, run.log)
        calibration = self._calibration(run)
        for now_ns in through_loop(engine, clock, list(self._admitted(run.trace)), run.times):
            run.turns.append((now_ns, next(calibration)))
        calibration.close()

    def _calibration(self, run: LiveRun) -> Iterator[int]:
        """Calibration traces one after another until nobody asks any more; gives the number of steps so far."""
        before = 0
        while True:
            trace, policy = next(self._cycle)
            clock = RunClock("processor")
            engine = self._engine(self.beside, policy, clock, run.calibration_log(policy))
            for _ in through_loop(engine, clock, list(self._admitted(trace)), {}):
                yield before + engine.stats().steps
            before += engine.stats().steps

    def _wall(self, trace: str, policy: str, log: Path, times: dict[int, Times]) -> None:
        """One run in real time."""
        if self.driver == "service":
            asyncio.run(through_service(trace, policy, log, times))
            return
        clock = RunClock("wall")
        for _ in through_loop(self._engine(self.built, policy, clock, log), clock, list(self._admitted(trace)), times):
            pass

    def _engine(self, built: BuiltEngine, policy: str, clock: RunClock, log: Path | None = None) -> Engine:
        kv, limits = account()
        batching = by_name(policy, BUDGET)
        if log is None:
            return Engine(built.runner, Scheduler(batching, kv, limits), clock)
        return Engine(built.runner, RecordingScheduler(batching, kv, limits, clock, log, "smollm2"), clock)

    def _admitted(self, trace: str) -> Iterator[Admitted]:
        model, random = self.built.model, np.random.default_rng(5)
        for shape in shapes_of(trace):
            prompt = random.integers(64, 40_000, shape.input_tokens).astype(np.int32)
            new, eos = shape.output_tokens, model.tokenizer.eos_ids
            yield Admitted(
                shape.index, prompt, greedy(new), new, 0, eos, model.tokenizer.stream(), None, 0, shape.at_ns or 0
            )


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


def through_loop(engine: Engine, clock: RunClock, requests: list[Admitted], times: dict[int, Times]) -> Iterator[int]:
    """The engine's own loop: whoever is due is added between steps. After each turn its clock stops, and it gives the
    time and lets others run."""
    following, turn_ends_ns = 0, TURN_NS
    try:
        while following < len(requests) or engine.has_work:
            if not engine.has_work:
                clock.wait_until(requests[following].arrival_ns)
            while following < len(requests) and requests[following].arrival_ns <= clock.now_ns():
                due = requests[following]
                engine.add(due)
                times[due.id] = Times(due.arrival_ns, due.max_new)
                following += 1
            emitted = engine.step()
            now_ns = clock.now_ns()
            for number, delta in emitted:
                entry = times[number]
                entry.first_ns = entry.first_ns or now_ns
                if delta.finish_reason is not None:
                    entry.finish_ns = now_ns
            if now_ns >= turn_ends_ns:
                clock.stop()
                yield now_ns
                clock.start()
                turn_ends_ns = now_ns + TURN_NS
    finally:
        if isinstance(engine.scheduler, RecordingScheduler):
            engine.scheduler.close()


async def through_service(trace: str, policy: str, log: Path, all_times: dict[int, Times]) -> None:
    """Through the asyncio engine with its own thread, in wall time."""
    built = build_engine(config(policy, str(log)))
    random = np.random.default_rng(5)
    await built.engine.start()
    async for _ in built.engine.generate([5] * 32, greedy(8)):
        pass
    begin_ns = time.monotonic_ns()

    async def one(shape: RequestShape, prompt: list[int]) -> None:
        due_ns = shape.at_ns or 0
        await asyncio.sleep(max(0, due_ns - (time.monotonic_ns() - begin_ns)) / NS_PER_S)
        times = all_times[shape.index] = Times(due_ns, shape.output_tokens)
        async for _ in built.engine.generate(prompt, greedy(shape.output_tokens)):
            times.finish_ns = time.monotonic_ns() - begin_ns
            times.first_ns = times.first_ns or times.finish_ns

    shapes = shapes_of(trace)
    prompts = [random.integers(64, 40_000, shape.input_tokens).tolist() for shape in shapes]
    await asyncio.gather(*(one(shape, prompt) for shape, prompt in zip(shapes, prompts, strict=True)))
    await built.engine.stop()


# The simulator


class Keeper(Recorder):
    """Keeps every request that ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: list[Any] = []

    def finished(self, live: Any) -> None:
        super().finished(live)
        self.ended.append(live)


def simulated(trace: str, policy: str, cost: CostModel, speeds: list[tuple[int, float]]) -> dict[int, Times]:
    """The trace on one simulated instance of this machine, with the scheduler options of the live engine."""
    workload, seed = TRACES[trace]
    pool = PoolSpec(
        name="here", device="this-machine", count=1, policy=policy, token_budget=BUDGET, max_sequences=SEQUENCES,
        max_waiting=1024 + SEQUENCES, block_tokens=BLOCK_TOKENS, kv_blocks=BLOCKS, watermark=0.01,
    )  # fmt: skip
    scenario = Scenario(
        model=cost.spec.name, fleet=FleetSpec(pools=(pool,), router=PolicySpec("round-robin")), workload=workload,
        seed=seed, timer="analytic", max_context=CONTEXT,
    )  # fmt: skip
    keeper = Keeper()
    run = Run(scenario, Builder(scenario, cost.spec, {"this-machine": cost.profile}), keeper)
    (instance,) = run.cluster.instances.values()
    instance.timer = AnalyticTimer(cost, speeds[0][1])

    def change_speed(factor: float) -> None:
        instance.interrupt(run.kernel.now_ns)
        instance.timer = AnalyticTimer(cost, factor)

    for at_ns, factor in speeds[1:]:
        run.kernel.at(at_ns, change_speed, factor)
    while run.advance():
        pass
    return {
        live.request.id: Times(live.request.arrival_ns, live.output_tokens, live.first_ns, live.finish_ns)
        for live in keeper.ended
    }


# The comparison


def shadow(log: Path, policy: str) -> dict[str, Any]:
    """The shadow test of one run, with two controls."""
    report = replay(log)
    other = next(name for name in POLICIES if name != policy)
    caught = [not replay(log, token_budget=BUDGET // 2).identical, not replay(log, policy=other).identical]
    return {
        "log": log.name, "identical": report.identical, "calls": sum(report.calls.values()),
        "plans": report.calls["plan"], "steps": report.steps, "controls_caught": caught,
        "difference": str(report.difference or ""),
    }  # fmt: skip


def compare(runs: list[LiveRun], cost: CostModel, steady: bool) -> dict[str, Any]:
    """Percentiles of all repeats together against those simulated, and the repeats against each other."""
    name, policy = runs[0].trace, runs[0].policy
    factors = [1.0 / (1.0 + bias(cost, run.calibration_steps())) for run in runs]
    model = [simulated(name, policy, cost, run.speeds(cost, steady)) for run in runs]
    found: dict[str, Any] = {
        "trace": name, "policy": policy, "requests": len(model[0]), "factors": [round(f, 4) for f in factors],
        "step_time_bias": [
            round((1.0 + bias(cost, recorded_steps(run.log))) * factor - 1.0, 4)
            for run, factor in zip(runs, factors, strict=True)
        ], "metrics": {},
    }  # fmt: skip
    for metric in METRICS:
        real, virtual = ([sorted(columns(t, metric)) for t in all_] for all_ in ([r.times for r in runs], model))
        found["metrics"][metric] = {f"p{p}": versus(real, virtual, p, bar) for p, bar in BARS.items()}
    return found


def versus(real: list[list[int]], virtual: list[list[int]], percent: int, bar: float) -> dict[str, Any]:
    """One percentile of all repeats together, measured and simulated."""
    measured, model = (percentile(sorted(v for values in all_ for v in values), percent) for all_ in (real, virtual))
    each = [percentile(values, percent) for values in real]
    error = model / measured - 1.0
    return {
        "measured_ns": measured, "simulated_ns": model, "error": round(error, 4), "met": abs(error) <= bar,
        "runs_ns": each, "runs_simulated_ns": [percentile(values, percent) for values in virtual],
        "spread": round((max(each) - min(each)) / statistics.mean(each), 4),
    }  # fmt: skip


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
