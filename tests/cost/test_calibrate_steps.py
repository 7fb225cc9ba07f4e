"""Rates fitted to ordinary steps: they predict steps that they have not seen, and noise does not make them quick."""

from __future__ import annotations

import msgspec
import pytest

from megalith.base.errors import ConfigError
from megalith.base.random import uniform
from megalith.cost.calibrate import with_rates
from megalith.cost.calibrate_steps import LEAST_STEPS, TimedStep, bias, fit_steps
from megalith.cost.compute import CostModel
from megalith.cost.memory import WeightBytes
from megalith.cost.profile import Band, Profile, Rates
from megalith.specs.model import ModelSpec

SPEC = ModelSpec(
    name="small", family="llama", num_layers=12, hidden=512, num_heads=8, num_kv_heads=4, head_dim=64, ffn=1536,
    vocab=32_000, max_context=4096,
)  # fmt: skip
TRUE = Rates(
    step_ns=300_000, sequence_ns=15_000, weight_byte_ns=0.05, mac_ns=0.012, logit_mac_ns=0.03, kv_byte_ns=0.1,
    pair_mac_ns=0.03, combine=16.0,
    row_factors=((1, 3.0), (2, 1.6), (4, 1.2), (5, 1.35), (8, 1.2), (32, 1.1), (128, 1.0)),
)  # fmt: skip
PROFILE = Profile(
    name="here", kind="native", memory_bytes=1 << 34, rates=TRUE, band=Band(low=0.9, high=1.1, source="made up"),
    source="made up", date="2026-11-23",
)  # fmt: skip
WEIGHTS = WeightBytes(format="q8_0", layers=20_000_000, experts=0, head=16_000_000, tables=0, vectors=50_000)
TRUTH = CostModel(SPEC, PROFILE, WEIGHTS)


def run(seed: int, count: int, noise: float) -> list[TimedStep]:
    """Steps of a small engine: 1 to 12 decodes, a prompt chunk in some, times with a long tail to the slow side."""
    steps = []
    for i in range(count):
        decodes = 1 + int(12 * uniform(seed, 4 * i) ** 2)
        context = 20 + int(700 * uniform(seed, 4 * i + 1))
        requests = [(1, context + 7 * j) for j in range(decodes)]
        if uniform(seed, 4 * i + 2) < 0.15:
            requests.append((2 + int(200 * uniform(seed, 4 * i + 3)), 0))
        shape = TRUTH.shape(requests)
        slower = 1.0 - noise + 2.0 * noise * uniform(seed + 1, 2 * i)
        slower += 5.0 * noise if uniform(seed + 1, 2 * i + 1) < 0.02 else 0.0
        steps.append(TimedStep(tuple(requests), len(requests), round(TRUTH.step(shape).duration_ns * slower)))
    return steps


def test_exact_steps_are_predicted_exactly_also_unseen_ones() -> None:
    blank = msgspec.structs.replace(PROFILE, rates=msgspec.structs.replace(TRUE, mac_ns=1.0, row_factors=()))
    cost = CostModel(SPEC, blank, TRUTH.weights)
    fitted = with_rates(cost, fit_steps(cost, run(1, 1500, 0.0)))
    errors = [
        abs(fitted.step(step.shape(fitted)).duration_ns / step.duration_ns - 1.0) for step in run(2, 400, 0.0)
    ]  # fmt: skip
    assert sorted(errors)[len(errors) // 2] < 0.01
    assert sorted(errors)[-20] < 0.06


def test_noise_does_not_bias_the_sum() -> None:
    """Means add up in a simulation, so the mean must be right, with the slow tail in it."""
    steps = run(3, 2500, 0.3)
    fitted = with_rates(TRUTH, fit_steps(TRUTH, steps))
    assert abs(bias(fitted, steps)) < 0.01
    assert abs(bias(fitted, run(5, 2500, 0.3))) < 0.02


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match=f"{LEAST_STEPS - 1} recorded steps are too few"):
        fit_steps(TRUTH, run(1, LEAST_STEPS - 1, 0.0))
