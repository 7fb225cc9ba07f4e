"""Fitting the rates of a profile to measured steps, and the error band that the fit deserves.

A step is a sum of prices times amounts: fixed time, multiply-adds of layers and head (a price that can only fall as
rows grow, by knots), KV bytes, query-key pairs. That is non-negative least squares on relative errors; a ridge keeps a
price from falling without need, because prices by rows and by pairs can trade places. Streaming weights is not fitted:
on few rows it hides behind the multiply-adds or they behind it, so the probed price of a byte enters as the larger.

The band comes from leaving each point out and predicting it from the others; the ridge's strength was chosen so too.
Calibration points are never reported on: `check_disjoint` refuses sets that share one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from megalith.base.errors import ConfigError
from megalith.cost.compute import CostModel, StepShape
from megalith.cost.profile import Band, Profile, Rates

F64 = NDArray[np.float64]

KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Rows between which the price of a multiply-add is interpolated."""
_RIDGE = 0.5
"""Weight of a price that falls between two knots, in units of the relative error of one point."""
_HIDDEN = 0.9
"""Streaming the weights takes at most this part of the fitted time on one row."""
_TAKE_LARGER = 16.0
"""Exponent of `combine` that takes the larger of memory and compute."""
_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """One timed step: `batch` decodes at `context` tokens and one prompt chunk of `prompt` new tokens."""

    batch: int
    context: int
    prompt: int
    measured_ns: int

    @property
    def key(self) -> tuple[int, int, int]:
        """What makes two points the same point."""
        return (self.batch, self.context, self.prompt)

    def shape(self, cost: CostModel) -> StepShape:
        """The work of the step; every decode and the prompt's last row make logits."""
        requests = [(1, self.context)] * self.batch + ([(self.prompt, 0)] if self.prompt else [])
        return cost.shape(requests)


def check_disjoint(calibration: Sequence[MeasuredStep], reporting: Sequence[MeasuredStep]) -> None:
    """Raise ConfigError when a point is in both sets."""
    shared = {point.key for point in calibration} & {point.key for point in reporting}
    if shared:
        raise ConfigError(
            f"{len(shared)} points are in both the calibration and the reporting set, such as {min(shared)}.",
            "Report only on points that the fit has not seen.",
        )


def hat_weights(rows: int) -> F64:
    """How much of a step of `rows` rows counts for each knot: linear in log2(rows), one in all."""
    weights = np.zeros(len(KNOTS))
    position = float(np.interp(np.log2(max(rows, 1)), np.log2(KNOTS), np.arange(len(KNOTS))))
    low = min(int(position), len(KNOTS) - 2)
    weights[low], weights[low + 1] = 1.0 - (position - low), position - low
    return weights


def fit(cost: CostModel, points: Sequence[MeasuredStep]) -> Rates:
    """Rates that explain `points`; the price of a weight byte stays the profile's, unless the steps refute it.

    Layers and head share the shape of the price over rows, which is found by a few rounds of fitting. Raises
    ConfigError below eight points: fewer say nothing about so many rates.
    """
    if len(points) < 8:
        raise ConfigError(f"{len(points)} measured points are too few to fit a profile.", "Measure at least 8.")
    shapes = [(point.shape(cost), point.measured_ns) for point in points]
    falls = np.triu(np.ones((len(KNOTS), len(KNOTS))))  # price of knot k = sum of the falls from k on
    curve = np.ones(len(KNOTS))
    for _ in range(_ROUNDS):
        matrix = np.array([_amounts(cost, shape, curve, falls) / measured for shape, measured in shapes])
        scale = np.maximum(np.abs(matrix).max(axis=0), 1e-30)
        ridge = np.hstack([np.zeros((len(KNOTS) - 1, 4)), _RIDGE * np.eye(len(KNOTS) - 1, len(KNOTS))])
        target = np.concatenate([np.ones(len(points)), np.zeros(len(ridge))])
        prices = non_negative_least_squares(np.vstack([matrix / scale, ridge]), target) / scale
        by_rows = falls @ prices[4:]
        last, curve = curve, by_rows / max(by_rows[-1], 1e-9 * by_rows[0], 1e-30)
        if np.abs(curve - last).max() < 1e-3:
            break
    return _rates(cost, prices, curve)


