"""Attention in parts against attention to the whole, computed in float64."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.engine.partial_attention import Partial, attend, merge


def whole(query: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float) -> np.ndarray:
    """Softmax attention in float64, one head after another."""
    heads, group = query.shape[0], query.shape[0] // keys.shape[0]
    rows = []
    for head in range(heads):
        scores = keys[head // group].astype(np.float64) @ query[head].astype(np.float64) * scale
        weights = np.exp(scores - scores.max())
        rows.append(weights @ values[head // group].astype(np.float64) / weights.sum())
    return np.array(rows)


def made(seed: int, kv_heads: int, group: int, tokens: int, width: int, spread: float) -> tuple[np.ndarray, ...]:
    draw = np.random.default_rng(seed)
    shapes = ((kv_heads * group, width), (kv_heads, tokens, width), (kv_heads, tokens, width))
    query, keys, values = (draw.standard_normal(shape).astype(np.float32) for shape in shapes)
    return query * np.float32(spread), keys, values


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1000), st.sampled_from([1, 2, 4]), st.sampled_from([1, 3]), st.integers(1, 300),
    st.sampled_from([0.1, 1.0, 30.0]), st.lists(st.floats(0, 1), max_size=6), st.randoms(use_true_random=False),
)  # fmt: skip
def test_parts_of_any_size_in_any_order_give_the_whole(
    seed: int, kv_heads: int, group: int, tokens: int, spread: float, cuts: list[float], order: object
) -> None:
    query, keys, values = made(seed, kv_heads, group, tokens, 16, spread)
    ends = sorted({0, tokens, *[round(cut * tokens) for cut in cuts]})
    ends.append(tokens)  # an empty part changes nothing
    parts = [attend(query, keys[:, a:b], values[:, a:b], 0.25) for a, b in pairwise(ends)]
    order.shuffle(parts)  # type: ignore[attr-defined]
    exact = whole(query, keys, values, 0.25)
    assert np.abs(merge(parts).values - exact).max() <= 1e-5 * max(1.0, np.abs(exact).max())
    # Merged in two steps it is the same: a holder may itself have merged parts.
    half = len(parts) // 2
    if half:
        nested = merge([merge(parts[:half]), merge(parts[half:])])
        assert np.abs(nested.values - exact).max() <= 1e-5 * max(1.0, np.abs(exact).max())


def test_a_merge_of_plain_means_would_be_wrong() -> None:
    """The control: parts weighted alike, without maxima and sums."""
    query, keys, values = made(3, 2, 2, 64, 16, 1.0)
    parts = [attend(query, keys[:, a:b], values[:, a:b], 0.25) for a, b in ((0, 8), (8, 64))]
    plain = np.mean([part.values for part in parts], axis=0)
    assert np.abs(plain - whole(query, keys, values, 0.25)).max() > 1e-2


def test_what_comes_back_does_not_depend_on_the_context() -> None:
    sizes = {attend(*made(0, 2, 4, tokens, 32, 1.0), 0.2).num_bytes for tokens in (1, 100, 5000)}
    assert sizes == {8 * 32 * 4 + 8 * 2 * 4}


def test_only_empty_parts_are_an_empty_whole() -> None:
    query, keys, values = made(0, 2, 1, 0, 8, 1.0)
    merged = merge([attend(query, keys, values, 1.0)] * 2)
    assert not merged.total.any()
    assert not merged.values.any()


def test_shapes_that_do_not_fit_are_refused() -> None:
    query, keys, values = made(0, 2, 1, 4, 8, 1.0)
    with pytest.raises(ValueError, match="cannot attend"):
        attend(query, keys, values[:, :2], 1.0)
    with pytest.raises(ValueError, match="nothing"):
        merge(list[Partial]())
