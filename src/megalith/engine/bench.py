"""Predicted against measured: times real steps of a runner and compares them with the cost model.

A point is (batch, context, prompt): one step with `batch` decodes that have `context` tokens behind them and one prompt
chunk of `prompt` tokens. Two disjoint sets of points: the profile is fitted on one and reported on the other. Knows
runners by their protocol only.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.cost.calibrate import MeasuredStep, band_of, check_disjoint, fit, left_out_ratios
from megalith.cost.compute import CostModel
from megalith.cost.memory import blocks_for
from megalith.cost.profile import Profile, band_for, model_shape
from megalith.engine.batch import Runner, SamplingBatch, StepBatch

Key = tuple[int, int, int]
Progress = Callable[[int], None]

MAX_BATCH = 32
MAX_CONTEXT = 1024
LONG_SEQUENCES = 8
"""The first sequences are filled to MAX_CONTEXT, the others to half of it."""
MAX_PROMPT = 512
FILL_ROWS = 256
LEAST_ROUNDS, SLOW_NS = 3, 100_000_000

CALIBRATION: tuple[Key, ...] = (
    (1, 64, 0), (1, 1000, 0), (2, 256, 0), (4, 128, 0), (4, 900, 0), (8, 64, 0), (8, 512, 0), (8, 1000, 0),
    (16, 128, 0), (16, 480, 0), (32, 64, 0), (32, 480, 0),
    (0, 0, 16), (0, 0, 32), (0, 0, 64), (0, 0, 128), (0, 0, 256), (0, 0, 512),
    (1, 256, 64), (4, 512, 128), (16, 256, 32), (16, 256, 240), (32, 256, 96),
)  # fmt: skip
REPORTING: tuple[Key, ...] = (
    (1, 128, 0), (1, 256, 0), (1, 512, 0), (2, 768, 0), (3, 200, 0), (5, 640, 0), (6, 320, 0), (8, 256, 0),
    (12, 96, 0), (16, 256, 0), (20, 400, 0), (24, 128, 0), (32, 128, 0), (32, 256, 0), (32, 384, 0),
    (0, 0, 24), (0, 0, 48), (0, 0, 96), (0, 0, 192), (0, 0, 384),
    (2, 128, 96), (8, 512, 64), (12, 300, 160), (24, 200, 48), (31, 384, 225),
)  # fmt: skip


class BenchRow(Config, kw_only=True):
    """One point: predicted and measured. Times in nanoseconds."""

    batch: int
    context: int
    prompt: int
    role: str
    """`calibration` or `reporting`."""
    predicted_ns: int
    low_ns: int
    high_ns: int
    measured_ns: int
    """The shortest of the repetitions: what the machine does when nothing else runs on it."""
    median_ns: int
    repetitions: int
    binding: str

    @property
    def error(self) -> float:
        """Predicted / measured - 1."""
        return self.predicted_ns / self.measured_ns - 1.0


class BenchReport(Config, kw_only=True):
    """A whole comparison, as it is stored."""

    model: str
    runner: str
    threads: int
    clock: str
    machine: str
    date: str
    profile: Profile
    fitted: bool
    """Whether the profile was fitted in this run (to its calibration points) or had been stored before."""
    rows: tuple[BenchRow, ...]
    memory_predicted: dict[str, int] = {}
    memory_measured: dict[str, int] = {}
    load_average: float = 0.0

    def reporting(self) -> list[BenchRow]:
        """The rows that count."""
        return [row for row in self.rows if row.role == "reporting"]

    def median_error(self) -> float:
        """Median of |predicted / measured - 1| over the reporting points."""
        return statistics.median(abs(row.error) for row in self.reporting())

    def coverage(self) -> float:
        """Part of the reporting points whose measured time lies in the predicted band."""
        rows = self.reporting()
        return sum(row.low_ns <= row.measured_ns <= row.high_ns for row in rows) / len(rows)


def blocks_needed(block_tokens: int) -> int:
    """KV blocks that all points together live in: every sequence has blocks of its own."""
    long = LONG_SEQUENCES * blocks_for(MAX_CONTEXT + 1, block_tokens)
    short = (MAX_BATCH - LONG_SEQUENCES) * blocks_for(MAX_CONTEXT // 2 + 1, block_tokens)
    return long + short + blocks_for(MAX_PROMPT, block_tokens)


def host_blocks_needed(block_tokens: int) -> int:
    """Host blocks through which the longest sequence is copied to the others."""
    return blocks_for(MAX_CONTEXT + 1, block_tokens)


def greedy(outputs: int) -> SamplingBatch:
    """Greedy sampling of `outputs` rows, nothing else asked."""
    ones, zeros, none = np.ones(outputs, np.float32), np.zeros(outputs, np.float32), np.full(outputs, -1, np.int32)
    counts, starts, empty = np.zeros(outputs, np.int32), np.zeros(outputs + 1, np.int32), np.zeros(0, np.int32)
    draws = np.zeros(outputs, np.uint64)
    return SamplingBatch(
        temperature_N=zeros, top_k_N=counts, top_p_N=ones, min_p_N=zeros, repetition_N=ones, presence_N=zeros,
        frequency_N=zeros, seed_N=draws, draw_N=draws, seen_starts_N1=starts, seen_ids=empty, seen_counts=empty,
        bias_starts_N1=starts, bias_ids=empty, bias_values=np.zeros(0, np.float32), mask_rows_N=none,
        masks=np.zeros((0, 0), np.uint32), targets_N=none, num_logprobs_N=none,
    )  # fmt: skip


@dataclass(slots=True)
class Stage:
    """Sequences with filled KV on a runner, ready to be stepped at any context up to their length."""

    runner: Runner
    tables: list[np.ndarray[tuple[int], np.dtype[np.int32]]]
    random: np.random.Generator

    @staticmethod
    def on(runner: Runner) -> Stage:
        """Give every sequence blocks of its own, the prompt's last. Raises ConfigError when the pool is too small."""
        size, needed = runner.block_tokens, blocks_needed(runner.block_tokens)
        if runner.num_blocks < needed:
            raise ConfigError(f"The runner has {runner.num_blocks} KV blocks, the points need {needed}.")
        tables, first = [], 0
        for sequence in range(MAX_BATCH + 1):
            count = blocks_for(_length(sequence) + 1 if sequence < MAX_BATCH else MAX_PROMPT, size)
            tables.append(np.arange(first, first + count, dtype=np.int32))
            first += count
        return Stage(runner, tables, np.random.default_rng(20261123))

    def batch(self, parts: Sequence[tuple[int, int, int]]) -> StepBatch:
        """A step of parts (sequence, new tokens, context tokens); the last row of each gives logits."""
        rows = [new for _, new, _ in parts]
        starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int32)
        width = max(len(self.tables[sequence]) for sequence, _, _ in parts)
        tables = np.zeros((len(parts), width), np.int32)
        for i, (sequence, _, _) in enumerate(parts):
            tables[i, : len(self.tables[sequence])] = self.tables[sequence]
        return StepBatch(
            tokens_M=self.random.integers(0, self.runner.vocab, int(starts[-1]), dtype=np.int32),
            positions_M=np.concatenate([np.arange(c, c + n, dtype=np.int32) for _, n, c in parts]),
            row_starts_S1=starts,
            block_tables_SW=tables,
            output_rows_N=(starts[1:] - 1).astype(np.int32),
        )

    def fill(self, progress: Progress) -> None:
        """Real K and V for every sequence in memory of its own, so that reading them costs what it costs in use.

        The first sequence is computed; its blocks reach the others through the runner's host pool.
        """
        done = 0
        while done < MAX_CONTEXT:
            self.runner.step(self.batch([(0, FILL_ROWS, done)]), greedy(1))
            done += FILL_ROWS
            progress(1)
        host = np.arange(len(self.tables[0]), dtype=np.int32)
        self.runner.swap_out(self.tables[0], host)
        for table in self.tables[1:MAX_BATCH]:
            self.runner.swap_in(host[: len(table)], table)

    def point(self, key: Key) -> tuple[StepBatch, SamplingBatch]:
        """The step of a point."""
        batch, context, prompt = key
        parts = [(sequence, 1, context) for sequence in range(batch)]
        if prompt:
            parts.append((MAX_BATCH, prompt, 0))
        return self.batch(parts), greedy(len(parts))


