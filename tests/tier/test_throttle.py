import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.base.units import NS_PER_S
from megalith.tier.throttle import TokenBucket


def test_a_link_takes_the_time_of_its_rate_burst_and_latency() -> None:
    bucket = TokenBucket(1_000, burst_bytes=500, latency_ns=7)
    assert bucket.ready_ns(0, 500) == 7, "the burst is free"
    assert bucket.ready_ns(0, 1_000) == NS_PER_S + 7
    assert bucket.ready_ns(0, 0) == NS_PER_S + 7, "in order"
    assert bucket.ready_ns(10 * NS_PER_S, 500) == 10 * NS_PER_S + 7, "rested, it is full again"


requests = st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**7)), min_size=1, max_size=30)


@given(rate=st.integers(1, 10**10), burst=st.integers(0, 10**7), latency=st.integers(0, 10**6), asked=requests)
def test_bytes_over_any_interval_never_exceed_rate_times_interval_plus_burst(
    rate: int, burst: int, latency: int, asked: list[tuple[int, int]]
) -> None:
    bucket, now, done = TokenBucket(rate, burst, latency), 0, []
    for pause, size in asked:
        now += pause
        done.append((now, bucket.ready_ns(now, size), size))
    for i, (begin, _, _) in enumerate(done):
        carried = 0
        for asked_ns, over, size in done[i:]:
            carried += size
            assert over >= asked_ns + latency
            assert carried * NS_PER_S <= rate * (over - latency - begin) + burst * NS_PER_S


@given(rate=st.integers(1, 10**10), burst=st.integers(0, 10**7), asked=requests)
def test_a_busy_link_is_no_slower_than_its_rate(rate: int, burst: int, asked: list[tuple[int, int]]) -> None:
    """The other side: the last one is over when the rate says, to the nanosecond, wherever the bucket was last full."""
    bucket, now, best = TokenBucket(rate, burst), 0, 0
    for pause, size in asked:
        now += pause
        best = max(best, now * rate) + size * NS_PER_S
        assert bucket.ready_ns(now, size) == max(now, -(-(best - burst * NS_PER_S) // rate))


@pytest.mark.parametrize("numbers", [(0, 0, 0), (1, -1, 0), (1, 0, -1)])
def test_a_link_that_cannot_be_is_refused(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="cannot be"):
        TokenBucket(*numbers)
    with pytest.raises(ValueError, match="-1 bytes"):
        TokenBucket(1).ready_ns(0, -1)
