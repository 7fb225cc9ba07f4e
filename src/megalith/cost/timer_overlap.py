"""OverlapTimer: another timer's steps, shorter by what nano-batches save (`nano_choice`), found once for each bucket.

    step = base step - saving(rows, decodes, mean context)

The pipeline is searched at the corners of a grid of step shapes when a step first comes near them, and savings between
corners are interpolated: in whole picoseconds, with straight pieces between two mean contexts, so that a leap over
decodes is exact. A saving is never below 0: where splitting does not pay, the step is the base timer's. Attention of
prompt chunks is left out of the corners, so savings beside long prompts are rather too small.

Asynchronous scheduling computes one token too many for each request, because the next step has begun when its end is
seen. It is charged as one more decode in the step that ends a request's prompt: once a request, not when it happens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

import msgspec

from megalith.cost.lowering import LayerCosts, StepWork, TableCosts, layer_costs, sequential_ps, step_power_w
from megalith.cost.nano import Enough
from megalith.cost.nano_choice import LEAST_ROWS, choose
from megalith.cost.timer import Line, Prompt
from megalith.cost.timer_analytic import MAX_MEMO, POWER_CONTEXT, POWER_DECODES, POWER_ROWS
from megalith.cost.timer_phases import NO_END, POWER_EXPONENT, DeviceTimer, PhasePower, at_lower_clock, quick_line

ROWS: Final = (LEAST_ROWS, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192)
"""Rows of a step at the corners; fewer save nothing, more save what the last does."""
PARTS: Final = 4
"""Decodes at the corners are quarters of the rows."""
CONTEXTS: Final = (0, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768)
"""Mean tokens in the cache of a decode, at the corners; longer ones save what the last does."""

MOST_KNOWN: Final = 64
"""Timers (models, devices, clocks) whose savings are kept."""


class Savings:
    """What nano-batches save of one timer's steps at the corners of the grid, in picoseconds; searched when asked."""

    def __init__(self, costs: LayerCosts, enough: Enough) -> None:
        self.costs, self.enough = costs, enough
        self._corners: dict[tuple[int, int, int], int] = {}
        self._cells: dict[tuple[int, int, int], tuple[int, int]] = {}

    def corner(self, rows: int, quarters: int, context: int) -> int:
        """Saved of a step with so many rows, quarters of which decode behind `context` tokens each."""
        key = rows, quarters, context
        found = self._corners.get(key)
        if found is None:
            decodes = rows * quarters // PARTS
            prompts = (Prompt(rows - decodes, 0, False),) if decodes < rows else ()
            bare = _Bare(self.costs)
            found = choose(bare, StepWork(decodes, decodes * context, prompts), self.enough, keep=2).saving_ps
            self._corners[key] = found
        return found

    def cell(self, rows: int, decodes: int, piece: int) -> tuple[int, int]:
        """(saving where a piece begins, more of it for each token of context), of any number of rows and decodes."""
        key = rows, decodes, piece
        found = self._cells.get(key)
        if found is None:
            if len(self._cells) >= MAX_MEMO:
                self._cells.clear()
            first = self._between(rows, decodes, piece)
            slope = 0
            if decodes and piece + 1 < len(CONTEXTS):
                width = (CONTEXTS[piece + 1] - CONTEXTS[piece]) * decodes
                more = self._between(rows, decodes, piece + 1) - first
                slope = more // width if more >= 0 else -(-more // width)
            found = self._cells[key] = (first, slope)
        return found

    def _between(self, rows: int, decodes: int, piece: int) -> int:
        """Between four corners at one context, in whole numbers."""
        if rows < LEAST_ROWS:
            return 0
        high = min(bisect_right(ROWS, rows), len(ROWS) - 1)
        low_rows, high_rows = ROWS[high - 1], ROWS[high]
        rows = min(rows, high_rows)
        part, rest = divmod(min(decodes, rows) * PARTS, rows)
        sides = [
            self.corner(at, part, CONTEXTS[piece]) * (rows - rest)
            + (self.corner(at, part + 1, CONTEXTS[piece]) * rest if rest else 0)
            for at in (low_rows, high_rows)
            if at == low_rows or rows > low_rows
        ]
        far = sides[-1] * (rows - low_rows) if rows > low_rows else 0
        return (sides[0] * (high_rows - rows) + far) // (rows * (high_rows - low_rows))


def savings_of(base: DeviceTimer, enough: Enough) -> Savings:
    """The savings of a timer, the same object for equal timers: what was searched once serves every run of a process.

    Raises ConfigError for a base timer that does not know the operators of its steps.
    """
    costs = layer_costs(base)
    cost = costs.cost
    tables = (costs.timer.tables, costs.timer.host_ns) if isinstance(costs, TableCosts) else None
    parts = (cost.spec, cost.profile, cost.weights, cost.kv_format, cost.devices, costs.factor, enough, tables)
    key = blake2b(msgspec.json.encode(parts), digest_size=16).digest()
    if key not in _KNOWN:
        if len(_KNOWN) >= MOST_KNOWN:
            _KNOWN.clear()
        _KNOWN[key] = Savings(costs, enough)
    return _KNOWN[key]


