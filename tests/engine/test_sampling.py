"""The reference sampler against a brute-force reading of its own docstring, one full sort and no short cuts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import StepFailed
from megalith.base.random import uniform
from megalith.engine.sampling import leaders, sample
from tests.engine.batches import Row, sampling_batch


def brute_force(raw: np.ndarray, row: Row) -> int:
    if row.target >= 0:
        return row.target
    f32 = np.float32
    x = [f32(v) for v in raw]
    for token, value in row.bias.items():
        x[token] = f32(x[token] + f32(value))
    for token, count in row.seen.items():
        x[token] = f32(x[token] / f32(row.repetition)) if x[token] > 0 else f32(x[token] * f32(row.repetition))
        if count > 0:
            x[token] = f32(x[token] - f32(f32(row.presence) + f32(f32(row.frequency) * f32(count))))
    if row.allowed is not None:
        x = [v if i in row.allowed else f32(-np.inf) for i, v in enumerate(x)]
    order = sorted((i for i in range(len(x)) if x[i] > -np.inf), key=lambda i: (-x[i], i))
    if row.temperature == 0:
        return order[0]
    z = [math.exp((float(x[i]) - float(x[order[0]])) / float(f32(row.temperature))) for i in order]
    if row.top_k:
        order, z = order[: row.top_k], z[: row.top_k]
    if row.top_p < 1:
        total, running, kept = sum(z), 0.0, 0
        while kept < len(z):
            running += z[kept]
            kept += 1
            if running >= float(f32(row.top_p)) * total:
                break
        order, z = order[:kept], z[:kept]
    if row.min_p > 0:
        pairs = [(i, w) for i, w in zip(order, z, strict=True) if w >= float(f32(row.min_p))]
        order, z = [i for i, _ in pairs], [w for _, w in pairs]
    threshold, running = uniform(row.seed, row.draw) * sum(z), 0.0
    for token, weight in zip(order, z, strict=True):
        running += weight
        if running > threshold:
            return token
    return order[-1]


VOCAB = 97
logits = st.integers(0, 2**32 - 1).map(
    lambda seed: (np.random.default_rng(seed).normal(0, 3, VOCAB) * 4).round(1).astype(np.float32) / np.float32(4)
)
token_ids = st.integers(0, VOCAB - 1)
rows = st.builds(
    Row,
    temperature=st.sampled_from([0.0, 0.1, 0.7, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 40, 500]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    repetition=st.sampled_from([1.0, 1.3, 0.8]),
    presence=st.sampled_from([0.0, 1.5, -1.0]),
    frequency=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**64 - 1),
    draw=st.integers(0, 10_000),
    seen=st.dictionaries(token_ids, st.integers(0, 5), max_size=12),
    bias=st.dictionaries(token_ids, st.sampled_from([-100.0, -1.0, 5.0, 100.0]), max_size=4),
    allowed=st.none() | st.frozensets(token_ids, min_size=1, max_size=30),
    logprobs=st.sampled_from([-1, 0, 5, 20]),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(logits, rows), min_size=1, max_size=5))
def test_equals_brute_force_alone_and_in_any_batch(cases: list[tuple[np.ndarray, Row]]) -> None:
    matrix = np.stack([raw for raw, _ in cases])
    together = sample(matrix, sampling_batch([row for _, row in cases], VOCAB)).tokens_N
    for i, (raw, row) in enumerate(cases):
        alone = sample(raw[None], sampling_batch([row], VOCAB)).tokens_N
        assert together[i] == alone[0] == brute_force(raw, row)


@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
def test_large_flat_vocabularies_need_more_than_the_first_candidates(spread: float) -> None:
    raw = np.random.default_rng(3).normal(0, spread, 5000).astype(np.float32)
    nuclei = ((1.0, 0.0), (0.9, 0.0), (1.0, 0.01))
    cases = [Row(temperature=1.0, seed=s, top_p=p, min_p=m) for s in range(12) for p, m in nuclei]
    got = sample(np.tile(raw, (len(cases), 1)), sampling_batch(cases, 5000)).tokens_N
    assert got.tolist() == [brute_force(raw, row) for row in cases]


def test_draws_follow_the_distribution() -> None:
    raw = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    cases = [Row(temperature=1.0, seed=11, draw=i) for i in range(8000)]
    counts = np.bincount(sample(np.tile(raw, (8000, 1)), sampling_batch(cases, 4)).tokens_N, minlength=4) / 8000
    assert np.abs(counts - [0.5, 0.3, 0.15, 0.05]).max() < 0.02


def test_ties_take_the_lowest_id() -> None:
    raw = np.array([[1.0, 4.0, 4.0, 0.0], [2.0, 2.0, 2.0, 2.0]], np.float32)
    assert sample(raw, sampling_batch([Row(), Row()], 4)).tokens_N.tolist() == [1, 0]
    assert leaders(raw[1], 2).tolist() == [0, 1]
    assert sample(raw, sampling_batch([Row(temperature=1, top_k=1)] * 2, 4)).tokens_N.tolist() == [1, 0]


def test_logprobs_are_of_the_raw_logits_and_sum_to_one() -> None:
    raw = np.random.default_rng(0).normal(0, 2, (40, 20)).astype(np.float32)
    cases = [Row(temperature=1.0, seed=i, bias={3: 50.0}, logprobs=20 if i % 2 else -1) for i in range(40)]
    result = sample(raw, sampling_batch(cases, 20))
    assert result.logprobs_N is not None
    assert result.top_ids_NK is not None
    assert result.top_logprobs_NK is not None
    for n in range(1, 40, 2):
        expected = raw[n] - np.log(np.exp(raw[n].astype(np.float64)).sum())
        assert np.exp(result.top_logprobs_NK[n].astype(np.float64)).sum() == pytest.approx(1.0, abs=1e-5)
        assert result.top_logprobs_NK[n] == pytest.approx(expected[result.top_ids_NK[n]], abs=1e-5)
        assert result.logprobs_N[n] == pytest.approx(expected[result.tokens_N[n]], abs=1e-5)
        assert (np.diff(result.top_logprobs_NK[n]) <= 0).all()


def test_targets_are_scored_without_a_draw() -> None:
    raw = np.random.default_rng(0).normal(0, 2, (2, 50)).astype(np.float32)
    result = sample(raw, sampling_batch([Row(target=7, logprobs=0), Row(temperature=1, target=0, logprobs=0)], 50))
    assert result.tokens_N.tolist() == [7, 0]
    assert result.logprobs_N is not None
    assert result.logprobs_N[0] == pytest.approx(raw[0, 7] - np.log(np.exp(raw[0]).sum()), abs=1e-5)


@pytest.mark.parametrize("row", [Row(), Row(temperature=1.0), Row(allowed=frozenset({2}), bias={2: -np.inf})])
def test_a_row_without_a_finite_maximum_fails(row: Row) -> None:
    raw = np.full((1, 33), np.nan, np.float32)
    with pytest.raises(StepFailed):
        sample(raw if row.allowed is None else np.zeros((1, 33), np.float32), sampling_batch([row], 33))
