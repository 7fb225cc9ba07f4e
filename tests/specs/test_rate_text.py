"""Rates as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.specs.rate_text import parse_rates


@pytest.mark.parametrize(
    ("text", "rates"),
    [
        ("4", (4.0,)),
        ("8, 1,2,8", (1.0, 2.0, 8.0)),
        ("1..3", (1.0, 2.0, 3.0)),
        ("1..2x0.5,7", (1.0, 1.5, 2.0, 7.0)),
        ("0.1..0.5x0.1", (0.1, 0.2, 0.3, 0.4, 0.5)),
    ],
)
def test_rates(text: str, rates: tuple[float, ...]) -> None:
    assert parse_rates(text) == rates


@pytest.mark.parametrize("text", ["", ",", "0", "-1", "2..1", "1..2x0", "one", "1..9x0.0001", "1...2", "nan"])
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(ConfigError, match=r"1\.\.8x0\.5"):
        parse_rates(text)


@given(st.integers(1, 400), st.integers(1, 40), st.integers(1, 60))
def test_a_range_has_both_ends(first: int, step: int, count: int) -> None:
    last = first + step * count
    rates = parse_rates(f"{first / 10}..{last / 10}x{step / 10}")
    assert rates == tuple((first + i * step) / 10 for i in range(count + 1))