class _Bare:
    """The costs of a timer without attention of prompt chunks."""

    def __init__(self, costs: LayerCosts) -> None:
        self._costs = costs
        self.cost, self.factor = costs.cost, costs.factor
        self.dense_ps, self.link_ps = costs.dense_ps, costs.link_ps
        self.decode_ps, self.rest_ps = costs.decode_ps, costs.rest_ps

    def prefill_ps(self, prompts: Sequence[Prompt]) -> float:  # noqa: ARG002 - see LayerCosts
        """None of it."""
        return 0.0


_KNOWN: dict[bytes, Savings] = {}
"""Found savings: results of a pure function."""


class OverlapTimer:
    """The StepTimer and DeviceTimer of a device that runs nano-batches."""

    def __init__(
        self, base: DeviceTimer, enough: Enough = Enough(), savings: Savings | None = None, factor: float = 1.0,  # noqa: B008
        full: OverlapTimer | None = None, clock: float = 1.0,
    ) -> None:  # fmt: skip
        """`full`: the same device at its full clock, unless it is this one; the others are as `scaled` gives them.

        Raises ConfigError for a base timer that does not know the operators of its steps.
        """
        self._full = self if full is None else full
        self._watts: dict[float, PhasePower] = {}
        self.base, self.enough, self.factor, self.clock = base, enough, factor, clock
        self._savings = savings_of(base, enough) if savings is None else savings

    def saving_ps(self, rows: int, decodes: int, context_sum: int) -> int:
        """What a step is shorter by than the base timer's."""
        if rows < LEAST_ROWS:
            return 0
        piece = self._piece(decodes, context_sum)
        first, slope = self._savings.cell(rows, decodes, piece)
        if not slope:
            return self._scale(first)
        return self._scale(first) + self._scale(slope) * (context_sum - CONTEXTS[piece] * decodes)

    def decode_line(self, decodes: int, context_sum: int, context_max: int) -> Line:
        """See StepTimer. A line also ends where the mean context leaves a piece."""
        line = self.base.decode_line(decodes, context_sum, context_max)
        if decodes < LEAST_ROWS:
            return line
        piece = self._piece(decodes, context_sum)
        slope = self._scale(self._savings.cell(decodes, decodes, piece)[1])
        steps = NO_END
        if piece + 1 < len(CONTEXTS):
            steps = -(-(CONTEXTS[piece + 1] * decodes - context_sum) // decodes)
        saved = self.saving_ps(decodes, decodes, context_sum)
        return quick_line((line.first_ps - saved, line.slope_ps - slope * decodes, min(line.steps, steps)))

    def step_ps(self, prompts: Sequence[Prompt], decodes: int, context_sum: int, context_max: int) -> int:
        """See StepTimer."""
        if not prompts:
            saved = self.saving_ps(decodes, decodes, context_sum)
            return self.base.step_ps(prompts, decodes, context_sum, context_max) - saved
        rows, together, read = decodes, decodes, context_sum
        late = late_context = 0
        for new, context, samples in prompts:
            rows += new
            if new == 1:
                together += 1
                read += context
            elif samples:
                late += 1
                late_context += new + context
        whole = self.base.step_ps(prompts, decodes + late, context_sum + late_context, context_max)
        return whole - self.saving_ps(rows, together, read)

    def scaled(self, factor: float) -> OverlapTimer:
        """See DeviceTimer."""
        full = None if self.clock == 1.0 else self._full
        base, whole = self.base.scaled(factor), self.factor * factor
        return OverlapTimer(base, self.enough, self._savings, whole, full, self.clock)

    def at_clock(self, fraction: float) -> OverlapTimer:
        """See DeviceTimer. Pipelines are searched anew: products are slower then, links are not."""
        slower = self.base.at_clock(fraction)
        return OverlapTimer(slower, self.enough, savings_of(slower, self.enough), 1.0, self._full, fraction)

    def power_w(self, exponent: float = POWER_EXPONENT) -> PhasePower:
        """See DeviceTimer: the same work in less time keeps compute, memory and links busier, at most the peak."""
        full = self._full
        watts = full._watts.get(exponent)
        if watts is None:
            base = full.base.power_w(exponent)
            prompt = full._busier_w(StepWork(0, 0, (Prompt(POWER_ROWS, 0, True),)))
            decode = full._busier_w(StepWork(POWER_DECODES, POWER_DECODES * POWER_CONTEXT))
            watts = PhasePower(base.idle_w, max(base.prompt_w, prompt), max(base.decode_w, decode))
            full._watts[exponent] = watts
        return at_lower_clock(watts, self.clock, exponent)

    def _busier_w(self, work: StepWork) -> float:
        costs = self._savings.costs
        piece = self._piece(work.decodes, work.context_sum)
        saved = self._savings.cell(work.rows, work.decodes, piece)[0] if work.rows >= LEAST_ROWS else 0
        return step_power_w(costs, work, sequential_ps(costs, work) - saved)

    def _piece(self, decodes: int, context_sum: int) -> int:
        return bisect_right(CONTEXTS, context_sum // decodes) - 1 if decodes else 0

    def _scale(self, ps: int) -> int:
        return ps if self.factor == 1.0 else int(ps * self.factor)
