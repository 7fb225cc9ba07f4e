"""Lowering: one layer of a step as operators with token ranges, from the arithmetic of a device timer.

    KQV -> attention of prompts, attention of decodes -> O -> all-reduce -> up and gate -> down -> all-reduce

Rows of a step lie in one order: decodes first, then the rows of prompt chunks. An operator over a range of rows costs
what the timer's own arithmetic says of so few rows: a product over half the rows reads all of its weights, and a
measured table says how much less efficient it is. So splitting has the price that the cost model gives it. A layer is
the mean of all layers (windows, experts); element-wise work goes with the products.

Knows timers that say what their steps consist of (analytic and operator tables); must not know schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final, Literal, NamedTuple, Protocol, TypeAlias

from megalith.base.errors import ConfigError
from megalith.cost.compute import CostModel, StepShape, combine
from megalith.cost.energy import power_w
from megalith.cost.timer import PS_PER_NS, Prompt
from megalith.cost.timer_analytic import AnalyticTimer, clocked
from megalith.cost.timer_operators import OperatorTimer
from megalith.cost.timer_phases import DeviceTimer

Kind: TypeAlias = Literal["kqv", "prefill", "decode", "o", "reduce", "up", "down", "gather"]
KINDS: Final[tuple[Kind, ...]] = ("kqv", "prefill", "decode", "o", "reduce", "up", "down", "gather")
"""In the order of a layer. `reduce` and `gather`: the collectives behind attention and behind the FFN."""
DENSE: Final[tuple[Kind, ...]] = ("kqv", "o", "up", "down")
LINKS: Final[tuple[Kind, ...]] = ("reduce", "gather")
MOST_LINK_SHARE = 0.5
"""Tables sum products and collectives. Collectives are taken at the profile's link rate, at most this share of the sum
(on few rows the latency of the profile may be more than what was measured)."""


class StepWork(NamedTuple):
    """What a step brings."""

    decodes: int
    context_sum: int = 0
    """Tokens in the KV cache of all decodes together, before the step."""
    prompts: tuple[Prompt, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of its products."""
        return self.decodes + sum(prompt.new_tokens for prompt in self.prompts)


class Piece(NamedTuple):
    """An operator over a range of rows: how long it takes alone, and how long it keeps each resource busy."""

    kind: Kind
    rows: tuple[int, int]
    """First and past the last."""
    duration_ps: int
    compute_ps: float = 0.0
    memory_ps: float = 0.0
    link_ps: float = 0.0


class LayerCosts(Protocol):
    """What the parts of one layer take, in picoseconds, for the rows that are there."""

    @property
    def cost(self) -> CostModel:
        """Shapes and rates, at the timer's clock."""
        ...

    @property
    def factor(self) -> float:
        """On all durations."""
        ...

    def dense_ps(self, rows: int) -> float:
        """The products of `rows` rows, with element-wise work and launches."""
        ...

    def link_ps(self, rows: int) -> float:
        """Both collectives."""
        ...

    def decode_ps(self, decodes: int, context_sum: int) -> float:
        """Attention of decodes."""
        ...

    def prefill_ps(self, prompts: Sequence[Prompt]) -> float:
        """Attention of prompt chunks."""
        ...

    def rest_ps(self, work: StepWork) -> float:
        """Of the whole step, what no layer has: host and head."""
        ...