def _length(sequence: int) -> int:
    return MAX_CONTEXT if sequence < LONG_SEQUENCES else MAX_CONTEXT // 2


CLOCKS: dict[str, Callable[[], int]] = {"wall": time.perf_counter_ns, "processor": time.thread_time_ns}
"""wall: what a user sees. processor: time on the core of the calling thread; the same on an idle machine, and the one
to use with a single thread while other programs share the cores."""


def measure(
    stage: Stage, keys: Sequence[Key], rounds: int, progress: Progress, clock: str = "wall"
) -> dict[Key, list[int]]:
    """Nanoseconds of each point, point after point in every round, so that a busy spell hits all.

    `rounds` repetitions, of slow points only LEAST_ROUNDS: a long step is its own average.
    """
    now_ns = CLOCKS[clock]
    steps = {key: stage.point(key) for key in keys}
    times: dict[Key, list[int]] = {key: [] for key in keys}
    for done in range(rounds):
        for key, (batch, sampling) in steps.items():
            if done >= LEAST_ROUNDS and min(times[key]) > SLOW_NS:
                continue
            begin_ns = now_ns()
            stage.runner.step(batch, sampling)
            times[key].append(now_ns() - begin_ns)
        progress(1)
    return times


def calibrated(cost: CostModel, points: Sequence[MeasuredStep], source: str) -> Profile:
    """The profile fitted to `points`, with the band of points left out."""
    rates = fit(cost, points)
    band = band_of(left_out_ratios(cost, points), f"{source}: each point predicted from the others")
    date, shape = time.strftime("%Y-%m-%d"), model_shape(cost.spec)
    return msgspec.structs.replace(cost.profile, rates=rates, band=band, source=source, date=date, fitted_on=shape)


