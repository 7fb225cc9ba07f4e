"""Stage 1 of NanoFlow's search: in which order operators of a layer run, by an integer program in steady state.

Every layer does the same, so one period of one layer is enough. With s_i the start of operator i in its window of the
period T, d_i its time alone on the device (no interference yet), and h_i how many layers it lags behind:

    min  T
    s.t. s_j + h_j T >= s_i + d_i + h_i T              j waits for i of the same layer
         s_j + h_j T >= s_i + d_i + (h_i - 1) T        j waits for i of the layer before
         s_j >= s_i + d_i  or  s_i >= s_j + d_j        both in one stream (a binary variable each)
         s_i + d_i <= s_j + T                          both in one stream: windows do not overlap

A program over all layers would not end; this one takes a second or so. The lags h make it linear in T only as
constants, so a few patterns of lags are tried, as are a few sizes. Orders go to stage 2 (`nano_choice.choose`).
Knows numbers and operators; must not know models.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Final, NamedTuple

from megalith.base.units import NS_PER_S
from megalith.cost.lowering import KINDS, LayerCosts, Piece, StepWork
from megalith.cost.nano import STREAM_OF, STREAMS, Cuts, Enough, Order, Slot, cut, dependencies
from megalith.cost.nano_choice import Chosen, Overlap, candidate_cuts, choose, orders
from megalith.plan.mix import check_solver, solver

if TYPE_CHECKING:
    from highspy import HighsLp

SIZES: Final = (0.3125, 0.375, 0.4375, 0.5, 0.5625, 0.625)
LAGS: Final = ("", "o", "up")
"""Operators of the second nano-batch from this one on work one layer behind; empty: none does."""
DEADLINE_NS: Final = 180 * NS_PER_S
"""Of all programs together; a backstop. `NODES` bounds the work, so that every machine finds the same."""
NODES: Final = 50
"""Branches of one program. Most are proven by then; the rest is within some per cent of its bound."""
FINE: Final = 3
"""Of the best with two nano-batches, how many are tried with four of KQV and attention of decodes as well."""
KEEP: Final = 24
"""Orders that go through all of stage 2: those with the best first guess of shares."""
GAP: Final = 1e-4
"""Between an order and its bound, as a fraction, below which it counts as proven."""
_PS_PER_US = 1e6


class Found(NamedTuple):
    """An order, and how good stage 1 thinks it is."""

    cuts: Cuts
    order: Order
    period_ps: float
    """Without interference."""
    bound_ps: float
    """No order of these operators has a shorter one: the busiest stream alone, or what the solver proved."""
    lag_from: str

    @property
    def proven(self) -> bool:
        """Whether no order of these operators and lags is better."""
        return self.period_ps <= self.bound_ps * (1 + 2 * GAP)


class Stage(NamedTuple):
    """What stage 1 gave."""

    found: tuple[Found, ...]
    programs: int
    proven: int
    """Programs solved to the end."""


class Searched(NamedTuple):
    """What both stages gave."""

    chosen: Chosen
    stage: Stage


class Effort(NamedTuple):
    """How much stage 1 tries."""

    sizes: tuple[float, ...] = SIZES
    lags: tuple[str, ...] = LAGS
    deadline_ns: int = DEADLINE_NS


QUICK: Final = Effort((0.5, 0.5625), ("", "o"))
"""For a first look: four programs and their finer cuts."""


def search(
    costs: LayerCosts,
    work: StepWork,
    enough: Enough = Enough(),  # noqa: B008 - a constant
    overlap: Overlap = "both",
    effort: Effort = Effort(),  # noqa: B008
    stage: Stage | None = None,
) -> Searched:
    """Both stages for one shape of a step; `stage` 1 again where it is known. Raises MachineError without the solver.

    Orders of the timer's own quick choice take part, so the answer is never worse than that one.
    """
    stage = first_stage(costs, work, effort) if stage is None else stage
    candidates = [(one.cuts, one.order) for one in stage.found]
    for cuts in candidate_cuts(work.rows, effort.sizes):
        candidates += [(cuts, order) for order in orders(cut(costs, work, cuts), cuts)]
    return Searched(choose(costs, work, enough, candidates, overlap, KEEP), stage)


def first_stage(costs: LayerCosts, work: StepWork, effort: Effort = Effort()) -> Stage:  # noqa: B008
    """Orders without interference, the shortest period first. Raises MachineError without the solver."""
    check_solver()
    end_ns = time.perf_counter_ns() + effort.deadline_ns
    every = candidate_cuts(work.rows, effort.sizes)
    cases = [(cuts, lag) for cuts in every if cuts.fine == cuts.coarse for lag in effort.lags]
    found: list[Found] = []
    programs = 0
    for turn in range(2):
        for cuts, lag in cases:
            left = end_ns - time.perf_counter_ns()
            if left > 0:
                programs += 1
                one = best_order(cut(costs, work, cuts), cuts, lag, left)
                found += [] if one is None else [one]
        if not turn:
            found.sort(key=lambda each: each.period_ps)
            finer = {cuts.coarse: cuts for cuts in every if cuts.fine != cuts.coarse}
            cases = [(finer[one.cuts.coarse], one.lag_from) for one in found[:FINE] if one.cuts.coarse in finer]
    found.sort(key=lambda each: each.period_ps)
    return Stage(tuple(found), programs, sum(one.proven for one in found))


def best_order(parts: Sequence[Piece], cuts: Cuts, lag_from: str, deadline_ns: int = DEADLINE_NS) -> Found | None:
    """The order with the shortest period for these operators and lags; None where none was found in time."""
    lags = [_lag(piece, cuts, lag_from) for piece in parts]
    highs = solver(deadline_ns)
    highs.setOptionValue("mip_rel_gap", GAP)
    highs.setOptionValue("mip_max_nodes", NODES)
    highs.passModel(_program(parts, lags))
    highs.run()
    info = highs.getInfo()
    if info.primal_solution_status != 2:
        return None
    starts = list(highs.getSolution().col_value)[1 : len(parts) + 1]
    period = float(info.objective_function_value) * _PS_PER_US
    bound = max(_bound(parts), float(info.mip_dual_bound) * _PS_PER_US)
    return Found(cuts, _order(parts, lags, starts), period, min(bound, period), lag_from)


def _lag(piece: Piece, cuts: Cuts, lag_from: str) -> int:
    late = bool(lag_from) and KINDS.index(piece.kind) >= KINDS.index(lag_from)
    return int(late and piece.rows[0] >= cuts.coarse[1])


def _bound(parts: Sequence[Piece]) -> float:
    """The busiest stream: no period is shorter."""
    return float(
        max(sum(piece.duration_ps for piece in parts if STREAM_OF[piece.kind] == stream) for stream in STREAMS)
    )


def _program(parts: Sequence[Piece], lags: Sequence[int]) -> HighsLp:
    """By rows, in microseconds: T, the starts, one binary for each pair of a stream that may go either way."""
    import highspy
    import numpy as np

    times = [piece.duration_ps / _PS_PER_US for piece in parts]
    count, most = len(parts), sum(times)
    within, across = dependencies(parts)
    pairs = _free_pairs(parts, within)
    rows: list[tuple[float, list[tuple[int, float]]]] = []
    for j in range(count):
        rows += [(times[i], [(0, float(lags[j] - lags[i])), (j + 1, 1.0), (i + 1, -1.0)]) for i in within[j]]
        rows += [(times[i], [(0, float(lags[j] - lags[i] + 1)), (j + 1, 1.0), (i + 1, -1.0)]) for i in across[j]]
    for i, j in ((i, j) for i in range(count) for j in range(count) if i != j and _same(parts, i, j)):
        rows.append((times[i], [(0, 1.0), (j + 1, 1.0), (i + 1, -1.0)]))
    for number, (i, j) in enumerate(pairs):
        binary = count + 1 + number
        rows.append((times[i] - 2 * most, [(j + 1, 1.0), (i + 1, -1.0), (binary, -2 * most)]))
        rows.append((times[j], [(i + 1, 1.0), (j + 1, -1.0), (binary, 2 * most)]))
    for j in range(count):
        rows += [
            (times[i], [(j + 1, 1.0), (i + 1, -1.0)])
            for i in within[j]
            if _same(parts, i, j) and lags[i] == lags[j]
        ]  # fmt: skip
    columns = 1 + count + len(pairs)
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = columns, len(rows)
    lp.col_cost_ = np.array([1.0] + [0.0] * (columns - 1))
    lp.col_lower_ = np.array([_bound(parts) / _PS_PER_US] + [0.0] * (columns - 1))
    lp.col_upper_ = np.array([most] + [2 * most] * count + [1.0] * len(pairs))
    lp.row_lower_ = np.array([low for low, _ in rows])
    lp.row_upper_ = np.full(len(rows), np.inf)
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    entries = [[(column, value) for column, value in row if value] for _, row in rows]
    lp.a_matrix_.start_ = np.cumsum([0] + [len(row) for row in entries]).astype(np.int32)
    lp.a_matrix_.index_ = np.array([column for row in entries for column, _ in row], dtype=np.int32)
    lp.a_matrix_.value_ = np.array([value for row in entries for _, value in row])
    whole, any_number = highspy.HighsVarType.kInteger, highspy.HighsVarType.kContinuous
    lp.integrality_ = [any_number] * (count + 1) + [whole] * len(pairs)
    return lp


def _same(parts: Sequence[Piece], i: int, j: int) -> bool:
    return STREAM_OF[parts[i].kind] == STREAM_OF[parts[j].kind]


def _free_pairs(parts: Sequence[Piece], within: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Pairs of one stream of which neither waits for the other directly, parts of one kind in their own order aside."""
    return [(i, j) for i, j in combinations(range(len(parts)), 2) if _same(parts, i, j) and i not in within[j]]


def _order(parts: Sequence[Piece], lags: Sequence[int], starts: Sequence[float]) -> Order:
    seen: dict[str, int] = {}
    slots: dict[str, list[tuple[float, int, Slot]]] = {stream: [] for stream in STREAMS}
    for number, piece in enumerate(parts):
        part = seen.get(piece.kind, 0)
        seen[piece.kind] = part + 1
        slots[STREAM_OF[piece.kind]].append((starts[number], number, Slot(piece.kind, part, lags[number])))
    return Order(*(tuple(slot for _, _, slot in sorted(slots[stream])) for stream in STREAMS))
