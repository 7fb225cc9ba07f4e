"""The live side of the shadow test's benchmark: traces, clocks, and runs of the real engine on them (see shadow.py)."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megalith.base.units import NS_PER_S
from megalith.cost.calibrate_steps import TimedStep, bias
from megalith.cost.compute import CostModel
from megalith.engine.api import EngineConfig
from megalith.engine.engine import Engine
from megalith.engine.launch import BuiltEngine, build_engine
from megalith.engine.params import SamplingParams
from megalith.engine.record import RecordingScheduler
from megalith.engine.sequence import Admitted
from megalith.policy.batching import by_name
from megalith.policy.kv import KvAccount
from megalith.policy.scheduler import Limits, Scheduler
from megalith.sim.recorded import recorded_steps
from megalith.specs.arrivals import Arrivals, OnOffArrivals, PoissonArrivals
from megalith.specs.lengths import LognormalLength, QuantileLength
from megalith.specs.shape import RequestShape
from megalith.specs.workload import WorkloadSpec, open_workload

POLICIES = ("splitfuse", "prefill-first")
BUDGET, SEQUENCES, BLOCK_TOKENS, BLOCKS, CONTEXT = 128, 32, 16, 1200, 1200
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


def shapes_of(name: str) -> list[RequestShape]:
    spec, seed = {**TRACES, **CALIBRATION}[name]
    return list(open_workload(spec, seed))


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

    def speeds(self, cost: CostModel, of: str) -> list[tuple[int, float]]:
        """(time from which on, factor on predicted step times), from the calibration steps around each turn."""
        steps, turns = self.calibration_steps(), len(self.turns)
        if of == "none":
            return [(0, 1.0)]
        if of == "run" or not turns:
            return [(0, 1.0 / (1.0 + bias(cost, steps)))]
        begins, counts = [0, *[at_ns for at_ns, _ in self.turns]], [0, *[count for _, count in self.turns]]
        speeds = []
        for i in range(turns):
            around = steps[counts[max(0, i - WINDOW_TURNS)] : counts[min(turns, i + WINDOW_TURNS + 1)]]
            if around:
                speeds.append((begins[i], 1.0 / (1.0 + bias(cost, around))))
        return speeds

    def keep(self) -> None:
        """What was measured, beside the logs, to be read again."""
        kept = {
            "trace": self.trace, "policy": self.policy, "repeat": self.repeat, "turns": self.turns,
            "times": [[i, t.due_ns, t.output_tokens, t.first_ns, t.finish_ns] for i, t in self.times.items()],
            "calibration": [[log.name, policy] for log, policy in self.calibration],
        }  # fmt: skip
        (self.folder / f"{self.name}.run.json").write_text(json.dumps(kept))

    @staticmethod
    def read(path: Path) -> LiveRun:
        """One that was kept."""
        kept = json.loads(path.read_text())
        run = LiveRun(kept["trace"], kept["policy"], kept["repeat"], path.parent)
        run.turns = [(at_ns, count) for at_ns, count in kept["turns"]]
        run.times = {i: Times(*values) for i, *values in kept["times"]}
        run.calibration = [(path.parent / name, policy) for name, policy in kept["calibration"]]
        return run


class RunClock:
    """The engine's clock: the processor time of this thread, or the wall's, plus what idle time was jumped over.

    It can be stopped: then it stands still until it is started again.
    """

    def __init__(self, kind: str) -> None:
        self._read: Callable[[], int] = time.thread_time_ns if kind == "processor" else time.monotonic_ns
        self._shift_ns = -self._read()
        self._stopped_ns = 0

    def now_ns(self) -> int:
        return self._read() + self._shift_ns

    def stop(self) -> None:
        self._stopped_ns = self.now_ns()

    def start(self) -> None:
        self._shift_ns = self._stopped_ns - self._read()

    def wait_until(self, at_ns: int) -> None:
        self._shift_ns += max(0, at_ns - self.now_ns())


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

    def run(self, run: LiveRun) -> None:
        """Do it, with a calibration beside it or before it."""
        begin = time.perf_counter()
        if self.driver == "loop":
            self._in_turns(run)
        else:
            trace, policy = next(self._cycle)
            asyncio.run(through_service(trace, policy, run.calibration_log(policy), {}))
            asyncio.run(through_service(run.trace, run.policy, run.log, run.times))
        run.keep()
        self.runs.append(run)
        span_s = max(times.finish_ns for times in run.times.values()) / NS_PER_S
        print(f"{run.name}: {span_s:.1f} s of trace in {time.perf_counter() - begin:.1f} s", file=sys.stderr)

    def _in_turns(self, run: LiveRun) -> None:
        """The reported run and calibrations take turns."""
        clock = RunClock(self.clock)
        engine = self._engine(self.built, run.policy, clock, run.log)
        calibration = self._calibration(run)
        for now_ns in through_loop(engine, clock, list(self._admitted(run.trace)), run.times):
            run.turns.append((now_ns, next(calibration)))
        calibration.close()

    def _calibration(self, run: LiveRun) -> Generator[int, None, None]:
        """Calibration traces one after another until nobody asks any more; gives the number of steps so far."""
        before = 0
        while True:
            trace, policy = next(self._cycle)
            clock = RunClock(self.clock)
            engine = self._engine(self.beside, policy, clock, run.calibration_log(policy))
            for _ in through_loop(engine, clock, list(self._admitted(trace)), {}):
                yield before + engine.stats().steps
            before += engine.stats().steps

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
