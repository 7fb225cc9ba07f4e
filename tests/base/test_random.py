from hypothesis import given
from hypothesis import strategies as st

from megalith.base.random import splitmix64, uniform


def test_splitmix64_equals_the_published_stream() -> None:
    # First outputs of the reference generator seeded with 1234567 (Vigna's splitmix64.c).
    assert [splitmix64(1234567, i) for i in range(3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**32))
def test_uniform_is_a_float32_in_the_unit_interval(seed: int, index: int) -> None:
    value = uniform(seed, index)
    assert 0.0 <= value < 1.0
    assert (value * 2**24).is_integer()


def test_uniform_is_even_over_ten_buckets() -> None:
    counts = [0] * 10
    for index in range(20_000):
        counts[int(uniform(42, index) * 10)] += 1
    assert max(counts) < 2200
    assert min(counts) > 1800