def _amounts(cost: CostModel, shape: StepShape, curve: F64, falls: F64) -> F64:
    """What each price is multiplied by in one step: step, head, KV byte, pair, then the falls of the layer price."""
    head = shape.outputs * cost.head_macs * float(hat_weights(shape.outputs) @ curve) if shape.outputs else 0.0
    fixed = [1.0, head, shape.decode_tokens * cost.kv_layer_token_bytes, float(shape.chunk_pairs * cost.pair_macs)]
    return np.concatenate([np.array(fixed), shape.rows * cost.layer_macs * (hat_weights(shape.rows) @ falls)])


def _rates(cost: CostModel, prices: F64, curve: F64) -> Rates:
    step, head, kv, pair = (float(value) for value in prices[:4])
    mac = float(prices[-1]) or 1e-9 * float(prices[4:].sum())
    layers_ns = mac * float(curve[0]) * cost.layer_macs / cost.touched_bytes(1)
    head_ns = head * float(curve[0]) * cost.head_macs / cost.weights.head
    byte_ns = min(cost.profile.rates.weight_byte_ns, _HIDDEN * layers_ns, _HIDDEN * head_ns if head else layers_ns)
    return Rates(
        step_ns=step, weight_byte_ns=byte_ns, mac_ns=mac, logit_mac_ns=head, kv_byte_ns=kv, pair_mac_ns=pair,
        row_factors=tuple((rows, float(value)) for rows, value in zip(KNOTS, curve, strict=True)),
        combine=_TAKE_LARGER,
    )  # fmt: skip


def non_negative_least_squares(matrix: F64, target: F64) -> F64:
    """x >= 0 that minimises |matrix x - target|: the active-set method of Lawson and Hanson (1974), chapter 23."""
    columns = matrix.shape[1]
    x, used = np.zeros(columns), np.zeros(columns, bool)
    tolerance = 1e-12 * float(np.abs(matrix).sum()) * max(1.0, float(np.abs(target).max(initial=0.0)))
    for _ in range(3 * columns):
        gradient = np.where(used, -np.inf, matrix.T @ (target - matrix @ x))
        best = int(np.argmax(gradient))
        if gradient[best] <= tolerance:
            break
        used[best] = True
        x = _inside(matrix, target, x, used)
    return x


def _inside(matrix: F64, target: F64, x: F64, used: NDArray[np.bool_]) -> F64:
    """The least-squares solution over the used columns; those that would turn negative leave `used` on the way."""
    while True:
        trial = np.zeros(len(x))
        trial[used] = np.linalg.lstsq(matrix[:, used], target, rcond=None)[0]
        negative = used & (trial <= 0.0)
        if not negative.any():
            return trial
        steps = x[negative] / np.maximum(x[negative] - trial[negative], 1e-300)
        x = x + float(steps.min()) * (trial - x)
        used &= x > 1e-300
        x = np.where(used, x, 0.0)


def left_out_ratios(cost: CostModel, points: Sequence[MeasuredStep]) -> list[float]:
    """Measured / predicted of each point when it is predicted from all the others."""
    ratios = []
    for i, point in enumerate(points):
        others = [*points[:i], *points[i + 1 :]]
        trial = with_rates(cost, fit(cost, others))
        ratios.append(point.measured_ns / max(trial.step(point.shape(trial)).duration_ns, 1))
    return ratios


def band_of(ratios: Sequence[float], source: str) -> Band:
    """The band that holds nine in ten of `ratios`, never narrower than 5 % on each side."""
    low, high = np.quantile(np.array(ratios), [0.05, 0.95])
    return Band(low=min(float(low), 0.95), high=max(float(high), 1.05), source=source)


def with_rates(cost: CostModel, rates: Rates) -> CostModel:
    """The same model with other rates."""
    profile: Profile = msgspec.structs.replace(cost.profile, rates=rates)
    return CostModel(cost.spec, profile, cost.weights, cost.kv_format, cost.devices)
