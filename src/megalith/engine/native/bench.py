"""Time steps of the native backend on one model: `python -m megalith.engine.native.bench [MODEL] [THREADS]`.

For each case it prints tokens a second of CPU time and of wall time, and where the time of a step goes. Each phase's
figure is its fastest over the steps of the case, so that a machine that others use too still says what the code costs.
A KV cache of random tokens is as good as any: kernels do not look at values.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np

from megalith.engine.batch import StepBatch
from megalith.engine.native_runner import NativeRunner
from megalith.model.open import open_model

CASES = (
    ("decode", 1, 256), ("decode", 2, 256), ("decode", 4, 256), ("decode", 16, 256), ("decode", 32, 256),
    ("decode", 32, 512), ("prefill", 128, 0), ("prefill", 512, 0),
)  # fmt: skip
"""(what, rows of a step, tokens before them)."""


def _batch(what: str, rows: int, before: int, vocab: int, block_tokens: int) -> StepBatch:
    rng = np.random.default_rng(rows)
    tokens = rng.integers(0, vocab, rows).astype(np.int32)
    sequences = rows if what == "decode" else 1
    width = -(-(before + rows // sequences) // block_tokens)
    tables = rng.permutation(sequences * width).astype(np.int32).reshape(sequences, width)
    if what == "decode":
        positions, starts = np.full(rows, before, np.int32), np.arange(rows + 1, dtype=np.int32)
        return StepBatch(tokens, positions, starts, tables, np.arange(rows, dtype=np.int32))
    starts, outputs = np.array([0, rows], np.int32), np.array([rows - 1], np.int32)
    return StepBatch(tokens, np.arange(before, before + rows, dtype=np.int32), starts, tables, outputs)


def _measure(runner: NativeRunner, step: Callable[[], object], seconds: float) -> tuple[float, float, dict[str, int]]:
    """Fastest wall and CPU seconds of a step, and the fastest of each phase in nanoseconds."""
    wall: list[float] = []
    cpu: list[float] = []
    phases: dict[str, int] = {}
    step()
    begin = time.perf_counter()
    while len(wall) < 3 or time.perf_counter() - begin < seconds:
        runner.phase_ns(reset=True)
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        step()
        wall.append(time.perf_counter() - wall_start)
        cpu.append(time.process_time() - cpu_start)
        for name, ns in runner.phase_ns().items():
            phases[name] = min(ns, phases.get(name, ns))
    return min(wall), float(np.median(cpu)), phases


def main(model: str = "smollm2", threads: int = 1, seconds: float = 2.0) -> None:
    """Print one line for each case."""
    opened = open_model(model)
    most = max(rows * (-(-(before + 1) // 16)) for what, rows, before in CASES if what == "decode")
    runner = NativeRunner(
        opened.spec,
        opened.checkpoint,
        block_tokens=16,
        num_blocks=most,
        num_host_blocks=0,
        max_rows=512,
        threads=threads,
    )
    print(
        f"{opened.spec.name} on {runner.name}, {threads} threads; tok/s: fastest phases, fastest step, median CPU time"
    )
    for what, rows, before in CASES:
        batch = _batch(what, rows, before, runner.vocab, 16)

        def step(batch: StepBatch = batch) -> object:
            return runner.logits(batch)

        wall, cpu, phases = _measure(runner, step, seconds)
        best = sum(phases.values()) / 1e9
        shares = " ".join(f"{name} {ns / 1e6:.2f}" for name, ns in phases.items())
        print(
            f"{what:8} {rows:4} rows, context {before:4}: {rows / best:7.0f} {rows / wall:7.0f} {rows / cpu:7.0f}"
            f" | ms: {shares}", flush=True
        )  # fmt: skip
    runner.close()


if __name__ == "__main__":
    main(
        sys.argv[1] if len(sys.argv) > 1 else "smollm2",
        int(sys.argv[2]) if len(sys.argv) > 2 else 1,
        float(sys.argv[3]) if len(sys.argv) > 3 else 2.0,
    )
