import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.base.units import format_bytes, format_duration, parse_bytes, parse_duration_ns


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("4GiB", 4 << 30), ("512M", 512 << 20), ("4GB", 4 * 10**9), ("1.5 kib", 1536), ("17", 17), ("1T", 1 << 40)],
)
def test_sizes_people_write(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "four", "-1GiB", "4 Gigs", "1e9", "4GiB!"])
def test_a_bad_size_names_a_good_one(text: str) -> None:
    with pytest.raises(ConfigError, match="4GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "ns"), [("200ms", 200_000_000), ("2s", 2 * 10**9), ("1.5", 1_500_000_000), ("2h", 7200 * 10**9)]
)
def test_durations_people_write(text: str, ns: int) -> None:
    assert parse_duration_ns(text) == ns


@given(st.integers(min_value=0, max_value=1 << 50))
def test_formatted_bytes_parse_back_within_rounding(num_bytes: int) -> None:
    again = parse_bytes(format_bytes(num_bytes).replace(" ", ""))
    assert abs(again - num_bytes) <= max(1, num_bytes * 0.006)


def test_formatting_picks_the_unit() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 3 << 30)] == ["0 B", "1023 B", "1.50 KiB", "3.00 GiB"]
    assert [format_duration(n) for n in (5, 2_810_000, 1.2e9, 180e9)] == ["5 ns", "2.81 ms", "1.2 s", "3 min"]
