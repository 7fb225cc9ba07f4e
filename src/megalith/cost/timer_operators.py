"""OperatorTimer: steps from operator tables (`operators`), as exact integer lines within the cells of a table.

    t_step = host + rows(rows) + head(outputs) + attention(decodes, keys they read) + attention(prompt chunks)

Decodes: tables hold sequences of equal length, so uneven ones count by their mean. For a number of decodes the time is
piecewise linear in the sum of contexts, with a whole number of picoseconds per token in each piece.
Prompts: a chunk of n tokens behind c costs F(c + n) - F(c), where F is the time of a whole prompt; the chunks of a step
take the larger of the longest one alone and their shares of a full device. F grows with the square beyond the tables.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from megalith.cost import operators
from megalith.cost.compute import CostModel
from megalith.cost.memory import weight_bytes
from megalith.cost.operators import Knots, OperatorTables
from megalith.cost.profile import from_device
from megalith.cost.timer import PS_PER_NS, Line, Prompt
from megalith.cost.timer_analytic import MAX_MEMO, phase_power
from megalith.cost.timer_phases import (
    NO_END,
    POWER_EXPONENT,
    PhasePower,
    check_clock,
    check_factor,
    memory_slowdown,
    quick_line,
)
from megalith.specs import catalog

MAX_CELLS = 1 << 12
"""Numbers of decodes whose lines are kept; when there are more, all are forgotten."""

Cells = tuple[list[int], list[int], list[int], int]
"""Where the pieces start (sum of contexts), their value at sum 0, their slopes, and the step without attention."""


class OperatorTimer:
    """The StepTimer and DeviceTimer of one model on one device at one degree and number type."""

    def __init__(
        self,
        tables: OperatorTables,
        tensor_parallel: int = 1,
        number: str = "bf16",
        kv: str = "bf16",
        host_ns: int | None = None,
        speed: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        """`host_ns`: None takes the table's; 0 for an engine that hides it. `speed`: factor and clock.

        Raises ConfigError, listing what there is, when the tables lack the degree, the number type or the cache type.
        """
        self.tables, self.number, self.kv = tables, number, kv
        self.tensor_parallel = tensor_parallel
        self.host_ns = tables.host_ns if host_ns is None else host_ns
        self.factor, self.clock = check_factor(speed[0]), check_clock(speed[1])
        self._dense = operators.dense_table(tables, tensor_parallel, number)
        self._attention = operators.attention_table(tables, tensor_parallel, kv)
        self.cost = _cost(tables, tensor_parallel, number, kv)
        self._host_ps = round(self.host_ns * self.factor) * PS_PER_NS
        self._decode_scale = self.factor * memory_slowdown(self.clock)
        self._prompt_scale = self.factor / self.clock
        self._cells: dict[int, Cells] = {}
        self._row_ps: dict[int, int] = {}
        self._head_ps: dict[int, int] = {0: 0}
        self._prompt_ps: dict[int, tuple[int, int]] = {0: (0, 0)}
        self._alone_ps = self._prompt(1)[0]

    def decode_line(self, decodes: int, context_sum: int, context_max: int) -> Line:  # noqa: ARG002
        """See StepTimer. A line ends where the mean context leaves a cell of the table."""
        cells = self._cells.get(decodes)
        if cells is None:
            cells = self._make_cells(decodes)
        starts, firsts, slopes, _ = cells
        piece = bisect_right(starts, context_sum)
        slope = slopes[piece - 1]
        first_ps = firsts[piece - 1] + slope * context_sum
        if piece == len(starts):
            return quick_line((first_ps, slope * decodes, NO_END))
        return quick_line((first_ps, slope * decodes, (starts[piece] - context_sum) // decodes + 1))

    def step_ps(self, prompts: Sequence[Prompt], decodes: int, context_sum: int, context_max: int) -> int:  # noqa: ARG002
        """See StepTimer."""
        if prompts:
            return self._mixed_ps(prompts, decodes, context_sum)
        cells = self._cells.get(decodes)
        if cells is None:
            cells = self._make_cells(decodes)
        piece = bisect_right(cells[0], context_sum) - 1
        return cells[1][piece] + cells[2][piece] * context_sum

    def _mixed_ps(self, prompts: Sequence[Prompt], decodes: int, context_sum: int) -> int:
        rows = outputs = decodes
        alone = packed = 0
        memo = self._prompt_ps
        for new, context, samples in prompts:
            rows += new
            outputs += samples
            if new == 1:
                decodes += 1
                context_sum += context
            else:
                whole = memo.get(context + new) or self._prompt(context + new)
                before = memo.get(context) or self._prompt(context)
                packed += whole[1] - before[1]
                longest = whole[0] - before[0] + (self._alone_ps if context else 0)
                if longest > alone:
                    alone = longest
        total = self._dense_ps(rows, outputs) + (alone if alone > packed else packed)
        if decodes:
            starts, firsts, slopes, base = self._cells.get(decodes) or self._make_cells(decodes)
            piece = bisect_right(starts, context_sum) - 1
            total += firsts[piece] + slopes[piece] * context_sum - base
        return total

    def _dense_ps(self, rows: int, outputs: int) -> int:
        row_ps = self._row_ps.get(rows)
        if row_ps is None:
            row_ps = _remember(self._row_ps, rows, self._rows(rows))
        head_ps = self._head_ps.get(outputs)
        if head_ps is None:
            time = round(self._dense.outputs.value(outputs) * self._decode_scale)
            head_ps = _remember(self._head_ps, outputs, time * PS_PER_NS)
        return self._host_ps + row_ps + head_ps

    def _rows(self, rows: int) -> int:
        """All layers without attention; of a slower clock multiplying feels all, the rest little."""
        time = self._dense.rows.value(rows)
        rates = self.cost.profile.rates
        busy = min(1.0, rows * self.cost.layer_macs * rates.mac_ns / self.tensor_parallel / time)
        return round(time * (busy * self._prompt_scale + (1.0 - busy) * self._decode_scale)) * PS_PER_NS

    def _prompt(self, tokens: int) -> tuple[int, int]:
        """Attention of a whole prompt, alone and packed, in picoseconds."""
        if len(self._prompt_ps) >= MAX_MEMO:
            self._prompt_ps = {0: (0, 0)}
        table = self._attention
        both = (self._whole(table.alone, tokens), self._whole(table.packed, tokens))
        self._prompt_ps[tokens] = both
        return both

    def _whole(self, knots: Knots, tokens: int) -> int:
        last = knots.at[-1]
        value = knots.ns[-1] * (tokens / last) ** 2 if tokens > last else knots.value(tokens)
        return round(value * self._prompt_scale * PS_PER_NS)

    def _make_cells(self, decodes: int) -> Cells:
        if decodes < 1:
            raise ValueError(f"a step of {decodes} decodes and no prompt")
        if len(self._cells) >= MAX_CELLS:
            self._cells.clear()
        base = self._dense_ps(decodes, decodes)
        values = self._decode_values(decodes)
        contexts = self._attention.contexts
        starts, firsts, slopes, value = [0], [base + values[0]], [0], values[0]
        for index, low in enumerate(contexts[:-1]):
            start, width = (low - 1) * decodes, (contexts[index + 1] - low) * decodes
            slope = round((values[index + 1] - values[index]) / width)
            starts.append(start)
            firsts.append(base + value - slope * start)
            slopes.append(slope)
            value += slope * width
        cells = (starts, firsts, slopes, base)
        self._cells[decodes] = cells
        return cells

    def _decode_values(self, decodes: int) -> list[int]:
        """Attention at each context of the table, in picoseconds, linear between its numbers of decodes."""
        table = self._attention
        upper = min(max(bisect_right(table.decodes, decodes - 1), 1), len(table.decodes) - 1)
        low, high = table.decodes[upper - 1], table.decodes[upper]
        part, scale = (decodes - low) / (high - low), self._decode_scale * PS_PER_NS
        pairs = zip(table.decode_ns[upper - 1], table.decode_ns[upper], strict=True)
        return [round((first + (second - first) * part) * scale) for first, second in pairs]

    def shares_ps(self, prompts: Sequence[Prompt], decodes: int, context_sum: int) -> tuple[int, int, int]:
        """Of a step: what depends on its rows, attention of its prompt chunks, and of its decodes (prompts of one too).

        The rest of `step_ps` is the host and the head.
        """
        rows = decodes + sum(prompt.new_tokens for prompt in prompts)
        single = [prompt for prompt in prompts if prompt.new_tokens == 1]
        together, read = decodes + len(single), context_sum + sum(prompt.context_tokens for prompt in single)
        decode = self.step_ps((), together, read, 0) - self._make_cells(together)[3] if together else 0
        whole = self._mixed_ps(prompts, decodes, context_sum) if prompts else 0
        outputs = decodes + sum(prompt.samples for prompt in prompts)
        chunks = whole - self._dense_ps(rows, outputs) - decode if prompts else 0
        self._dense_ps(rows, outputs)
        return self._row_ps[rows], chunks, decode

    def scaled(self, factor: float) -> OperatorTimer:
        """See DeviceTimer."""
        return self._at(self.factor * check_factor(factor), self.clock)

    def at_clock(self, fraction: float) -> OperatorTimer:
        """See DeviceTimer."""
        return self._at(self.factor, check_clock(fraction))

    def power_w(self, exponent: float = POWER_EXPONENT) -> PhasePower:
        """See DeviceTimer: the analytic model's power, for tables hold no watts."""
        return phase_power(self.cost, self.clock, exponent)

    def _at(self, factor: float, clock: float) -> OperatorTimer:
        return OperatorTimer(self.tables, self.tensor_parallel, self.number, self.kv, self.host_ns, (factor, clock))


def _cost(tables: OperatorTables, devices: int, number: str, kv: str) -> CostModel:
    spec = catalog.model(tables.model)
    weights = weight_bytes(spec, "fp4" if number == "mxfp4" else number)
    return CostModel(spec, from_device(catalog.device(tables.device), number), weights, kv, devices)


def _remember(memory: dict[int, int], key: int, value: int) -> int:
    if len(memory) >= MAX_MEMO:
        memory.clear()
    memory[key] = value
    return value
