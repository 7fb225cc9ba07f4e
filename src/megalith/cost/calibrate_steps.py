"""Fitting the rates of a profile to the steps of a live engine: thousands of ordinary ones, not a few chosen ones.

Same prices as `calibrate`, with three differences that so many steps allow. The price of a multiply-add may follow the
kernel up and down over rows (tiles of four rows make the fifth dear). A sequence has a price of its own: what the
engine does for each between kernels. And a step counts relative to its predicted, not its measured time: on a noisy
machine dividing by the measured one favours the quick ones, and a simulation needs means that add up.

Steps are given by whoever recorded them. The runs that they come from must not be reported on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megalith.base.errors import ConfigError
from megalith.cost.calibrate import F64, non_negative_least_squares, with_rates
from megalith.cost.compute import CostModel, StepShape
from megalith.cost.profile import Rates

ROW_KNOTS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024)
"""Rows between which the price of a multiply-add is interpolated."""
LEAST_STEPS = 200
_SMOOTH = 0.02
"""Weight of a price that differs from its neighbours', in units of the relative error of one step, times the square
root of the number of steps: enough to carry prices over rows that no step had, too little to move those that many had.
"""
_HIDDEN = 0.7
"""Streaming the weights takes at most this part of the fitted time on one row (see `calibrate`)."""
_TAKE_LARGER = 16.0
_ROUNDS = 3
_FIXED = 4
"""Prices before those of the knots: step, sequence, KV byte, pair."""
HEAD_RATIOS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0)
"""Tried prices of a multiply-add of the head, in those of the layers: then everything else is linear."""


@dataclass(frozen=True, slots=True)
class TimedStep:
    """One step of a live engine: (new tokens, context tokens) of each request, how many logits, and how long."""

    requests: tuple[tuple[int, int], ...]
    outputs: int
    duration_ns: int

    def shape(self, cost: CostModel) -> StepShape:
        """Its work."""
        return cost.shape(self.requests, self.outputs)


def fit_steps(cost: CostModel, steps: Sequence[TimedStep]) -> Rates:
    """Rates that explain `steps`; raises ConfigError below LEAST_STEPS of them."""
    if len(steps) < LEAST_STEPS:
        raise ConfigError(
            f"{len(steps)} recorded steps are too few to fit a profile.", f"Record at least {LEAST_STEPS}."
        )
    shapes = [step.shape(cost) for step in steps]
    measured = np.array([float(step.duration_ns) for step in steps])
    work = _Work.of(cost, shapes, _knots(max(shape.rows for shape in shapes)))
    fits = [(work.fit(measured, head), head) for head in HEAD_RATIOS]
    (_, prices), head = min(fits, key=lambda fitted: fitted[0][0])
    return _rates(cost, work.knots, prices, head)


def bias(cost: CostModel, steps: Sequence[TimedStep]) -> float:
    """Predicted time of all steps together divided by measured, minus one."""
    predicted = sum(cost.step(step.shape(cost)).duration_ns for step in steps)
    return predicted / sum(step.duration_ns for step in steps) - 1.0


def calibrated_rates(cost: CostModel, steps: Sequence[TimedStep]) -> CostModel:
    """The cost model with the rates that `steps` give."""
    return with_rates(cost, fit_steps(cost, steps))


def _knots(rows: int) -> tuple[int, ...]:
    """Knots up to the first that covers the largest step."""
    last = next((i for i, knot in enumerate(ROW_KNOTS) if knot >= rows), len(ROW_KNOTS) - 1)
    return ROW_KNOTS[: max(last, 1) + 1]


def _hats(rows: int, knots: Sequence[int]) -> F64:
    """How much of a step of `rows` rows counts for each knot: linear in log2(rows), one in all."""
    weights = np.zeros(len(knots))
    position = float(np.interp(np.log2(max(rows, 1)), np.log2(knots), np.arange(len(knots))))
    low = min(int(position), len(knots) - 2)
    weights[low], weights[low + 1] = 1.0 - (position - low), position - low
    return weights


@dataclass(frozen=True, slots=True)
class _Work:
    """What the steps are made of: a row a step, a column a price."""

    knots: tuple[int, ...]
    fixed: F64
    layers: F64
    """Multiply-adds of the layers, by knot."""
    head: F64

    @staticmethod
    def of(cost: CostModel, shapes: Sequence[StepShape], knots: tuple[int, ...]) -> _Work:
        kv, pair = cost.kv_layer_token_bytes, float(cost.pair_macs)
        fixed = [(1.0, float(s.sequences), s.decode_tokens * kv, s.chunk_pairs * pair) for s in shapes]
        layers = [s.rows * cost.layer_macs * _hats(s.rows, knots) for s in shapes]
        head = [s.outputs * cost.head_macs * _hats(s.outputs, knots) for s in shapes]
        return _Work(knots, np.array(fixed), np.array(layers), np.array(head))

    def fit(self, measured: F64, head: float) -> tuple[float, F64]:
        """(squared error, prices) with the head at `head` times the layers' price."""
        amounts = np.hstack([self.fixed, self.layers + head * self.head])
        expected = measured
        prices = np.zeros(amounts.shape[1])
        for _ in range(_ROUNDS):
            prices = _prices(amounts / expected[:, None], measured / expected)
            expected = np.maximum(amounts @ prices, 1.0)
        return float(np.square(np.log(measured / expected)).sum()), prices


def _prices(matrix: F64, target: F64) -> F64:
    """Non-negative prices; those of the knots on one scale, pulled gently towards their neighbours."""
    scale = np.maximum(matrix.max(axis=0), 1e-30)
    scale[_FIXED:] = scale[_FIXED:].max()
    knots = len(scale) - _FIXED
    smooth = np.hstack([np.zeros((knots - 1, _FIXED)), np.eye(knots - 1, knots) - np.eye(knots - 1, knots, 1)])
    rows = np.vstack([matrix / scale, _SMOOTH * len(target) ** 0.5 * smooth])
    q, r = np.linalg.qr(rows)  # the same least squares in as many rows as there are prices
    prices: F64 = non_negative_least_squares(r, q[: len(target)].T @ target) / scale
    return prices


def _rates(cost: CostModel, knots: Sequence[int], prices: F64, head: float) -> Rates:
    step, sequence, kv, pair = (float(value) for value in prices[:_FIXED])
    curve = np.maximum(prices[_FIXED:], 1e-12)
    mac = float(curve[-1])
    layers_ns = float(curve[0]) * cost.layer_macs / cost.touched_bytes(1)
    head_ns = head * float(curve[0]) * cost.head_macs / cost.weights.head
    byte_ns = min(cost.profile.rates.weight_byte_ns, _HIDDEN * layers_ns, _HIDDEN * head_ns)
    return Rates(
        step_ns=step, sequence_ns=sequence, weight_byte_ns=byte_ns, mac_ns=mac, logit_mac_ns=head * mac,
        kv_byte_ns=kv, pair_mac_ns=pair, combine=_TAKE_LARGER,
        row_factors=tuple((rows, float(value / mac)) for rows, value in zip(knots, curve, strict=True)),
    )  # fmt: skip
