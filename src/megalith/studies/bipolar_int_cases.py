"""What the points of the bipolar-int study measure: products and decode steps by bits of weights and activations.

Weights are random: no kernel looks at values. Every measurement is taken in turns with the same of Q8_0 (and Q4_0),
so that a machine that others use too slows all; a figure is the median of its turns. One thread.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import msgspec
import numpy as np
from numpy.typing import NDArray

from megalith.engine.batch import StepBatch
from megalith.engine.native import binding, single
from megalith.engine.native_runner import NativeRunner
from megalith.model.bipolar import BITS_OF, format_name
from megalith.model.checkpoint import Checkpoint, Tensor, expected_shapes
from megalith.model.formats import FORMATS
from megalith.specs import catalog
from megalith.specs.model import ModelSpec

Options = Mapping[str, float | str]
Figures = dict[str, float | None]
U8 = NDArray[np.uint8]

MODEL = "smollm2-135m"
OUTPUTS, INPUTS = 1536, 576
"""Of the product: gate of SmolLM2 135M."""
TURNS, TURN_NS = 7, 20_000_000
CONTEXT = 64
"""Tokens before a decode step."""


def bits_of(at: float) -> tuple[int, int]:
    """Bits of weights and of activations at a place of the axis: 4.8 is 4 and 8."""
    return int(at), round(10 * (at - int(at)))


def in_turns(steps: tuple[Callable[[], object], ...], turns: int = TURNS) -> list[float]:
    """Median nanoseconds of one call of each, called in turns for about TURN_NS at a time."""
    counts, found = [], []
    for step in steps:
        step()
        begin = time.perf_counter_ns()
        step()
        counts.append(max(1, TURN_NS // max(1, time.perf_counter_ns() - begin)))
    for _ in range(turns):
        row = []
        for step, count in zip(steps, counts, strict=True):
            begin = time.perf_counter_ns()
            for _ in range(count):
                step()
            row.append((time.perf_counter_ns() - begin) / count)
        found.append(row)
    return [median(column) for column in zip(*found, strict=True)]


def random_raw(rng: np.random.Generator, kind: str, rows: int, columns: int) -> U8:
    """Random weights, uint8 [rows, row bytes], of a format whose blocks begin with a scale: about 1 / sqrt(columns)."""
    elements, size = FORMATS[kind]
    blocks = rng.integers(0, 256, (rows, columns // elements, size), dtype=np.uint8)
    peak = 2 ** BITS_OF[kind] if kind in BITS_OF else {"Q8_0": 128, "Q4_0": 8}[kind]
    blocks[:, :, :2] = np.array([1.5 / peak / columns**0.5], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def kind_of(arm: str, at: float) -> tuple[str, int]:
    """Format of the weights and bits of the activations."""
    if arm == "planes":
        weights, activations = bits_of(at)
        return format_name(weights), activations
    return {"all-planes": format_name(8), "q8_0": "Q8_0", "q4_0": "Q4_0"}[arm], 8


def _product(kind: str, bits: int, x: NDArray[np.float32]) -> Callable[[], object]:
    """One product, quantising of the activations included."""
    library, rng = binding.load(), np.random.default_rng(1)
    matrix = single.PackedMatrix(library, kind, random_raw(rng, kind, OUTPUTS, INPUTS), (OUTPUTS, INPUTS))
    if kind not in BITS_OF:
        return lambda: matrix.multiply(x)
    return lambda: matrix.multiply_planes(*single.quantize_planes(library, x, bits))


def product(options: Options) -> Figures:
    """Picoseconds for each weight and row, and time over that of Q8_0 and Q4_0 in the same run."""
    rows = int(options["rows"])
    x = np.random.default_rng(0).standard_normal((rows, INPUTS)).astype(np.float32)
    arm = _product(*kind_of(str(options["arm"]), float(options["at"])), x)
    ns, eight_ns, four_ns = in_turns((arm, _product("Q8_0", 8, x), _product("Q4_0", 8, x)))
    return {"ps": 1000 * ns / (rows * OUTPUTS * INPUTS), "over_q8_0": ns / eight_ns, "over_q4_0": ns / four_ns}


@dataclass(frozen=True, slots=True)
class _Random:
    """Random weights of a spec, matrices of the layers in one format; embedding and head in Q8_0."""

    spec: ModelSpec
    kind: str

    def names(self) -> list[str]:
        return list(expected_shapes(self.spec))

    def formats(self) -> dict[str, int]:
        return {self.kind: 1, "Q8_0": 1, "F32": 1}

    def tensor(self, name: str) -> Tensor:
        shape = expected_shapes(self.spec)[name]
        if len(shape) == 1:
            return Tensor(name, shape, "F32", np.ones(shape, np.float32).view(np.uint8).reshape(1, -1))
        kind = self.kind if name.startswith("layers.") else "Q8_0"
        return Tensor(name, shape, kind, random_raw(np.random.default_rng(2), kind, *shape))

    def forget(self, *, cached: bool = True) -> None:
        """There is no file whose pages could be let go."""


def _runner(kind: str, bits: int, layers: int) -> NativeRunner:
    spec = msgspec.structs.replace(catalog.model(MODEL), num_layers=layers or catalog.model(MODEL).num_layers)
    weights: Checkpoint = _Random(spec, kind)  # type: ignore[assignment]
    return NativeRunner(
        spec, weights, block_tokens=16, num_blocks=CONTEXT // 16 + 1, num_host_blocks=0, max_rows=CONTEXT, threads=1,
        activation_bits=bits,
    )  # fmt: skip


def _decode(runner: NativeRunner) -> Callable[[], object]:
    """One step of one sequence with CONTEXT tokens before it."""
    runner.logits(StepBatch.of_one(np.zeros(CONTEXT), 0, [0], runner.block_tokens))
    batch = StepBatch.of_one([0], CONTEXT, [0], runner.block_tokens)
    return lambda: runner.logits(batch)


@functools.cache
def _base(layers: int) -> NativeRunner:
    return _runner("Q8_0", 8, layers)


def serve(options: Options) -> Figures:
    """Decode of one sequence by a model of SmolLM2's shape: tokens/s, bytes of its weights, times Q8_0's speed."""
    kind, bits = kind_of(str(options["arm"]), float(options["at"]))
    layers = int(options["layers"])
    runner, base = _runner(kind, bits, layers), _base(layers)
    ns, base_ns = in_turns((_decode(runner), _decode(base)))
    num_bytes = runner.memory_bytes()["weights"]
    runner.close()
    return {"tokens_per_s": 1e9 / ns, "speedup": base_ns / ns, "mib": num_bytes / 2**20}
