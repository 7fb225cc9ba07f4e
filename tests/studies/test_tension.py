"""Two mechanisms together: the square of four figures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.studies import tension
from megalith.studies.tension import Square

GAIN = st.floats(0.1, 10.0)


@given(GAIN, GAIN, GAIN)
def test_gains_that_multiply_have_interaction_one(base: float, first: float, second: float) -> None:
    square = Square(base, base * first, base * second, base * first * second)
    assert square.alone == pytest.approx((first, second))
    assert square.beside == pytest.approx((first, second))
    assert square.interaction == pytest.approx(1.0)


@given(GAIN, GAIN, GAIN, GAIN)
def test_the_interaction_is_the_same_from_either_side(neither: float, first: float, second: float, both: float) -> None:
    square = Square(neither, first, second, both)
    (first_alone, second_alone), (first_beside, second_beside) = square.alone, square.beside
    assert first_alone is not None
    assert second_alone is not None
    assert first_beside is not None
    assert second_beside is not None
    assert square.interaction == pytest.approx(first_beside / first_alone)
    assert square.interaction == pytest.approx(second_beside / second_alone)


@pytest.mark.parametrize(
    ("square", "word"),
    [
        (Square(1.0, 2.0, 3.0, 6.0), "reproduced"),
        (Square(1.0, 2.0, 2.0, 2.2), "partly"),
        (Square(1.0, 2.0, 2.0, 5.0), "exceeded"),
        (Square(1.0, 2.0, None, 5.0), "no result"),
        (Square(0.0, 2.0, 1.0, 5.0), "no result"),
    ],
)
def test_the_verdict_is_on_whether_gains_multiply(square: Square, word: str) -> None:
    claim = tension.claim("k", "a", "b", "here")
    assert tension.finding(claim, square).word == word
    table = tension.square_table("t", ("a", "b"), "at", "req/s", {"1": square})
    assert table.rows[0][1:5] == tuple(square)
    assert tension.curve({1.0: square}) == ({} if square.interaction is None else {1.0: [square.interaction]})