def points_of(times: dict[Key, list[int]]) -> list[MeasuredStep]:
    """The measured points that a fit is given."""
    return [MeasuredStep(*key, measured_ns=min(values)) for key, values in times.items()]


def rows_of(cost: CostModel, times: dict[Key, list[int]], role: str) -> list[BenchRow]:
    """Predicted beside measured for every point."""
    band = band_for(cost.profile, cost.spec)
    rows = []
    for key, values in times.items():
        point = MeasuredStep(*key, measured_ns=min(values))
        predicted = cost.step(point.shape(cost))
        rows.append(
            BenchRow(
                batch=key[0], context=key[1], prompt=key[2], role=role, predicted_ns=predicted.duration_ns,
                low_ns=round(predicted.duration_ns * band.low), high_ns=round(predicted.duration_ns * band.high),
                measured_ns=min(values), median_ns=round(statistics.median(values)), repetitions=len(values),
                binding=predicted.binding,
            )
        )  # fmt: skip
    return rows


def compare(cost: CostModel, times: dict[Key, list[int]], source: str | None) -> tuple[Profile, list[BenchRow]]:
    """Fit on the calibration points (where `source` says what they are; None: keep the profile), predict them all."""
    calibration = {key: times[key] for key in CALIBRATION if key in times}
    reporting = {key: times[key] for key in REPORTING if key in times}
    check_disjoint(points_of(calibration), points_of(reporting))
    profile = cost.profile if source is None else calibrated(cost, points_of(calibration), source)
    final = CostModel(cost.spec, profile, cost.weights, cost.kv_format)
    return profile, [*rows_of(final, calibration, "calibration"), *rows_of(final, reporting, "reporting")]