@dataclass(frozen=True, slots=True)
class AnalyticCosts:
    """The parts of an AnalyticTimer's step."""

    cost: CostModel
    factor: float = 1.0

    def dense_ps(self, rows: int) -> float:
        """See LayerCosts."""
        if not rows:
            return 0.0
        rates, cost = self.cost.profile.rates, self.cost
        memory, compute = gemm_ns(cost, rows)
        elements = rows * cost.row_values * rates.row_value_ns / cost.devices
        whole = combine(memory, compute, rates.combine) + elements + cost.spec.num_layers * rates.op_ns
        return whole * self.factor * PS_PER_NS / cost.spec.num_layers

    def link_ps(self, rows: int) -> float:
        """See LayerCosts."""
        return self.cost.link_ns(rows) * self.factor * PS_PER_NS / self.cost.spec.num_layers if rows else 0.0

    def decode_ps(self, decodes: int, context_sum: int) -> float:
        """See LayerCosts. Contexts are taken as equal."""
        return self._attention_ps([(1, context_sum // decodes)] * decodes) if decodes else 0.0

    def prefill_ps(self, prompts: Sequence[Prompt]) -> float:
        """See LayerCosts."""
        return self._attention_ps([(prompt.new_tokens, prompt.context_tokens) for prompt in prompts])

    def _attention_ps(self, requests: list[tuple[int, int]]) -> float:
        """A step of these requests less all that is not attention."""
        if not requests:
            return 0.0
        shape, cost = self.cost.shape(requests, outputs=0), self.cost
        rates = cost.profile.rates
        share = max(1, -(-cost.spec.num_kv_heads // cost.devices)) / cost.spec.num_kv_heads
        key_ns = cost.kv_layer_token_bytes * rates.kv_byte_ns * share
        chunks = max(shape.chunk_tokens * key_ns, shape.chunk_pairs * cost.pair_macs * rates.pair_mac_ns / cost.devices)
        return (shape.decode_tokens * key_ns + chunks) * self.factor * PS_PER_NS / cost.spec.num_layers

    def rest_ps(self, work: StepWork) -> float:
        """See LayerCosts."""
        outputs = work.decodes + sum(prompt.samples for prompt in work.prompts)
        cost, rates = self.cost, self.cost.profile.rates
        head = cost.step(StepShape(1, outputs, 0, 0, 0, 0)).duration_ns if outputs else 0
        head -= cost.step(StepShape(1, 0, 0, 0, 0, 0)).duration_ns if outputs else 0
        sequences = (work.decodes + len(work.prompts)) * rates.sequence_ns
        return (rates.step_ns + sequences + head) * self.factor * PS_PER_NS


@dataclass(frozen=True, slots=True)
class TableCosts:
    """The parts of an OperatorTimer's step; products and collectives are parted by the profile's link rate."""

    timer: OperatorTimer
    cost: CostModel
    factor: float = 1.0

    def dense_ps(self, rows: int) -> float:
        """See LayerCosts."""
        return self._rows_ps(rows) - self.link_ps(rows) if rows else 0.0

    def link_ps(self, rows: int) -> float:
        """See LayerCosts."""
        link = self.cost.link_ns(rows) * self.factor * PS_PER_NS / self.cost.spec.num_layers if rows else 0.0
        return min(link, MOST_LINK_SHARE * self._rows_ps(rows)) if rows else 0.0

    def _rows_ps(self, rows: int) -> float:
        return self.timer.shares_ps([Prompt(rows, 0, False)], 0, 0)[0] / self.cost.spec.num_layers

    def decode_ps(self, decodes: int, context_sum: int) -> float:
        """See LayerCosts."""
        return self.timer.shares_ps((), decodes, context_sum)[2] / self.cost.spec.num_layers if decodes else 0.0

    def prefill_ps(self, prompts: Sequence[Prompt]) -> float:
        """See LayerCosts."""
        return self.timer.shares_ps(prompts, 0, 0)[1] / self.cost.spec.num_layers if prompts else 0.0

    def rest_ps(self, work: StepWork) -> float:
        """See LayerCosts."""
        whole = self.timer.step_ps(work.prompts, work.decodes, work.context_sum, 0)
        return float(whole - sum(self.timer.shares_ps(work.prompts, work.decodes, work.context_sum)))


def layer_costs(timer: DeviceTimer) -> LayerCosts:
    """What a timer says of the parts of its steps. Raises ConfigError for one that only knows whole steps."""
    if isinstance(timer, AnalyticTimer):
        cost = timer.cost
        profile = clocked(cost.profile, timer.clock)
        return AnalyticCosts(CostModel(cost.spec, profile, cost.weights, cost.kv_format, cost.devices), timer.factor)
    if isinstance(timer, OperatorTimer):
        cost = timer.cost
        profile = clocked(cost.profile, timer.clock)
        at_clock = CostModel(cost.spec, profile, cost.weights, cost.kv_format, cost.devices)
        return TableCosts(timer, at_clock, timer.factor)
    raise ConfigError(
        f"A {type(timer).__name__} knows how long whole steps take, not the operators of them, so none can overlap.",
        "Take the timer `operators` or `analytic`, or leave `overlap` away.",
    )


def gemm_ns(cost: CostModel, rows: int) -> tuple[float, float]:
    """Time of the bytes and of the multiply-adds of all layers' products, in nanoseconds."""
    rates = cost.profile.rates
    done = cost.step(StepShape(rows, 0, 0, 0, 0, 0))
    return cost.touched_bytes(rows) * rates.weight_byte_ns / cost.devices, float(done.compute_ns)


def dense_shares(cost: CostModel) -> dict[Kind, float]:
    """Which part of a layer's multiply-adds each product has."""
    spec = cost.spec
    ffn = float(max(spec.experts_per_token, 1) if spec.num_experts else 1) * spec.hidden * spec.ffn
    width = spec.hidden * spec.head_dim
    macs: dict[Kind, float] = {
        "kqv": float(width * (spec.num_heads + 2 * spec.num_kv_heads)),
        "o": float(width * spec.num_heads),
        "up": ffn * (2 if spec.gated_ffn else 1) + spec.hidden * spec.num_experts,
        "down": ffn,
    }
    whole = sum(macs.values())
    return {kind: each / whole for kind, each in macs.items()}


def pieces(costs: LayerCosts, work: StepWork, kind: Kind, cuts: Sequence[int]) -> list[Piece]:
    """The operators of one kind, one for each range between two cuts that has rows of it; `cuts` from 0 to all rows.

    Attention of prompt chunks is shared out by rows. Raises ConfigError for cuts that leave rows out.
    """
    rows = work.rows
    if list(cuts) != sorted(set(cuts)) or cuts[0] != 0 or cuts[-1] != rows:
        raise ConfigError(f"{tuple(cuts)} does not cut {rows:,} rows.", "Give ascending numbers from 0 to all rows.")
    if kind == "decode":
        inside = [(first, min(end, work.decodes)) for first, end in pairwise(cuts) if first < work.decodes]
        return [_decode_piece(costs, work, span) for span in inside]
    if kind == "prefill":
        inside = [(max(first, work.decodes), end) for first, end in pairwise(cuts) if end > work.decodes]
        whole = costs.prefill_ps(work.prompts) if work.prompts else 0.0
        each = whole / max(rows - work.decodes, 1)
        return [Piece(kind, span, round(each * _size(span)), each * _size(span)) for span in inside]
    if kind in LINKS:
        if costs.cost.devices == 1:
            return []
        times = [(span, costs.link_ps(_size(span)) / 2.0) for span in pairwise(cuts)]
        return [Piece(kind, span, round(time), link_ps=time) for span, time in times]
    share = dense_shares(costs.cost)[kind]
    return [_dense_piece(costs, kind, span, share) for span in pairwise(cuts)]


def sequential(costs: LayerCosts, work: StepWork) -> list[Piece]:
    """One layer of a step without nano-batches, in its order."""
    cuts = (0, work.rows)
    return [piece for kind in KINDS for piece in pieces(costs, work, kind, cuts)]


def sequential_ps(costs: LayerCosts, work: StepWork) -> int:
    """The whole step, operator after operator: what the timer itself says, within rounding."""
    layer = sum(piece.duration_ps for piece in sequential(costs, work))
    return layer * costs.cost.spec.num_layers + round(costs.rest_ps(work))


def step_power_w(costs: LayerCosts, work: StepWork, duration_ps: float) -> float:
    """Watts of one device over a step of that duration. Raises ConfigError without power figures.

    The same work in less time keeps the parts of the device busier: `cost.energy`.
    """
    power = costs.cost.profile.power
    if power is None:
        raise ConfigError(
            f"The profile {costs.cost.profile.name} has no power figures.", "Use a catalogue device, or add [power]."
        )
    requests = [(1, work.context_sum // max(work.decodes, 1))] * work.decodes
    requests += [(prompt.new_tokens, prompt.context_tokens) for prompt in work.prompts]
    step = costs.cost.step(costs.cost.shape(requests))
    return power_w(power, replace(step, duration_ns=round(duration_ps / costs.factor / PS_PER_NS))).value


def _dense_piece(costs: LayerCosts, kind: Kind, span: tuple[int, int], share: float) -> Piece:
    rows, cost = _size(span), costs.cost
    memory, compute = gemm_ns(cost, rows)
    elements = rows * cost.row_values * cost.profile.rates.row_value_ns / cost.devices
    scale = share * costs.factor * PS_PER_NS / cost.spec.num_layers
    duration = share * costs.dense_ps(rows)
    # A measured product may be faster than the rates say: it is busy all the time then, not longer.
    busy_memory, busy_compute = min((memory + elements) * scale, duration), min(compute * scale, duration)
    return Piece(kind, span, round(duration), busy_compute, busy_memory)


def _decode_piece(costs: LayerCosts, work: StepWork, span: tuple[int, int]) -> Piece:
    size = _size(span)
    context_sum = work.context_sum * size // work.decodes
    cost, duration = costs.cost, costs.decode_ps(size, context_sum)
    keys = context_sum + size
    compute = keys * cost.pair_macs * cost.profile.rates.pair_mac_ns / cost.devices * costs.factor * PS_PER_NS
    return Piece("decode", span, round(duration), min(compute, duration), duration)


def _size(span: tuple[int, int]) -> int:
    return span[1] - span[0]
