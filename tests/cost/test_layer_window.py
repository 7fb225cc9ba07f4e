"""Times of windows: the closed forms, the monotone curve, and a hand-made case."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.cost.layer_window import inference_turns, moves, training_turns, walk_ns
from megalith.policy.residency import LayerWindow


@given(st.integers(2, 24), st.data(), st.integers(1, 50), st.integers(1, 50), st.integers(0, 99))
def test_a_sliding_window_takes_the_slower_of_link_and_compute(
    layers: int, data: st.DataObject, compute: int, move: int, rest: int
) -> None:
    k = data.draw(st.integers(2, layers))
    k_prime = data.draw(st.integers(1, k - 1))
    found = walk_ns(LayerWindow(layers, k, k_prime), inference_turns(layers, compute, rest), [move] * layers, 202)
    if k == layers:
        assert found == layers * compute + rest
        return
    slack = layers * move / 200  # of the window at the end of the walk
    moved = moves(layers, k, k_prime) * move
    assert max(layers * compute + rest, moved) - slack <= found
    if k + k_prime <= layers:
        assert found <= max(layers * compute, moved) + rest + slack


@pytest.mark.parametrize("move", [3, 10, 17])
@pytest.mark.parametrize("k", [2, 3, 8])
def test_without_a_rest_the_closed_form_is_exact(k: int, move: int) -> None:
    found = walk_ns(LayerWindow(12, k), inference_turns(12, 10, 0), [move] * 12)
    assert found == 12 * max(10, move)


def test_a_window_that_is_exchanged_whole_overlaps_nothing_between_windows() -> None:
    found = walk_ns(LayerWindow(12, 4, 4), inference_turns(12, 10, 0), [7] * 12)
    assert found == 3 * (7 + 4 * 10)
    slow = walk_ns(LayerWindow(12, 4, 4), inference_turns(12, 10, 0), [20] * 12)
    assert slow == 3 * (4 * 20 + 10)


def test_training_saves_the_moves_at_both_ends() -> None:
    times = [
        walk_ns(LayerWindow(12, k, 1, turns=True), training_turns(12, 10, 20, (0, 0)), [40] * 12) for k in range(2, 13)
    ]
    assert times == sorted(times, reverse=True)
    assert times[-1] == 12 * 30
    for k, time in zip(range(2, 13), times, strict=True):
        assert time >= 2 * (12 - k) * 40
