"""Fitting the rates of a profile to measured steps, and the error band that the fit deserves.

The time model of `compute` with exponent 1 is linear in its rates, so the fit is non-negative least squares on relative
errors. The band comes from leaving each point out and predicting it from the others. Calibration points are never
reported on: `check_disjoint` refuses a set that shares a point with the other.
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
_SMOOTH = 0.02
"""Weight of "neighbouring knots cost the same" against one measured point."""


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


def _features(cost: CostModel, shape: StepShape) -> tuple[F64, float]:
    """(what each unknown rate is multiplied by, the multiple of the known weight-byte rate) of one step.

    Unknowns: step, sequence, head multiply-add, KV byte, pair multiply-add, then one layer multiply-add a knot.
    """
    head_bytes = cost.weights.head if shape.outputs else 0
    fixed = [
        1.0,
        float(shape.sequences),
        float(shape.outputs * cost.head_macs),
        shape.decode_tokens * cost.kv_layer_token_bytes,
        float(shape.chunk_pairs * cost.pair_macs),
    ]
    layers = shape.rows * cost.layer_macs * hat_weights(shape.rows)
    return np.concatenate([np.array(fixed), layers]), cost.touched_bytes(shape.rows) + head_bytes


def fit(cost: CostModel, points: Sequence[MeasuredStep]) -> Rates:
    """Rates that explain `points`; the weight-byte rate stays the profile's (it is measured by the probe).

    Raises ConfigError below eight points: fewer do not say anything about so many rates.
    """
    if len(points) < 8:
        raise ConfigError(f"{len(points)} measured points are too few to fit a profile.", "Measure at least 8.")
    byte_ns = _byte_ns(cost, points)
    rows, targets = [], []
    for point in points:
        shape = point.shape(cost)
        unknown, weight_bytes = _features(cost, shape)
        left = max(point.measured_ns - weight_bytes * byte_ns, 0.0)
        rows.append(unknown / point.measured_ns)
        targets.append(left / point.measured_ns)
    matrix, target = np.array(rows), np.array(targets)
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-30)
    smooth = _smoothing(matrix.shape[1], scale)
    solution = non_negative_least_squares(
        np.vstack([matrix / scale, smooth]), np.concatenate([target, np.zeros(len(smooth))])
    )
    return _rates(solution / scale, byte_ns)


def _byte_ns(cost: CostModel, points: Sequence[MeasuredStep]) -> float:
    """The probe's price of a byte, but never such that streaming the weights alone takes longer than a whole step."""
    byte_ns = cost.profile.rates.weight_byte_ns
    for point in points:
        _, weight_bytes = _features(cost, point.shape(cost))
        byte_ns = min(byte_ns, 0.9 * point.measured_ns / weight_bytes)
    return byte_ns


def _smoothing(columns: int, scale: F64) -> F64:
    """Rows that pull neighbouring knots together, so that a knot without a point takes its neighbours' price."""
    first = columns - len(KNOTS)
    rows = np.zeros((len(KNOTS) - 1, columns))
    reference = float(np.median(scale[first:]))
    for i in range(len(KNOTS) - 1):
        rows[i, first + i], rows[i, first + i + 1] = 1.0 / scale[first + i], -1.0 / scale[first + i + 1]
    return rows * reference * _SMOOTH


def _rates(solution: F64, byte_ns: float) -> Rates:
    step, sequence, head, kv, pair = (float(value) for value in solution[:5])
    knots = [float(value) for value in solution[5:]]
    reference = knots[-1] or max(knots) or 1e-12
    factors = tuple((rows, value / reference) for rows, value in zip(KNOTS, knots, strict=True))
    return Rates(
        step_ns=step, sequence_ns=sequence, weight_byte_ns=byte_ns, mac_ns=reference, row_factors=factors,
        logit_mac_ns=head, kv_byte_ns=kv, pair_mac_ns=pair, combine=1.0,
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
