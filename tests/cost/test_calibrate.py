"""Calibration: known rates come back from exact and from noisy steps; the two sets of points never meet."""

from __future__ import annotations

import random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.cost.calibrate import (
    KNOTS,
    MeasuredStep,
    band_of,
    check_disjoint,
    fit,
    hat_weights,
    left_out_ratios,
    non_negative_least_squares,
    with_rates,
)
from megalith.cost.compute import CostModel
from megalith.cost.memory import weight_bytes
from megalith.cost.profile import Rates, from_device
from megalith.specs import catalog

TRUE = Rates(
    step_ns=40_000, sequence_ns=3_000, weight_byte_ns=0.03, mac_ns=0.012, logit_mac_ns=0.015, kv_byte_ns=0.05,
    pair_mac_ns=0.05, row_factors=((1, 2.0), (8, 1.3), (64, 1.0)),
)  # fmt: skip
CALIBRATION = [
    (b, c, p) for b in (0, 1, 2, 4, 8, 16, 32) for c in (64, 512) for p in (0, 16, 96, 256) if (b and c == 512) or p
]
REPORTING = [(1, 300, 0), (3, 200, 0), (12, 700, 0), (24, 400, 48), (6, 100, 200), (0, 0, 150), (0, 0, 400)]


def model() -> CostModel:
    spec = catalog.model("smollm2-135m")
    profile = from_device(catalog.device("l4"))
    rates = msgspec.structs.replace(profile.rates, weight_byte_ns=TRUE.weight_byte_ns)
    return CostModel(spec, msgspec.structs.replace(profile, rates=rates), weight_bytes(spec, "q4_1"))


def measured(keys: list[tuple[int, int, int]], noise: float = 0.0, seed: int = 1) -> list[MeasuredStep]:
    truth, draw = with_rates(model(), TRUE), random.Random(seed)
    points = [MeasuredStep(*key, measured_ns=1) for key in keys]
    return [
        MeasuredStep(*p.key, measured_ns=round(truth.step(p.shape(truth)).duration_ns * draw.lognormvariate(0, noise)))
        for p in points
    ]


def errors(points: list[MeasuredStep], fitted: CostModel) -> list[float]:
    return [abs(fitted.step(p.shape(fitted)).duration_ns / p.measured_ns - 1) for p in points]


def test_rates_come_back_from_exact_steps() -> None:
    fitted = with_rates(model(), fit(model(), measured(CALIBRATION)))
    assert max(errors(measured(CALIBRATION), fitted)) < 0.03
    assert max(errors(measured(REPORTING), fitted)) < 0.05


def test_noise_of_a_tenth_leaves_unseen_points_within_a_tenth() -> None:
    points = measured(CALIBRATION, noise=0.1)
    fitted = with_rates(model(), fit(model(), points))
    assert float(np.median(errors(measured(REPORTING), fitted))) < 0.1
    ratios = left_out_ratios(model(), points)
    band = band_of(ratios, "test")
    inside = [band.low <= ratio <= band.high for ratio in ratios]
    assert sum(inside) >= 0.85 * len(inside)
    assert band.low < 1 < band.high


def test_sets_that_share_a_point_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"1 points are in both.*\(3, 200, 0\)"):
        check_disjoint(measured(REPORTING), [*measured(CALIBRATION), MeasuredStep(3, 200, 0, 5)])
    check_disjoint(measured(REPORTING), measured(CALIBRATION))


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ConfigError, match="5 measured points are too few"):
        fit(model(), measured(CALIBRATION)[:5])


@given(st.integers(1, 5000))
def test_hats_sum_to_one(rows: int) -> None:
    weights = hat_weights(rows)
    assert weights.sum() == pytest.approx(1.0)
    assert (weights >= 0).all()
    if rows in KNOTS:
        assert weights[KNOTS.index(rows)] == pytest.approx(1.0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(8, 30))
def test_least_squares_is_optimal(seed: int, columns: int, rows: int) -> None:
    """The Karush-Kuhn-Tucker conditions: no negative value, no gradient on used columns, none upward on the others."""
    draw = np.random.default_rng(seed)
    matrix, target = draw.normal(size=(rows, columns)), draw.normal(size=rows)
    x = non_negative_least_squares(matrix, target)
    gradient = matrix.T @ (target - matrix @ x)
    assert (x >= 0).all()
    assert np.abs(gradient[x > 0]).max(initial=0.0) < 1e-8
    assert gradient[x == 0].max(initial=0.0) < 1e-8
