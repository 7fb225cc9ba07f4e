"""The native sampler against the reference sampler: the same tokens for any parameters."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import StepFailed
from megalith.engine import sampling as reference
from megalith.engine.native import binding, build, single
from tests.engine.native_models import sampling_of

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="no C compiler")


def sample(logits: np.ndarray, isa: str | None = None, **changes: np.ndarray) -> tuple[int, int]:
    """What the native sampler and the reference give."""
    how = sampling_of(1, **changes)
    native = single.sample(binding.load(), logits, how, isa)
    return int(native.tokens_N[0]), int(reference.sample(logits[None, :], how).tokens_N[0])


def logits_of(seed: int, vocab: int, spread: float, ties: bool = False) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal(vocab) * spread
    return (np.round(x) if ties else x).astype(np.float32)


@st.composite
def sparse(draw: st.DrawFn, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    ids = draw(st.lists(st.integers(0, vocab - 1), unique=True, max_size=12))
    return np.array([0, len(ids)], np.int32), np.array(ids, np.int32)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**64 - 1), index=st.integers(0, 2**32), vocab=st.integers(1, 1500))
def test_tokens_equal_the_reference(data: st.DataObject, seed: int, index: int, vocab: int) -> None:
    draw = data.draw
    f32 = lambda value: np.array([value], np.float32)  # noqa: E731
    logits = logits_of(seed % 1000, vocab, draw(st.sampled_from([0.1, 1.0, 4.0, 30.0])), draw(st.booleans()))
    bias_starts, bias_ids = draw(sparse(vocab))
    seen_starts, seen_ids = draw(sparse(vocab))
    numbers = np.random.default_rng(index)
    changes = {
        "temperature_N": f32(draw(st.sampled_from([0.0, 0.01, 0.3, 0.7, 1.0, 1.5, 5.0, 100.0]))),
        "top_k_N": np.array([draw(st.sampled_from([0, 0, 1, 2, 5, 40, 1000, 5000]))], np.int32),
        "top_p_N": f32(draw(st.sampled_from([1.0, 1.0, 0.999, 0.95, 0.5, 0.1, 1e-6]))),
        "min_p_N": f32(draw(st.sampled_from([0.0, 0.0, 0.01, 0.2, 0.9, 1.0]))),
        "repetition_N": f32(draw(st.sampled_from([1.0, 1.2, 0.5]))),
        "presence_N": f32(draw(st.sampled_from([0.0, 0.7, -1.0]))),
        "frequency_N": f32(draw(st.sampled_from([0.0, 0.3, -0.2]))),
        "seed_N": np.array([seed], np.uint64), "draw_N": np.array([index], np.uint64),
        "bias_starts_N1": bias_starts, "bias_ids": bias_ids,
        "bias_values": numbers.uniform(-5, 5, bias_ids.size).astype(np.float32),
        "seen_starts_N1": seen_starts, "seen_ids": seen_ids,
        "seen_counts": numbers.integers(0, 4, seen_ids.size).astype(np.int32),
    }  # fmt: skip
    if draw(st.booleans()):
        allowed = numbers.random((1, -(-vocab // 32) * 32)) < 0.4
        allowed[0, int(numbers.integers(vocab))] = True
        changes["masks"] = np.packbits(allowed, axis=1, bitorder="little").view(np.uint32)
        changes["mask_rows_N"] = np.zeros(1, np.int32)
    native, expected = sample(logits, **changes)
    assert native == expected


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(1.0, 0, 1.0, 0.0), (0.7, 0, 0.95, 0.0), (1.0, 50, 1.0, 0.0), (1.3, 0, 1.0, 0.05), (1.0, 40, 0.9, 0.02)],
)
def test_a_large_vocabulary_gives_the_reference_tokens(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    f32 = lambda value: np.array([value], np.float32)  # noqa: E731
    for seed in range(40):
        native, expected = sample(
            logits_of(seed, 49152, 3.0), temperature_N=f32(temperature), top_k_N=np.array([top_k], np.int32),
            top_p_N=f32(top_p), min_p_N=f32(min_p), seed_N=np.array([seed], np.uint64),
        )  # fmt: skip
        assert native == expected


def test_instruction_sets_draw_the_same_tokens() -> None:
    for isa in binding.load().isas():
        for seed in range(20):
            native, expected = sample(
                logits_of(seed, 5003, 2.0), isa, temperature_N=np.array([0.8], np.float32),
                top_p_N=np.array([0.9], np.float32), seed_N=np.array([seed], np.uint64),
            )  # fmt: skip
            assert native == expected


def test_greedy_takes_the_lowest_id_of_a_tie() -> None:
    for where in ([3, 900], [17, 18], [0, 1499], [1498, 1499]):
        logits = np.zeros(1500, np.float32)
        logits[where] = 2.5
        assert sample(logits) == (where[0], where[0])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), vocab=st.integers(1, 700), wanted=st.integers(0, 20), ties=st.booleans())
def test_log_probabilities_equal_the_reference(seed: int, vocab: int, wanted: int, ties: bool) -> None:
    logits = logits_of(seed, vocab, 5.0, ties)
    how = sampling_of(
        1, num_logprobs_N=np.array([wanted], np.int32), bias_starts_N1=np.array([0, 1], np.int32),
        bias_ids=np.array([vocab // 2], np.int32), bias_values=np.array([50], np.float32),
    )  # fmt: skip
    got, expected = single.sample(binding.load(), logits, how), reference.sample(logits[None, :], how)
    assert got.logprobs_N is not None
    assert expected.logprobs_N is not None
    assert got.top_ids_NK is not None
    assert expected.top_ids_NK is not None
    assert got.top_logprobs_NK is not None
    assert expected.top_logprobs_NK is not None
    np.testing.assert_array_equal(got.tokens_N, expected.tokens_N)
    np.testing.assert_allclose(got.logprobs_N, expected.logprobs_N, atol=1e-5)
    np.testing.assert_array_equal(got.top_ids_NK, expected.top_ids_NK)
    np.testing.assert_allclose(got.top_logprobs_NK, expected.top_logprobs_NK, atol=1e-5)


def test_a_target_is_scored_and_not_drawn() -> None:
    logits = logits_of(5, 300, 2.0)
    how = sampling_of(1, targets_N=np.array([77], np.int32), num_logprobs_N=np.array([2], np.int32))
    got, expected = single.sample(binding.load(), logits, how), reference.sample(logits[None, :], how)
    assert got.tokens_N[0] == 77
    assert got.logprobs_N is not None
    assert expected.logprobs_N is not None
    np.testing.assert_allclose(got.logprobs_N, expected.logprobs_N, atol=1e-5)


@pytest.mark.parametrize("poison", ["nan", "nan among good", "all masked", "minus infinity", "infinity"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_token_is_refused(poison: str, temperature: float) -> None:
    logits = logits_of(6, 500, 1.0)
    changes = {"temperature_N": np.array([temperature], np.float32)}
    if poison == "nan":
        logits[:] = np.nan
    elif poison == "nan among good":
        logits[321] = np.nan
    elif poison == "minus infinity":
        logits[:] = -np.inf
    elif poison == "infinity":
        logits[3] = np.inf
    else:
        changes |= {"masks": np.zeros((1, 16), np.uint32), "mask_rows_N": np.zeros(1, np.int32)}
    with pytest.raises(StepFailed):
        single.sample(binding.load(), logits, sampling_of(1, **changes))
    with pytest.raises(StepFailed):
        reference.sample(logits[None, :], sampling_of(1, **changes))
